"""Runs the services of a workspace: starts them, waits until they are well, watches them, stops them all.

One supervisor a workspace, held by a lock that the system frees when the supervisor dies. Its end, whatever the
cause, ends every process that it started: on Ctrl-C, SIGTERM, SIGHUP or the crash of a server it stops them itself,
after SIGKILL the kernel and the sentinel do. Services that keep nothing in memory are started again when they end.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from uuid import uuid4

import httpx

from flows.local.credentials import Credentials, make_credentials, save_credentials
from flows.local.ports import choose_ports
from flows.local.processes import ProcessId, spawn, stop_groups, sweep, tail
from flows.local.services import LOOPBACK, Service
from flows.local.site import UpOptions, child_environment, local_services, local_urls
from flows.local.state import State, save_state
from flows.local.workspace import Workspace
from loop.errors import ServiceError, StateError, UnreachableError

Say = Callable[[str], None]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK_S = 0.2
REMIND_S = 10.0
STOP_PATIENCE_S = 10.0
STOP_FIRST = ("worker", "backend")
RESTARTS = 3
RESTART_WINDOW_S = 600.0
"""A service that may be started again is given up when it ends more often than that within this time."""


class Supervisor:
    """One run of the services of a workspace.

    Args:
        workspace: whose services.
        options: ports, or an existing Label Studio.
        say: told in words what happens; never told a secret.
    """

    def __init__(self, workspace: Workspace, options: UpOptions, say: Say) -> None:
        self._workspace = workspace
        self._options = options
        self._say = say
        self._run_id = uuid4().hex
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ends: dict[str, list[float]] = {}
        self._signals = 0

    def run(self, on_ready: Callable[[State], None]) -> None:
        """Starts everything, calls `on_ready`, and returns after a signal once everything has stopped.

        Raises:
            StateError: another supervisor holds this workspace, or it cannot be used.
            ConfigError: a port that was asked for is taken.
            ServiceError: a service did not become well in time, or ended by itself; the others are stopped.
        """
        self._options.check()
        self._workspace.prepare()
        with hold(self._workspace.lock_file):
            before = self._workspace.state()
            if before is not None:
                sweep(before.run_id)
            if self._options.label_studio_url:
                check_existing(self._options)
            credentials = self._credentials()
            ports = choose_ports(self._options.ports, before.ports if before else {})
            services = local_services(self._workspace, ports, credentials, self._options)
            state = self._first_state(ports)
            self._live(services, state, credentials, on_ready)

    def _live(
        self, services: Sequence[Service], state: State, credentials: Credentials, on_ready: Callable[[State], None]
    ) -> None:
        handlers = {sign: signal.signal(sign, self._on_signal) for sign in SIGNALS}
        sentinel = start_sentinel(self._run_id)
        try:
            state = self._start(services, state)
            if not self._signals and state.label_studio_managed:
                check_managed(state.urls["label_studio"], credentials.label_studio_token, self._workspace)
            if not self._signals:
                state = self._save(replace(state, ready=True))
                on_ready(state)
            state = self._watch(services, state)
        finally:
            self._stop()
            sentinel.communicate(b"done")
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
            self._save(replace(state, ready=False))

    def _credentials(self) -> Credentials:
        known = self._workspace.credentials()
        if known is None and (self._workspace.label_studio_dir / "label_studio.sqlite3").exists():
            raise StateError(
                f"{self._workspace.secrets_file} is gone, and Label Studio's data know only the password in it; "
                f"restore the file, or delete {self._workspace.root} for a clean start"
            )
        credentials = replace(known or make_credentials(), external_token=self._options.label_studio_token)
        save_credentials(self._workspace.secrets_file, credentials)
        return credentials

    def _first_state(self, ports: dict[str, int]) -> State:
        return self._save(
            State(
                run_id=self._run_id,
                supervisor=ProcessId.of(os.getpid()),
                ready=False,
                started_at=datetime.now(UTC).isoformat(timespec="seconds"),
                ports=ports,
                urls=local_urls(ports, self._options),
                label_studio_managed=not self._options.label_studio_url,
            )
        )

    def _save(self, state: State) -> State:
        save_state(self._workspace.state_file, state)
        return state

    def _start(self, services: Sequence[Service], state: State) -> State:
        """Starts each service once those before it are well; returns when all are well or a signal came."""
        waiting, started, well = list(services), dict[str, float](), set[str]()
        reminded = begin = time.monotonic()
        with httpx.Client(trust_env=False, timeout=2.0) as client:
            while len(well) < len(services) and not self._signals:
                for service in [item for item in waiting if well.issuperset(item.after)]:
                    waiting.remove(service)
                    started[service.name] = time.monotonic()
                    state = self._spawn(service, state)
                for service in [item for item in services if item.name in started.keys() - well]:
                    if self._is_well(client, service, started[service.name]):
                        well.add(service.name)
                        self._say(f"{service.title} is up after {time.monotonic() - begin:.0f} s")
                if time.monotonic() - reminded > REMIND_S:
                    reminded = time.monotonic()
                    missing = [item.title for item in services if item.name not in well]
                    self._say(f"waiting for {', '.join(missing)} ({reminded - begin:.0f} s)")
                time.sleep(TICK_S)
        return state

    def _spawn(self, service: Service, state: State) -> State:
        self._say(f"starting {service.title} on {LOOPBACK}:{service.port}")
        log = self._log(service)
        try:
            process = spawn(service.command, child_environment(service, self._run_id), log)
        except OSError as error:
            raise ServiceError(
                f"{service.title} cannot be started: {error}; run `make` to repair its set-up"
            ) from error
        self._running[service.name] = process
        return self._save(replace(state, processes={**state.processes, service.name: ProcessId.of(process.pid)}))

    def _is_well(self, client: httpx.Client, service: Service, since: float) -> bool:
        self._check_alive(service, "before it was up")
        try:
            if client.get(service.health_url).status_code == httpx.codes.OK:
                return True
        except httpx.TransportError as error:
            reason = type(error).__name__
        else:
            reason = "it answers, but not that it is well"
        if time.monotonic() - since > service.deadline_s:
            raise ServiceError(
                f"{service.title} is not up after {service.deadline_s:.0f} s ({service.health_url}: {reason})"
                f"{self._log_tail(service)}"
            )
        return False

    def _check_alive(self, service: Service, when: str) -> None:
        code = self._running[service.name].poll()
        if code is not None:
            raise ServiceError(f"{service.title} ended with exit code {code} {when}{self._log_tail(service)}")

    def _watch(self, services: Sequence[Service], state: State) -> State:
        while not self._signals:
            for service in services:
                if self._running[service.name].poll() is None:
                    continue
                if not self._may_start_again(service):
                    self._check_alive(service, "while it was in use; the others are stopped")
                state = self._spawn(service, state)
            time.sleep(TICK_S)
        return state

    def _may_start_again(self, service: Service) -> bool:
        """Whether a service that has ended is to be started again: one that may be, and not too often lately."""
        if not service.restarts:
            return False
        now = time.monotonic()
        ends = [at for at in self._ends.get(service.name, []) if now - at < RESTART_WINDOW_S]
        self._ends[service.name] = [*ends, now]
        self._say(f"{service.title} ended with exit code {self._running[service.name].returncode}")
        return len(ends) < RESTARTS

    def _stop(self) -> None:
        """Ends everything: first the flow runs, while worker and server can note their end, then what uses the servers.

        Then the servers, and at last whatever still bears the run's mark.
        """
        if self._running:
            self._say("stopping the services")
        first = [process for name, process in self._running.items() if name in STOP_FIRST]
        rest = [process for name, process in self._running.items() if name not in STOP_FIRST]
        sweep(self._run_id, spare_sessions=[process.pid for process in self._running.values()])
        for wave in (first, rest):
            stop_groups(wave, patience_s=STOP_PATIENCE_S, hurry=lambda: self._signals > 1)
        sweep(self._run_id)
        if self._running:
            self._say("all services have stopped")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _log(self, service: Service) -> Path:
        return self._workspace.logs_dir / f"{service.name}.log"

    def _log_tail(self, service: Service) -> str:
        log = self._log(service)
        return f"; the end of {log}:\n{tail(log)}"


@contextmanager
def hold(lock: Path) -> Iterator[None]:
    """Holds a workspace's lock; the system frees it with the process.

    Raises:
        StateError: another process holds it.
    """
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(
                f"`celloop up` runs for {lock.parent} already; see `celloop status`, stop it with `celloop down`"
            ) from error
        yield


def start_sentinel(run_id: str) -> subprocess.Popen[bytes]:
    """The process that clears up when this one is killed; write "done" to its standard input to dismiss it."""
    command = [sys.executable, "-m", "flows.local.sentinel", run_id]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def check_managed(url: str, token: str, workspace: Workspace) -> None:
    """Asks the Label Studio that we started whether it knows our token.

    Raises:
        ServiceError: it does not.
    """
    try:
        reply = httpx.get(
            f"{url}/api/current-user/whoami", headers={"Authorization": f"Token {token}"}, timeout=30, trust_env=False
        )
    except httpx.TransportError as error:
        raise UnreachableError(f"Label Studio at {url} stopped answering ({type(error).__name__})") from error
    if reply.status_code != httpx.codes.OK:
        raise ServiceError(
            f"Label Studio refuses the token in {workspace.secrets_file} ({reply.status_code}): "
            f"its data were made with another one; restore that file, or delete {workspace.root} for a clean start"
        )


def check_existing(options: UpOptions) -> None:
    """Asks an existing Label Studio whether it takes the given token.

    Raises:
        ServiceError: it does not answer or refuses.
    """
    from loop.adapters.label_studio_api import LabelStudio

    LabelStudio(options.label_studio_url, options.label_studio_token).check()
