"""`celloop up` with the real Label Studio, MLflow, Prefect and backend: one workspace through its whole life."""

import os
import re
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from flows.annotator import label_tasks
from flows.local.doctor import Check, examine
from flows.local.launch import run_here, start_in_background, stop
from flows.local.processes import marked
from flows.local.services import TITLES
from flows.local.site import UpOptions
from flows.local.state import State
from flows.local.status import read_status
from flows.local.workspace import Workspace
from flows.round import run_round
from loop.adapters.label_studio_api import LabelStudio
from loop.adapters.label_studio_http import Connection
from loop.errors import ConfigError, RefusedError, StateError
from stack import make_project

pytestmark = pytest.mark.services

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@dataclass
class Watcher:
    """Notes where the processes of a workspace connect to, from before they start."""

    workspace: Workspace
    seen: set[str] = field(default_factory=set)
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.ended.wait(0.5):
            state = self.workspace.state()
            for process in marked(state.run_id) if state else []:
                try:
                    self.seen.update(item.raddr.ip for item in process.net_connections("inet") if item.raddr)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue


@dataclass
class Local:
    """A running workspace, what was said while it started, and the home of its services."""

    workspace: Workspace
    said: list[str]
    watcher: Watcher
    home: Path

    @property
    def state(self) -> State:
        state = self.workspace.state()
        assert state is not None
        return state


def quiet(text: str) -> None:
    """Hears nothing."""


def until(check: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    home = tmp_path_factory.mktemp("home")
    workspace = Workspace(tmp_path_factory.mktemp("local") / "ws")
    watcher = Watcher(workspace)
    thread = threading.Thread(target=watcher.watch, daemon=True)
    thread.start()
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        try:
            start_in_background(workspace, UpOptions(), said.append)
            yield Local(workspace, said, watcher, home)
        finally:
            watcher.ended.set()
            thread.join()
            stop(workspace, quiet)


def test_everything_is_well_and_it_was_said_what_was_waited_for(local: Local) -> None:
    status = read_status(local.workspace)
    assert status.healthy
    assert {service.title for service in status.services} == set(TITLES.values())
    assert all((service.memory_mb or 0) > 20 for service in status.services)
    for title in TITLES.values():
        assert [line for line in local.said if re.match(rf"{title} is up after \d+ s", line)]


def test_a_person_and_a_program_can_log_in(local: Local) -> None:
    endpoints = local.workspace.endpoints()
    info = LabelStudio(endpoints.label_studio_url, endpoints.label_studio_token).check()
    assert (info.version, info.email) == ("1.23.2", endpoints.label_studio_email)
    with httpx.Client(base_url=endpoints.label_studio_url, trust_env=False) as browser:
        browser.get("/user/login/")
        form = {
            "email": endpoints.label_studio_email,
            "password": endpoints.label_studio_password,
            "csrfmiddlewaretoken": browser.cookies["csrftoken"],
        }
        assert browser.post("/user/login/", data=form).status_code == 302
        assert browser.get("/api/current-user/whoami").json()["email"] == endpoints.label_studio_email


def test_nobody_else_can_sign_up(local: Local) -> None:
    with httpx.Client(base_url=local.workspace.endpoints().label_studio_url, trust_env=False) as browser:
        browser.get("/user/signup/")
        form = {"email": "x@example.com", "password": "12345678", "csrfmiddlewaretoken": browser.cookies["csrftoken"]}
        assert browser.post("/user/signup/", data=form).status_code == 403


def test_the_worker_waits_for_flow_runs_in_its_pool(local: Local) -> None:
    api = local.workspace.endpoints().prefect_api_url
    pool = httpx.get(f"{api}/work_pools/celloop", trust_env=False).json()
    assert (pool["type"], pool["status"]) == ("process", "READY")


def test_everything_listens_on_loopback_only(local: Local) -> None:
    listening = {
        (item.laddr.ip, item.laddr.port)
        for process in marked(local.state.run_id)
        for item in process.net_connections("inet")
        if item.status == psutil.CONN_LISTEN
    }
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert {port for _, port in listening} >= set(local.state.ports.values())


def test_secrets_are_in_one_private_file_only(local: Local) -> None:
    credentials = local.workspace.credentials()
    assert credentials is not None
    assert stat.S_IMODE(local.workspace.secrets_file.stat().st_mode) == 0o600
    shown = " ".join(" ".join(process.cmdline()) for process in marked(local.state.run_id))
    shown += " ".join(log.read_text(errors="replace") for log in local.workspace.logs_dir.iterdir())
    shown += local.workspace.state_file.read_text() + " ".join(local.said)
    assert not [secret for secret in credentials.secrets() if secret in shown]


def test_telemetry_is_off_in_every_process(local: Local) -> None:
    environments = {
        name: identity.process().environ()  # type: ignore[union-attr]
        for name, identity in local.state.processes.items()
    }
    assert environments["label_studio"]["LABEL_STUDIO_COLLECT_ANALYTICS"] == "false"
    assert environments["label_studio"]["LABEL_STUDIO_SENTRY_DSN"] == ""
    assert environments["label_studio"]["LABEL_STUDIO_FRONTEND_SENTRY_DSN"] == ""
    assert environments["label_studio"]["LABEL_STUDIO_LATEST_VERSION_CHECK"] == "false"
    for name in ("mlflow", "worker", "backend"):
        assert environments[name]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    for name in ("prefect", "worker", "backend"):
        assert environments[name]["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert all(environment["DO_NOT_TRACK"] == "1" for environment in environments.values())


def test_a_second_up_finds_the_first(local: Local) -> None:
    said: list[str] = []
    found: list[State] = []
    run_here(local.workspace, UpOptions(), said.append, found.append)
    assert found == [local.state]
    assert f"process {local.state.supervisor.pid}" in said[0]


def test_a_taken_port_is_named(local: Local, tmp_path: Path) -> None:
    port = local.state.ports["mlflow"]
    with pytest.raises(ConfigError, match=rf"port {port} for MLflow is taken by python.*--mlflow-port"):
        run_here(Workspace(tmp_path / "other"), UpOptions(ports={"mlflow": port}), quiet, lambda state: None)


def test_a_wrong_token_for_an_existing_label_studio_is_refused(local: Local, tmp_path: Path) -> None:
    options = UpOptions(label_studio_url=local.state.urls["label_studio"], label_studio_token="0" * 40)
    with pytest.raises(RefusedError, match="401"):
        run_here(Workspace(tmp_path / "other"), options, quiet, lambda state: None)


def test_an_existing_label_studio_is_used(local: Local, tmp_path: Path) -> None:
    first = local.workspace.endpoints()
    other = Workspace(tmp_path / "other")
    options = UpOptions(label_studio_url=first.label_studio_url, label_studio_token=first.label_studio_token)
    try:
        state = start_in_background(other, options, quiet)
        assert set(state.processes) == {"mlflow", "prefect", "worker", "backend"}
        assert not set(state.ports.values()) & set(local.state.ports.values())
        endpoints = other.endpoints()
        assert endpoints.label_studio_url == first.label_studio_url
        assert endpoints.label_studio_token == first.label_studio_token
        assert not endpoints.label_studio_managed
        status = read_status(other)
        assert status.healthy
        assert next(item for item in status.services if item.name == "label_studio").pid is None
    finally:
        stop(other, quiet)
    assert marked(state.run_id) == []
    assert read_status(local.workspace).healthy


def test_the_doctor_finds_no_fault_in_what_runs(local: Local) -> None:
    checks = list(examine(local.workspace))
    faults = [check for check in checks if check.outcome == "fault" and check.name != "versions"]
    assert faults == []
    of_a_project = {"project", "webhooks", "storage", "addresses", "queue", "image", "prediction", "click"}
    assert {check.name for check in checks if check.outcome == "skipped"} == of_a_project
    assert next(check for check in checks if check.name == "token").detail.startswith("Label Studio 1.23.2 knows it")


def test_the_doctor_follows_a_project_from_image_to_click(local: Local, tmp_path: Path) -> None:
    def found() -> dict[str, Check]:
        return {check.name: check for check in examine(local.workspace, "doctor-test")}

    drawn = make_project(local.workspace, tmp_path, "doctor-test", n=8)
    number, endpoints = drawn.context.project.ls_project_id, local.workspace.endpoints()
    connection = Connection(endpoints.label_studio_url, endpoints.label_studio_token)
    for hook in connection.get("/api/webhooks/", project=number):
        connection.send("DELETE", f"/api/webhooks/{hook['id']}/")
    assert found()["project doctor-test"].detail.startswith("project doctor-test has no webhook to http://127.0.0.1:")
    hook_url = f"{endpoints.backend_url}/webhook"
    drawn.context.label_studio.connect_webhook(number, hook_url, endpoints.webhook_secret)
    first = found()
    assert (first["project doctor-test"].outcome, first["image"].outcome) == ("ok", "ok")
    assert (first["prediction"].outcome, first["click"].outcome) == ("skipped", "skipped")
    run_round(drawn.context)
    label_tasks(drawn.context, drawn.labels, 6)
    run_round(drawn.context)
    until(lambda: found()["prediction"].outcome == "ok", "the backend takes the first model")
    second = found()
    assert re.fullmatch(r"\d+ cells by celloop-doctor-test-v1-r1", second["prediction"].detail)
    assert second["click"].outcome == "ok", second["click"]
    for backend in connection.get("/api/ml/", project=number):
        connection.send("DELETE", f"/api/ml/{backend['id']}")
    third = found()["project doctor-test"]
    assert third.detail.startswith("project doctor-test has no backend")
    assert "celloop init" in third.cure


def test_the_doctor_names_a_project_that_is_not_there(local: Local) -> None:
    checks = {check.name: check for check in examine(local.workspace, "nobody")}
    assert checks["project"].outcome == "fault"
    assert "nobody" in checks["project"].detail


def test_tips_from_the_web_are_not_fetched(local: Local) -> None:
    assert httpx.get(f"{local.state.urls['label_studio']}/heidi-tips", trust_env=False).status_code == 404


def test_a_backend_that_is_killed_comes_back_by_itself(local: Local) -> None:
    before = local.state.processes["backend"].pid
    os.kill(before, signal.SIGKILL)
    until(lambda: local.state.processes["backend"].pid != before, "it is started again")
    until(lambda: read_status(local.workspace).healthy, "all are well again")


def test_a_crash_of_a_server_stops_all(local: Local) -> None:
    before = local.state
    os.kill(before.processes["mlflow"].pid, signal.SIGKILL)
    until(lambda: not before.is_running(), "the supervisor ends")
    assert marked(before.run_id) == []
    with pytest.raises(StateError, match="nothing runs"):
        local.workspace.endpoints()
    log = (local.workspace.logs_dir / "supervisor.log").read_text()
    assert "MLflow ended with exit code -9 while it was in use" in log


def test_the_second_start_has_the_same_addresses_and_secrets(local: Local) -> None:
    before, credentials = local.state, local.workspace.credentials()
    state = start_in_background(local.workspace, UpOptions(), quiet)
    assert state.run_id != before.run_id
    assert state.urls == before.urls
    assert local.workspace.credentials() == credentials
    endpoints = local.workspace.endpoints()
    assert LabelStudio(endpoints.label_studio_url, endpoints.label_studio_token).check().version == "1.23.2"


def test_sudden_death_of_the_supervisor_leaves_no_process(local: Local) -> None:
    before = local.state
    assert len(marked(before.run_id)) >= len(before.processes)
    os.kill(before.supervisor.pid, signal.SIGKILL)
    until(lambda: marked(before.run_id) == [], "the sentinel clears up")


def test_nothing_connected_outside_and_nothing_was_written_outside(local: Local) -> None:
    assert local.watcher.seen
    assert local.watcher.seen <= LOOPBACK
    assert [str(path.relative_to(local.home)) for path in local.home.rglob("*") if path.is_file()] == []
