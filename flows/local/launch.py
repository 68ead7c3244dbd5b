"""The doors to the supervisor: run it here, run it in the background, end it.

`python -m flows.local.launch WORKSPACE` is the background process; its options come as JSON on standard input, so that
no token is seen in a list of processes.
"""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from flows.local.processes import sweep, tail
from flows.local.site import UpOptions
from flows.local.state import State
from flows.local.supervisor import Say, Supervisor
from flows.local.workspace import Workspace
from loop.errors import InputError, LoopError, ServiceError

logger = logging.getLogger(__name__)

READY_DEADLINE_S = 420.0
STOP_DEADLINE_S = 40.0
TICK_S = 0.2
FAILURE = "failure: "

_background: list[subprocess.Popen[bytes]] = []
"""Supervisors started by this process; kept so that they are reaped when they end while we still run."""


def run_here(workspace: Workspace, options: UpOptions, say: Say, on_ready: Callable[[State], None]) -> None:
    """Starts the services and stays until a signal comes; where they run already, says so, and returns.

    Raises:
        LoopError: as Supervisor.run.
    """
    found = _first_one(workspace, say)
    if found is not None:
        on_ready(found)
        return
    Supervisor(workspace, options, say).run(on_ready)


def start_in_background(workspace: Workspace, options: UpOptions, say: Say) -> State:
    """Starts the services in a process of their own and returns when all are well; finds those that run already.

    Raises:
        LoopError: as Supervisor.run; what was started is stopped.
    """
    options.check()
    found = _first_one(workspace, say)
    if found is not None:
        return found
    workspace.prepare()
    log = workspace.logs_dir / "supervisor.log"
    command = [sys.executable, "-m", "flows.local.launch", str(workspace.root)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    _background.append(process)
    if process.stdin is not None:
        process.stdin.write(json.dumps(asdict(options)).encode())
        process.stdin.close()
    try:
        return _follow(workspace, process, log, say)
    except BaseException:
        process.terminate()
        process.wait(STOP_DEADLINE_S)
        raise


def stop(workspace: Workspace, say: Say) -> bool:
    """Ends what runs in a workspace, also what a killed supervisor left behind; False where nothing ran.

    Raises:
        ServiceError: something would not end.
    """
    state = workspace.state()
    if state is None:
        return False
    supervisor = state.supervisor.process()
    if supervisor is None:
        return sweep(state.run_id) > 0
    say("stopping the services")
    supervisor.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_DEADLINE_S
    while state.is_running() and time.monotonic() < deadline:
        time.sleep(TICK_S)
    left = state.supervisor.process()
    if left is not None:
        left.kill()
    sweep(state.run_id)
    for process in _background:
        process.poll()
    if state.is_running():
        raise ServiceError(f"process {state.supervisor.pid} does not end; end it with `kill -9 {state.supervisor.pid}`")
    say("all services have stopped")
    return True


def _first_one(workspace: Workspace, say: Say) -> State | None:
    """The state of the supervisor that runs already, once it is ready; None where none runs."""
    state = workspace.state()
    if state is None or not state.is_running():
        return None
    pid = state.supervisor.pid
    say(f"the services of {workspace.root} run already since {state.started_at} (process {pid}); nothing is started")
    deadline = time.monotonic() + READY_DEADLINE_S
    while not state.ready:
        if time.monotonic() > deadline:
            raise ServiceError(
                f"process {pid} is not ready after {READY_DEADLINE_S:.0f} s; stop it with `celloop down`"
            )
        time.sleep(TICK_S)
        state = workspace.state()
        if state is None or not state.is_running():
            raise ServiceError(f"process {pid} ended while it was starting; see {workspace.logs_dir}, then run again")
    return state


def _follow(workspace: Workspace, process: subprocess.Popen[bytes], log: Path, say: Say) -> State:
    """Says what the background process says until it is ready."""
    told = 0
    deadline = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < deadline:
        code = process.poll()
        text = log.read_text(errors="replace")
        news = text[told:].partition(FAILURE)[0].rpartition("\n")[0]
        told += len(news) + 1 if news else 0
        for line in news.splitlines():
            say(line)
        if code is not None:
            raise _failure(code, text, log)
        state = workspace.state()
        if state is not None and state.ready and state.supervisor.pid == process.pid:
            return state
        time.sleep(TICK_S)
    raise ServiceError(f"the services are not ready after {READY_DEADLINE_S:.0f} s; see {log}")


def _failure(code: int, text: str, log: Path) -> LoopError:
    """The error that the background process ended with."""
    _, found, reason = text.rpartition(FAILURE)
    if not found:
        return ServiceError(f"the background process ended with exit code {code}; the end of {log}:\n{tail(log)}")
    return (InputError if code == InputError.exit_code else ServiceError)(reason.strip())


def _main(root: str, options: UpOptions) -> int:
    """The background process: says everything on standard output, which is its log."""

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    try:
        Supervisor(Workspace(root), options, say).run(lambda state: say("ready"))
    except LoopError as error:
        say(f"{FAILURE}{error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], UpOptions(**json.load(sys.stdin))))
