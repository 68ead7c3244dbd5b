from pathlib import Path

import pytest

from backend.settings import Settings, is_loopback
from loop.errors import ConfigError

NEEDED = {"CELLOOP_INDEX_URL": "sqlite:////tmp/i.sqlite", "CELLOOP_MODELS_DIR": "/tmp/models"}


def test_reads_the_environment_and_ignores_the_rest():
    settings = Settings.from_environment(
        NEEDED | {"CELLOOP_DISPLAY_ROOT": "/d", "PREFECT_API_URL": "http://p/api", "HOME": "/root"}
    )
    assert settings.index_url == "sqlite:////tmp/i.sqlite"
    assert settings.display_root == Path("/d")
    assert settings.prefect_api_url == "http://p/api"
    assert settings.user == ""


def test_an_empty_variable_is_an_unset_one():
    assert Settings.from_environment(NEEDED | {"CELLOOP_DISPLAY_ROOT": ""}).display_root is None


def test_a_missing_variable_is_named():
    with pytest.raises(ConfigError, match="CELLOOP_INDEX_URL"):
        Settings.from_environment({"CELLOOP_MODELS_DIR": "/tmp/models"})


@pytest.mark.parametrize("name", ["CELLOOP_BACKEND_USER", "CELLOOP_BACKEND_PASSWORD"])
def test_user_and_password_come_together(name):
    with pytest.raises(ConfigError, match="only one of") as caught:
        Settings.from_environment(NEEDED | {name: "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_secrets_are_not_shown():
    settings = Settings.from_environment(
        NEEDED
        | {
            "CELLOOP_LABEL_STUDIO_TOKEN": "tok-1",
            "CELLOOP_BACKEND_USER": "u",
            "CELLOOP_BACKEND_PASSWORD": "pass-1",
            "CELLOOP_WEBHOOK_SECRET": "hook-1",
        }
    )
    as_a_browser_sends_it = "dTpwYXNzLTE="
    assert set(settings.secrets()) == {"tok-1", "pass-1", "hook-1", as_a_browser_sends_it}
    assert not any(secret in repr(settings) for secret in settings.secrets())


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_passwords_in_addresses_are_secrets():
    addresses = {
        "CELLOOP_INDEX_URL": "postgresql+psycopg://celloop:p%40ss@db:5432/celloop",
        "MLFLOW_TRACKING_URI": "http://me:flow-1@mlflow:5000",
        "PREFECT_API_URL": "http://[broken",
    }
    assert Settings.from_environment(NEEDED | addresses).secrets() == ("p%40ss", "p@ss", "flow-1")


def test_a_user_with_a_colon_is_refused():
    with pytest.raises(ConfigError, match="colon"):
        Settings.from_environment(NEEDED | {"CELLOOP_BACKEND_USER": "a:b", "CELLOOP_BACKEND_PASSWORD": "x"})


def test_limits_can_be_set_and_a_wrong_one_is_named():
    assert Settings.from_environment(NEEDED | {"CELLOOP_BACKEND_MAX_IMAGE_PIXELS": "1000"}).max_image_pixels == 1000
    with pytest.raises(ConfigError, match="CELLOOP_BACKEND_CLICKS_PER_S"):
        Settings.from_environment(NEEDED | {"CELLOOP_BACKEND_CLICKS_PER_S": "fast"})
