"""docker-compose.yml runs what `celloop up` runs, with other addresses."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.local import services
from flows.local.services import DEFAULT_PORTS, Service, Site
from flows.local.workspace import ENVIRONMENT, endpoints_from_environment

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
URLS = {
    "label_studio": "http://label-studio:8080",
    "mlflow": "http://mlflow:5000",
    "prefect": "http://prefect:4200",
    "backend": "http://backend.internal:9090",
}
SITE = Site(host="0.0.0.0", root=Path("/workspace"), ports=DEFAULT_PORTS, urls=URLS, python="python")
USER = dict.fromkeys(("LABEL_STUDIO_USERNAME", "LABEL_STUDIO_PASSWORD", "LABEL_STUDIO_USER_TOKEN"), "")
OWN = dict.fromkeys(("CELLOOP_INDEX_URL", "CELLOOP_LABEL_STUDIO_TOKEN", "CELLOOP_WEBHOOK_SECRET"), "")
EXPECTED: dict[str, Service] = {
    "label-studio": services.label_studio(SITE, USER),
    "mlflow": services.mlflow(SITE),
    "prefect": services.prefect(SITE),
    "worker": services.worker(SITE, OWN),
    "worker-gpu": services.worker(SITE, OWN, pool="celloop-train"),
    "backend": services.backend(SITE, OWN),
}
# what only containers need: PostgreSQL, a password where a service is reachable from others, a place for weights
OF_CONTAINERS = {
    *("DJANGO_DB", "POSTGRE_HOST", "POSTGRE_PORT", "POSTGRE_NAME", "POSTGRE_USER", "POSTGRE_PASSWORD"),
    *("CELLOOP_BACKEND_USER", "CELLOOP_BACKEND_PASSWORD", "CELLOOP_LABEL_STUDIO_MANAGED", "CELLOOP_HOME"),
}
SECRETS = {"POSTGRE_PASSWORD", "POSTGRES_PASSWORD", "CELLOOP_BACKEND_PASSWORD", *USER, *OWN}


def test_compose_has_the_services_of_up_and_postgres() -> None:
    assert set(COMPOSE["services"]) == {*EXPECTED, "postgres"}


@pytest.mark.parametrize("name", EXPECTED)
def test_command_is_that_of_up(name: str) -> None:
    assert tuple(COMPOSE["services"][name]["command"]) == EXPECTED[name].command


@pytest.mark.parametrize("name", EXPECTED)
def test_environment_is_that_of_up(name: str) -> None:
    given = COMPOSE["services"][name]["environment"]
    service = EXPECTED[name]
    assert {key: given.get(key) for key in service.environment} == dict(service.environment)
    assert set(given) - OF_CONTAINERS == {*service.environment, *service.secrets}


def test_leases_of_flow_runs_lie_on_the_volume() -> None:
    prefect = COMPOSE["services"]["prefect"]
    assert prefect["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith(".filesystem")
    assert prefect["environment"]["PREFECT_HOME"].startswith(prefect["volumes"][0].partition(":")[2])


@pytest.mark.parametrize("name", EXPECTED)
def test_health_check_asks_where_up_asks(name: str) -> None:
    assert COMPOSE["services"][name]["healthcheck"]["test"] == ["CMD", "healthy", EXPECTED[name].health_url]


def test_ports_are_the_usual_ones_on_loopback_only() -> None:
    published = {name: item.get("ports", []) for name, item in COMPOSE["services"].items()}
    assert published == {
        "postgres": [],
        "label-studio": ["127.0.0.1:8080:8080"],
        "mlflow": ["127.0.0.1:5000:5000"],
        "prefect": ["127.0.0.1:4200:4200"],
        "worker": [],
        "worker-gpu": [],
        "backend": ["127.0.0.1:9090:9090"],
    }


def test_every_secret_comes_from_the_environment_and_is_required() -> None:
    for name, item in COMPOSE["services"].items():
        for key, value in item["environment"].items():
            if key in SECRETS:
                assert ":?set " in value, f"{name}: {key} must be ${{NAME:?...}}"


def test_waiting_order_is_that_of_up() -> None:
    for name, service in EXPECTED.items():
        waits = COMPOSE["services"][name].get("depends_on", {})
        assert set(service.after) <= set(waits)
        assert all(rule == {"condition": "service_healthy"} for rule in waits.values())


def test_volumes_are_named_and_shared() -> None:
    assert set(COMPOSE["volumes"]) == {"workspace", "postgres"}
    for name in EXPECTED:
        assert "workspace:/workspace" in COMPOSE["services"][name]["volumes"]


def test_what_reads_originals_sees_the_same_folder_read_only() -> None:
    seen = {
        name for name in EXPECTED if "${CELLOOP_IMAGES:-./images}:/images:ro" in COMPOSE["services"][name]["volumes"]
    }
    assert seen == {"worker", "worker-gpu"}
    assert {len(COMPOSE["services"][name]["volumes"]) for name in EXPECTED} == {1, 2}


def test_images_are_built_from_the_committed_locks() -> None:
    for name in EXPECTED:
        build = COMPOSE["services"][name]["build"]
        text = (ROOT / build["dockerfile"]).read_text(encoding="utf-8")
        wanted = "labelstudio" if name == "label-studio" else "app"
        assert f"requirements/install.py {wanted}" in text
        assert build.get("args", {}).get("TORCH") == {"label-studio": None, "worker-gpu": "gpu"}.get(name, "cpu")


def test_gpu_worker_asks_for_a_gpu() -> None:
    devices = COMPOSE["services"]["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_flows_in_a_container_find_the_services_by_their_environment() -> None:
    environment = COMPOSE["services"]["worker"]["environment"]
    assert all(environment.get(name) for name in ENVIRONMENT)
    endpoints = endpoints_from_environment(environment)
    assert (endpoints.label_studio_url, endpoints.mlflow_url) == (URLS["label_studio"], URLS["mlflow"])
    assert (endpoints.prefect_api_url, endpoints.backend_url) == ("http://prefect:4200/api", URLS["backend"])
    assert endpoints.label_studio_managed
    assert endpoints.backend_user == "celloop"


def test_the_backend_has_an_address_with_a_dot_which_label_studio_wants() -> None:
    assert COMPOSE["services"]["backend"]["networks"]["default"]["aliases"] == ["backend.internal"]
    assert COMPOSE["x-loop-environment"]["CELLOOP_BACKEND_URL"] == URLS["backend"]
