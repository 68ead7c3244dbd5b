"""The supervisor with small web servers in place of the real services; the real ones are in tests/services."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flows.local import launch
from flows.local.launch import run_here, start_in_background, stop
from flows.local.ports import free_port
from flows.local.processes import marked, sweep
from flows.local.services import Service
from flows.local.site import UpOptions, child_environment
from flows.local.state import State
from flows.local.status import read_status
from flows.local.workspace import Workspace
from loop.errors import ConfigError, InputError, ServiceError, StateError

# serves, and hides a child in a session of its own
SERVER = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
BROKEN = "import sys; print('cannot open the database', flush=True); sys.exit(3)"
DEAF = "import time; print('hm', flush=True); time.sleep(600)"

# what `celloop up` does, with the services of a JSON document
RUNNER = """
import json, sys
from pathlib import Path
from flows.local import supervisor
from flows.local.services import Service
from flows.local.site import UpOptions
from flows.local.workspace import Workspace
from loop.errors import LoopError

services = [Service(**{**item, "command": tuple(item["command"]), "after": tuple(item["after"])})
            for item in json.loads(sys.argv[2])]
supervisor.local_services = lambda *_: services
supervisor.check_managed = lambda *_: None

def say(text):
    print(text, flush=True)

try:
    supervisor.Supervisor(Workspace(sys.argv[1]), UpOptions(), say).run(lambda state: say("READY"))
except LoopError as error:
    say(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


def fake(name: str, code: str = SERVER, after: Sequence[str] = (), deadline_s: float = 30.0) -> Service:
    port = free_port()
    return Service(name, (sys.executable, "-c", code, str(port)), {}, port, "/", tuple(after), deadline_s)


def runner_command(workspace: Workspace, services: Sequence[Service]) -> list[str]:
    document = [
        {
            "name": service.name,
            "command": service.command,
            "environment": dict(service.environment),
            "port": service.port,
            "health_path": service.health_path,
            "after": service.after,
            "deadline_s": service.deadline_s,
            "restarts": service.restarts,
        }
        for service in services
    ]
    return [sys.executable, "-c", RUNNER, str(workspace.root), json.dumps(document)]


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    place = Workspace(tmp_path / "ws")
    yield place
    state = place.state()
    if state is not None:
        sweep(state.run_id, patience_s=0.2)


def until(check: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_ready(workspace: Workspace) -> bool:
    state = workspace.state() if workspace.state_file.exists() else None
    return state is not None and state.ready


def run_id(workspace: Workspace) -> str:
    state = workspace.state()
    assert state is not None
    return state.run_id


@pytest.fixture
def running(workspace: Workspace) -> Iterator[subprocess.Popen[str]]:
    services = [replace(fake("backend", after=["mlflow"]), restarts=True), fake("mlflow")]
    with subprocess.Popen(runner_command(workspace, services), stdout=subprocess.PIPE, text=True) as process:
        until(lambda: is_ready(workspace), "ready")
        yield process
        if process.poll() is None:
            process.kill()


def test_services_start_in_order_and_stop_on_sigterm(workspace: Workspace, running: subprocess.Popen[str]) -> None:
    assert len(marked(run_id(workspace))) == 4
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    order = [
        said.index(text) for text in ("starting MLflow", "MLflow is up", "starting backend", "backend is up", "READY")
    ]
    assert order == sorted(order)
    assert "all services have stopped" in said
    assert marked(run_id(workspace)) == []
    assert not is_ready(workspace)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_it_too(workspace: Workspace, running: subprocess.Popen[str], sign: signal.Signals) -> None:
    running.send_signal(sign)
    running.communicate(timeout=30)
    assert running.returncode == 0
    assert marked(run_id(workspace)) == []


def test_nothing_survives_the_sudden_death_of_the_supervisor(
    workspace: Workspace, running: subprocess.Popen[str]
) -> None:
    running.kill()
    running.wait()
    until(lambda: marked(run_id(workspace)) == [], "the sentinel clears up")


def test_one_crash_stops_all_and_shows_the_log(workspace: Workspace, running: subprocess.Popen[str]) -> None:
    state = workspace.state()
    assert state is not None
    os.kill(state.processes["mlflow"].pid, signal.SIGKILL)
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "ServiceError: MLflow ended with exit code -9 while it was in use" in said
    assert f"the end of {workspace.logs_dir}/mlflow.log:\nserving" in said
    assert marked(state.run_id) == []


def test_a_service_that_may_is_started_again_but_not_for_ever(
    workspace: Workspace, running: subprocess.Popen[str]
) -> None:
    seen: list[int] = []
    for _ in range(4):
        until(lambda: backend_pid(workspace) not in seen, "it is started again")
        seen.append(backend_pid(workspace))
        os.kill(seen[-1], signal.SIGKILL)
    said, _ = running.communicate(timeout=30)
    assert len(set(seen)) == 4
    assert said.count("starting backend") == 4
    assert running.returncode == 1
    assert "ServiceError: backend ended with exit code -9 while it was in use" in said
    assert marked(run_id(workspace)) == []


def backend_pid(workspace: Workspace) -> int:
    state = workspace.state()
    assert state is not None
    return state.processes["backend"].pid


def test_status_shows_each_service_with_its_memory(workspace: Workspace, running: subprocess.Popen[str]) -> None:
    status = read_status(workspace)
    by_name = {service.name: service for service in status.services}
    assert status.running
    assert status.supervisor_pid == running.pid
    assert by_name["prefect"].detail == "not started yet"
    assert (by_name["mlflow"].memory_mb or 0) > 1
    assert not status.healthy
    assert json.loads(json.dumps(status.document()))["services"][0]["title"] == "Label Studio"


def test_down_stops_it_and_finds_nothing_afterwards(workspace: Workspace, running: subprocess.Popen[str]) -> None:
    said: list[str] = []
    assert stop(workspace, said.append)
    running.communicate(timeout=30)
    assert said[-1] == "all services have stopped"
    assert marked(run_id(workspace)) == []
    assert not stop(workspace, said.append)
    assert not read_status(workspace).running


def test_down_clears_up_after_a_run_that_left_something(workspace: Workspace, running: subprocess.Popen[str]) -> None:
    sentinels = [child for child in psutil.Process(running.pid).children() if "sentinel" in " ".join(child.cmdline())]
    assert len(sentinels) == 1
    sentinels[0].kill()
    running.kill()
    running.wait()
    assert stop(workspace, lambda text: None)
    assert marked(run_id(workspace)) == []


def test_a_second_up_finds_the_first(workspace: Workspace, running: subprocess.Popen[str]) -> None:
    said: list[str] = []
    found: list[State] = []
    run_here(workspace, UpOptions(), said.append, found.append)
    assert found == [start_in_background(workspace, UpOptions(), said.append)]
    assert f"process {running.pid}" in said[0]
    second = subprocess.run(runner_command(workspace, []), capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "StateError: `celloop up` runs for" in second.stdout
    assert running.poll() is None


def test_a_service_that_ends_at_once_is_named_with_its_log(workspace: Workspace) -> None:
    command = runner_command(workspace, [fake("mlflow"), fake("backend", BROKEN)])
    reply = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert reply.returncode == 1
    assert "ServiceError: backend ended with exit code 3 before it was up" in reply.stdout
    assert reply.stdout.rstrip().endswith("cannot open the database")
    assert marked(run_id(workspace)) == []


def test_a_service_that_never_answers_is_given_up(workspace: Workspace) -> None:
    command = runner_command(workspace, [fake("prefect", DEAF, deadline_s=1.0)])
    reply = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "ServiceError: Prefect is not up after 1 s (http://127.0.0.1:" in reply.stdout
    assert reply.stdout.rstrip().endswith("hm")
    assert marked(run_id(workspace)) == []


def test_a_program_that_is_not_there_is_named(workspace: Workspace) -> None:
    missing = Service("prefect", ("/no/such/program",), {}, free_port(), "/")
    reply = subprocess.run(
        runner_command(workspace, [missing]), capture_output=True, text=True, timeout=60, check=False
    )
    assert "ServiceError: Prefect cannot be started" in reply.stdout
    assert "/no/such/program" in reply.stdout


def test_lost_secrets_beside_a_database_are_refused(workspace: Workspace) -> None:
    workspace.prepare()
    (workspace.label_studio_dir / "label_studio.sqlite3").touch()
    with pytest.raises(StateError, match=r"secrets.json is gone.*restore the file, or delete"):
        run_here(workspace, UpOptions(), lambda text: None, lambda state: None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (UpOptions(label_studio_url="http://host"), "needs both --label-studio-url and --label-studio-token"),
        (UpOptions(label_studio_token="t" * 40), "needs both"),
        (UpOptions(label_studio_url="host:8080", label_studio_token="t"), "must begin with http"),
    ],
)
def test_half_an_address_is_refused(workspace: Workspace, options: UpOptions, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        start_in_background(workspace, options, lambda line: None)
    assert not workspace.root.exists()


def test_the_background_process_passes_its_error_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_BIN", str(workspace.root / "missing"))
    with pytest.raises(ServiceError, match=r"Label Studio is not installed at .*missing; run `make`"):
        start_in_background(workspace, UpOptions(), lambda text: None)
    launch._background.pop().wait()


def test_a_taken_port_is_bad_usage_in_the_background_too(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="asked for by MLflow and backend"):
        start_in_background(workspace, UpOptions(ports={"mlflow": 5998, "backend": 5998}), lambda text: None)
    launch._background.pop().wait()


def test_a_service_gets_no_more_of_the_environment_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBUG", "release")
    monkeypatch.setenv("LABEL_STUDIO_HOST", "elsewhere")
    monkeypatch.setenv("TZ", "UTC")
    environment = child_environment(fake("mlflow"), "run-x")
    assert "DEBUG" not in environment
    assert "LABEL_STUDIO_HOST" not in environment
    assert environment["TZ"] == "UTC"
    assert environment["CELLOOP_RUN_ID"] == "run-x"
