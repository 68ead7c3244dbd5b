"""The command line's way to its own services, past a person's proxy and past a person's Prefect."""

import os
import urllib.request
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_HOME, get_current_settings

from flows.cli.main import spare_loopback
from flows.local.workspace import Endpoints
from flows.prefect_api import connected
from loop.errors import UnreachableError

PROFILE = """
active = "work"
[profiles.work]
PREFECT_API_URL = "https://api.prefect.example.org/api/accounts/1/workspaces/2"
PREFECT_API_KEY = "pnu_of_the_company"
PREFECT_CLIENT_MAX_RETRIES = 77
"""


def endpoints(home: Path) -> Endpoints:
    return Endpoints(
        label_studio_url="http://127.0.0.1:1",
        label_studio_token="t",
        label_studio_email="",
        label_studio_password="",
        mlflow_url="http://127.0.0.1:2",
        prefect_api_url="http://127.0.0.1:3/api",
        backend_url="http://127.0.0.1:4",
        prefect_home=str(home),
    )


def test_a_persons_own_prefect_profile_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "profiles.toml").write_text(PROFILE)
    monkeypatch.setenv("PREFECT_HOME", str(own))
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_of_the_environment")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:secret")
    before = get_current_settings()
    with connected(endpoints(tmp_path / "ws")):
        settings = get_current_settings()
        assert (settings.api.url, settings.api.key, settings.api.auth_string) == ("http://127.0.0.1:3/api", None, None)
        assert settings.client.max_retries != 77
        assert PREFECT_HOME.value() == settings.home == tmp_path / "ws"
        assert "pnu" not in str(settings.to_environment_variables(exclude_unset=True, include_secrets=True))
    assert os.environ["PREFECT_HOME"] == str(own)
    assert get_current_settings() == before


def test_no_answer_is_named_and_the_settings_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    with (
        pytest.raises(UnreachableError, match=r"Prefect at http://127\.0\.0\.1:3/api gives no answer \(refused\)"),
        connected(endpoints(tmp_path)),
    ):
        raise httpx.ConnectError("refused")
    assert "PREFECT_HOME" not in os.environ


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "intra.example.org, localhost"}, "intra.example.org,localhost,127.0.0.1,::1"),
        ({"no_proxy": "a", "NO_PROXY": "b,a"}, "b,a,127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_this_machine_is_added_to_the_hosts_without_a_proxy(given: dict[str, str], expected: str) -> None:
    environ = dict(given)
    spare_loopback(environ)
    assert environ == {"NO_PROXY": expected, "no_proxy": expected}


def test_a_proxy_of_the_person_is_passed_by_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "intra.example.org")
    assert not urllib.request.proxy_bypass_environment("127.0.0.1:4200")
    spare_loopback(os.environ)
    assert urllib.request.proxy_bypass_environment("127.0.0.1:4200")
    assert urllib.request.proxy_bypass_environment("intra.example.org")
    assert not urllib.request.proxy_bypass_environment("example.org")
