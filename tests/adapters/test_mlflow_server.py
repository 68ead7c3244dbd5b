"""What the connection makes of answers that a real MLflow seldom gives; the rest is in tests/services."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loop.adapters.mlflow_registry import Registry
from loop.adapters.mlflow_server import CLIENT_ENVIRONMENT, PROBE_S
from loop.errors import ConfigError, RefusedError, UnreachableError


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in CLIENT_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def stub():
    """A server that answers /health and everything else with the status and text that a test gives it."""

    answers = {"health": (200, "OK"), "rest": (200, "{}")}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            status, text = answers["health" if self.path == "/health" else "rest"]
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield answers, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("address", ["", "127.0.0.1:5000", "sqlite:///mlflow.db", "mlruns", "http://"])
def test_an_address_that_is_no_server(address):
    with pytest.raises(ConfigError, match="has scheme"):
        Registry(address, "e", "m")


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        Registry("http://user:secret@127.0.0.1:5000", "e", "m")
    assert "secret" not in str(caught.value)


def test_a_port_where_nobody_listens_is_noticed_at_once():
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=r"cannot list experiments: MLflow at .*gives no answer; start it with"):
        Registry(f"http://127.0.0.1:{free_port()}", "e", "m").check()
    assert time.monotonic() - start < PROBE_S


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr("loop.adapters.mlflow_server.PROBE_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(UnreachableError):
            Registry(f"http://127.0.0.1:{silent.getsockname()[1]}", "e", "m").champion()
        assert time.monotonic() - start < PROBE_S


@pytest.mark.parametrize(
    ("health", "rest", "error", "text"),
    [
        ((503, "busy"), (200, "{}"), UnreachableError, "status 503"),
        ((200, "OK"), (403, "Invalid Host header - possible DNS rebinding"), RefusedError, "--allowed-hosts"),
        ((200, "OK"), (401, "who are you"), RefusedError, "MLFLOW_TRACKING_USERNAME"),
        ((200, "OK"), (400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'), RefusedError, "VALUE: no"),
        ((404, "no such page"), (200, "{}"), None, ""),
    ],
)
def test_answers(stub, health, rest, error, text):
    answers, address = stub
    answers |= {"health": health, "rest": rest}
    registry = Registry(address, "e", "m")
    if error is None:
        registry.check()
        return
    with pytest.raises(error, match=text):
        registry.check()


def test_a_server_that_fails_inside_is_not_called_away(stub, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    answers, address = stub
    answers["rest"] = (500, "Internal Server Error")
    with pytest.raises(RefusedError, match="500"):
        Registry(address, "e", "m").check()
