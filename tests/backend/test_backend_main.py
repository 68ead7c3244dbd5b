"""The backend as a process: starts by its environment, answers, ends on SIGTERM."""

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


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_public_address_without_a_password_is_warned_of(tmp_path, monkeypatch, caplog, host, warned):
    for name, value in _environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr("uvicorn.run", lambda app, **given: started.append(given))
    assert main(["--host", host, "--port", "1"]) == 0
    assert (started[0]["host"], started[0]["port"]) == (host, 1)
    assert ("asks for no password" in caplog.text) is warned


@pytest.mark.parametrize("missing", ["CELLOOP_INDEX_URL", "CELLOOP_MODELS_DIR", "MLFLOW_TRACKING_URI"])
def test_a_missing_setting_is_named_and_exits_with_2(tmp_path, monkeypatch, caplog, missing):
    for name, value in _environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert main([]) == 2
    assert missing in caplog.text
