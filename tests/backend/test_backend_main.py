"""The backend as a process: starts by its environment, answers, ends on SIGTERM."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from backend.__main__ import main


def _environment(tmp_path, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELLOOP_", "MLFLOW_"))}
    needed = {
        "CELLOOP_INDEX_URL": f"sqlite:///{tmp_path / 'index.sqlite'}",
        "CELLOOP_MODELS_DIR": str(tmp_path / "models"),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
    }
    return kept | needed | more


def test_a_process_answers_and_ends_on_sigterm_with_mlflow_away(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "backend", "--port", str(port)],
        env=_environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            limit = time.monotonic() + 60
            while True:
                try:
                    reply = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                    break
                except httpx.HTTPError:
                    assert time.monotonic() < limit
                    assert process.poll() is None
                    time.sleep(0.1)
            assert reply.json() == {"status": "UP"}
            assert "server" not in reply.headers
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in log


PASSWORD = {"CELLOOP_BACKEND_USER": "celloop", "CELLOOP_BACKEND_PASSWORD": "pass-1"}


@pytest.mark.parametrize(
    ("arguments", "environment", "code"),
    [
        (["--host", "0.0.0.0"], {}, 2),
        (["--host", "::"], {}, 2),
        (["--host", ""], {}, 2),
        (["--host", "192.168.1.5"], {}, 2),
        (["--host", "0.0.0.0"], PASSWORD, 0),
        (["--host", "0.0.0.0", "--no-password"], {}, 0),
        (["--host", "127.0.0.1"], {}, 0),
        (["--host", "localhost"], {}, 0),
        (["--host", "::1"], {}, 0),
        ([], {}, 0),
    ],
)
def test_an_address_that_others_reach_needs_a_password(tmp_path, monkeypatch, caplog, arguments, environment, code):
    for name, value in _environment(tmp_path, **environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])
    monkeypatch.setattr(caplog.handler, "formatter", caplog.handler.formatter)
    started = []
    monkeypatch.setattr("uvicorn.run", lambda app, **given: started.append(given))
    assert main([*arguments, "--port", "1"]) == code
    assert len(started) == (code == 0)
    assert ("set CELLOOP_BACKEND_USER and CELLOOP_BACKEND_PASSWORD" in caplog.text) is (code == 2)


def test_a_process_without_a_password_does_not_listen_to_others(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "backend", "--host", "0.0.0.0", "--port", "0"],
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "CELLOOP_BACKEND_PASSWORD" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("missing", ["CELLOOP_INDEX_URL", "CELLOOP_MODELS_DIR", "MLFLOW_TRACKING_URI"])
def test_a_missing_setting_is_named_and_exits_with_2(tmp_path, monkeypatch, caplog, missing):
    for name, value in _environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert main([]) == 2
    assert missing in caplog.text
