import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from flows.local.credentials import load_credentials, make_credentials, save_credentials
from flows.local.processes import ProcessId
from flows.local.state import State, load_state, save_state
from flows.local.workspace import ENVIRONMENT, Workspace
from loop.errors import StateError

URLS = {
    "label_studio": "http://127.0.0.1:1",
    "mlflow": "http://127.0.0.1:2",
    "prefect": "http://127.0.0.1:3",
    "backend": "http://127.0.0.1:4",
}


@pytest.fixture(autouse=True)
def _no_containers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENVIRONMENT, "CELLOOP_WORKSPACE", "CELLOOP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "ws")
    made.prepare()
    return made


def state_of(pid: int, **changes: object) -> State:
    state = State("run", ProcessId.of(pid), True, "2026-01-01T00:00:00+00:00", {"backend": 4}, URLS)
    return replace(state, **changes)


def test_the_root_is_absolute_and_closed_to_others(workspace: Workspace) -> None:
    assert workspace.root.is_absolute()
    assert stat.S_IMODE(workspace.root.stat().st_mode) == 0o700
    assert (workspace.root / ".gitignore").read_text() == "*\n"
    assert workspace.display_dir.is_dir()


def test_the_default_root_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Workspace().root == tmp_path / ".celloop"
    monkeypatch.setenv("CELLOOP_WORKSPACE", str(tmp_path / "other"))
    assert Workspace().root == tmp_path / "other"


def test_a_file_cannot_be_a_workspace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"cannot use .*file as workspace: .*--workspace"):
        Workspace(tmp_path / "file").prepare()


def test_the_index_may_be_elsewhere(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace.index_url == f"sqlite:///{workspace.root}/index.sqlite3"
    monkeypatch.setenv("CELLOOP_INDEX_URL", "postgresql+psycopg://host/db")
    assert workspace.index_url == "postgresql+psycopg://host/db"


def test_credentials_survive_and_are_private(workspace: Workspace) -> None:
    made = make_credentials()
    save_credentials(workspace.secrets_file, made)
    assert load_credentials(workspace.secrets_file) == made
    assert stat.S_IMODE(workspace.secrets_file.stat().st_mode) == 0o600
    assert not [secret for secret in made.secrets() if secret in repr(made)]


def test_credentials_are_new_each_time_and_as_label_studio_wants_them() -> None:
    first, second = make_credentials(), make_credentials()
    assert not set(first.secrets()) & set(second.secrets())
    assert len(first.label_studio_token) == 40
    assert int(first.label_studio_token, 16) > 0
    assert len(first.label_studio_password) >= 12


def test_private_even_over_an_open_file(workspace: Workspace) -> None:
    workspace.secrets_file.with_suffix(".tmp").touch(0o666)
    save_credentials(workspace.secrets_file, make_credentials())
    assert stat.S_IMODE(workspace.secrets_file.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "{", "[]", '{"label_studio_email": "a"}'])
def test_unreadable_secrets_and_state_are_named(workspace: Workspace, text: str) -> None:
    workspace.secrets_file.write_text(text)
    with pytest.raises(StateError, match=r"secrets.json cannot be read"):
        workspace.credentials()
    workspace.state_file.write_text(text)
    with pytest.raises(StateError, match=r"state.json cannot be read"):
        workspace.state()


def test_a_full_disk_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StateError, match="No space left on device"):
        save_credentials(workspace.secrets_file, make_credentials())
    with pytest.raises(StateError, match="No space left on device"):
        save_state(workspace.state_file, state_of(os.getpid()))


def test_state_survives(workspace: Workspace) -> None:
    state = state_of(os.getpid(), processes={"backend": ProcessId.of(os.getpid())})
    save_state(workspace.state_file, state)
    assert load_state(workspace.state_file) == state
    assert state.is_running()


def test_no_state_before_the_first_up(workspace: Workspace) -> None:
    assert workspace.state() is None
    assert workspace.credentials() is None
    with pytest.raises(StateError, match=r"nothing runs in .*celloop up"):
        workspace.endpoints()


def test_endpoints_of_a_running_workspace(workspace: Workspace) -> None:
    credentials = replace(make_credentials(), external_token="of another server")
    save_credentials(workspace.secrets_file, credentials)
    save_state(workspace.state_file, state_of(os.getpid()))
    endpoints = workspace.endpoints()
    assert endpoints.label_studio_url == "http://127.0.0.1:1"
    assert endpoints.label_studio_token == credentials.label_studio_token
    assert endpoints.prefect_api_url == "http://127.0.0.1:3/api"
    assert endpoints.webhook_secret == credentials.webhook_secret
    assert not [secret for secret in credentials.secrets() if secret in repr(endpoints)]


def test_endpoints_of_a_label_studio_that_is_not_ours(workspace: Workspace) -> None:
    save_credentials(workspace.secrets_file, replace(make_credentials(), external_token="of another server"))
    save_state(workspace.state_file, state_of(os.getpid(), label_studio_managed=False))
    endpoints = workspace.endpoints()
    assert (endpoints.label_studio_token, endpoints.label_studio_managed) == ("of another server", False)
    assert (endpoints.label_studio_email, endpoints.label_studio_password) == ("", "")


def test_no_endpoints_while_starting_nor_after_the_end(workspace: Workspace) -> None:
    save_credentials(workspace.secrets_file, make_credentials())
    save_state(workspace.state_file, state_of(os.getpid(), ready=False))
    with pytest.raises(StateError, match="still starting"):
        workspace.endpoints()
    another = ProcessId(os.getpid(), 1.0)
    save_state(workspace.state_file, state_of(os.getpid(), supervisor=another))
    with pytest.raises(StateError, match="nothing runs"):
        workspace.endpoints()


def test_endpoints_from_the_environment_where_nothing_runs_here(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, f"http://{name.lower()}")
    assert workspace.endpoints().mlflow_url == "http://mlflow_tracking_uri"
    monkeypatch.delenv("PREFECT_API_URL")
    with pytest.raises(StateError, match="nothing runs"):
        workspace.endpoints()
