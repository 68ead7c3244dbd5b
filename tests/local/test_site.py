import importlib
import os
import sys
from pathlib import Path

import pytest
from prefect.server.concurrency.lease_storage import ConcurrencyLeaseStorage

from flows.local.credentials import make_credentials
from flows.local.services import DEFAULT_PORTS, HEALTH_PATHS, TITLES, Service
from flows.local.site import UpOptions, label_studio_program, local_services
from flows.local.workspace import Workspace
from loop.errors import StateError

CREDENTIALS = make_credentials()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "label-studio"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_BIN", str(path))
    return path


@pytest.fixture
def local(program: Path, tmp_path: Path) -> dict[str, Service]:
    made = local_services(Workspace(tmp_path / "ws"), DEFAULT_PORTS, CREDENTIALS, UpOptions())
    return {service.name: service for service in made}


def test_all_five_services_with_their_ports_and_health(local: dict[str, Service]) -> None:
    assert set(local) == set(TITLES) == set(DEFAULT_PORTS)
    assert {name: service.port for name, service in local.items()} == DEFAULT_PORTS
    assert {name: service.health_path for name, service in local.items()} == HEALTH_PATHS


def test_no_secret_on_a_command_line_or_in_a_repr(local: dict[str, Service]) -> None:
    for service in local.values():
        shown = f"{service.command} {dict(service.environment)} {service!r}"
        assert not [secret for secret in CREDENTIALS.secrets() if secret in shown]


def test_everything_listens_on_loopback_only(local: dict[str, Service]) -> None:
    for service in local.values():
        words = {*service.command, *service.environment.values()}
        assert "0.0.0.0" not in words
        assert [word for word in words if "127.0.0.1" in word]
    assert local["worker"].environment["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"
    assert local["label_studio"].command[-4:] == ("--internal-host", "127.0.0.1", "--port", "8080")


@pytest.mark.parametrize("name", ["label_studio", "mlflow", "prefect"])
def test_the_servers_have_no_way_out(local: dict[str, Service], name: str) -> None:
    environment = local[name].environment
    assert environment["HTTP_PROXY"] == environment["HTTPS_PROXY"] == "http://127.0.0.1:9"
    assert "127.0.0.1" in environment["NO_PROXY"].split(",")


def test_all_state_lies_in_the_workspace(local: dict[str, Service], tmp_path: Path) -> None:
    root = str(tmp_path / "ws")
    assert local["label_studio"].environment["LABEL_STUDIO_BASE_DATA_DIR"].startswith(root)
    assert f"sqlite:///{root}/mlflow/mlflow.db" in local["mlflow"].command
    assert local["prefect"].environment["PREFECT_HOME"] == local["worker"].environment["PREFECT_HOME"]
    assert local["backend"].secrets["CELLOOP_INDEX_URL"] == f"sqlite:///{root}/index.sqlite3"


def test_the_lease_of_a_flow_run_outlives_the_server(local: dict[str, Service]) -> None:
    module = importlib.import_module(local["prefect"].environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"])
    assert issubclass(module.ConcurrencyLeaseStorage, ConcurrencyLeaseStorage)
    assert module.__name__.endswith(".filesystem")


def test_an_existing_label_studio_is_used_instead(tmp_path: Path) -> None:
    options = UpOptions(label_studio_url="https://labels.example.org/", label_studio_token="t")
    made = local_services(Workspace(tmp_path), DEFAULT_PORTS, CREDENTIALS, options)
    assert {service.name for service in made} == {"mlflow", "prefect", "worker", "backend"}
    for service in made:
        if service.name in ("worker", "backend"):
            assert service.environment["CELLOOP_LABEL_STUDIO_URL"] == "https://labels.example.org"
            assert service.secrets["CELLOOP_LABEL_STUDIO_TOKEN"] == CREDENTIALS.external_token


def test_label_studio_is_found_by_name_or_beside_the_application(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert label_studio_program() == program
    monkeypatch.delenv("CELLOOP_LABEL_STUDIO_BIN")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    beside = tmp_path / ".venv-labelstudio/bin/label-studio"
    beside.parent.mkdir(parents=True)
    os.link(program, beside)
    assert label_studio_program() == beside


def test_a_missing_label_studio_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_BIN", "/no/such/label-studio")
    with pytest.raises(StateError, match=r"not installed at /no/such/label-studio; run `make`"):
        label_studio_program()
