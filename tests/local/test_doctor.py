import json
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from flows.local import doctor, versions
from flows.local.credentials import make_credentials, save_credentials
from flows.local.doctor import Check, examine
from flows.local.processes import ProcessId
from flows.local.state import State, save_state
from flows.local.versions import label_studio_versions, read_lock, wrong_versions
from flows.local.workspace import ENVIRONMENT, Workspace
from loop.errors import StateError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    made = Workspace(tmp_path / "ws")
    made.prepare()
    save_credentials(made.secrets_file, make_credentials())
    return made


def checks(workspace: Workspace) -> dict[str, Check]:
    return {check.name: check for check in examine(workspace)}


def test_what_cannot_be_looked_at_is_skipped_with_the_reason(workspace: Workspace) -> None:
    found = checks(workspace)
    for name in ("services", "token", "project", "image", "prediction", "click"):
        assert (found[name].outcome, found[name].cure) == ("skipped", "")
        assert "celloop up" in found[name].detail
    assert found["workspace"].outcome == "ok"
    assert json.loads(json.dumps(found["workspace"].document()))["name"] == "workspace"


def test_a_package_of_another_version_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "app.lock"
    lock.write_text("# pins\nPyYAML==0.0.1\nno-such_package==1\nnumpy==2.2.6\n")
    right, wrong = wrong_versions(lock)
    assert right == 1
    assert len(wrong) == 2
    assert wrong[0].startswith("pyyaml 6")
    assert wrong[1] == "no-such-package missing instead of 1"


def test_without_a_lock_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert read_lock(tmp_path / "none") == {}
    assert wrong_versions(tmp_path / "none") == (0, [])


def test_wrong_versions_are_a_fault_with_its_cure(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "wrong_versions", lambda: (3, ["a 1 instead of 2"]))
    monkeypatch.setattr(doctor, "label_studio_versions", lambda: ("1.0", "1.23.2"))
    found = checks(workspace)
    assert found["versions"].outcome == "fault"
    assert found["versions"].cure == "run `make` to repair it"
    assert found["Label Studio's set-up"].detail == "Label Studio 1.0 is installed, 1.23.2 is locked"


def test_a_missing_label_studio_is_a_fault_with_its_cure(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_BIN", "/no/such/program")
    found = checks(workspace)["Label Studio's set-up"]
    assert (found.outcome, found.detail) == ("fault", "Label Studio is not installed at /no/such/program")
    assert found.cure.startswith("run `make`")


def test_a_broken_label_studio_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "label-studio"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_BIN", str(program))
    with pytest.raises(StateError, match="is broken"):
        label_studio_versions()


def test_label_studios_version_is_that_of_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("label-studio", ""), ("python", "#!/bin/sh\necho 1.23.2\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_BIN", str(tmp_path / "label-studio"))
    assert label_studio_versions(versions.LOCKS / "labelstudio.lock") == ("1.23.2", "1.23.2")


def test_secrets_that_others_can_read_are_a_fault(workspace: Workspace) -> None:
    workspace.secrets_file.chmod(0o644)
    found = checks(workspace)["workspace"]
    assert found.outcome == "fault"
    assert found.cure == f"chmod 600 {workspace.secrets_file}"


def test_a_full_disk_is_a_fault(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 10**6))
    assert checks(workspace)["workspace"].outcome == "fault"


def test_a_port_that_somebody_took_meanwhile_is_a_fault(workspace: Workspace) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        gone = ProcessId(os.getpid(), 1.0)
        save_state(workspace.state_file, State("run", gone, False, "", {"backend": port}, {}))
        found = checks(workspace)["ports"]
    assert found.outcome == "fault"
    assert f"{port} (backend) by" in found.detail
    assert "celloop init" in found.cure


def test_services_that_do_not_answer_are_faults(workspace: Workspace) -> None:
    me = ProcessId.of(os.getpid())
    ports = dict.fromkeys(("label_studio", "mlflow", "prefect", "backend", "worker"), 9)
    urls = dict.fromkeys(("label_studio", "mlflow", "prefect", "backend"), "http://127.0.0.1:9")
    save_state(workspace.state_file, State("run", me, True, "", ports, urls, {"mlflow": me}))
    found = checks(workspace)
    assert found["MLflow"].detail == "http://127.0.0.1:9: no answer (ConnectError)"
    assert found["backend"].detail == "http://127.0.0.1:9: not started yet"
    assert "mlflow.log" in found["MLflow"].cure
    assert found["token"].outcome == "fault"
    assert found["project"].outcome == "skipped"
