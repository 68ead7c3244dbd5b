"""A real Label Studio for the services tests: one server a session, on loopback, gone without a trace afterwards."""

import os
import secrets
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from flows.local.launch import start_in_background, stop
from flows.local.site import UpOptions
from flows.local.workspace import Workspace
from label_studio_cases import CONFIG
from loop.adapters.label_studio_api import LabelStudio

START_SECONDS = 180.0
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class LabelStudioServer:
    """Where the server listens, who may enter, and the folder that it may show pictures from."""

    url: str
    token: str
    email: str
    password: str
    document_root: Path


def label_studio_environment(state: Path, document_root: Path) -> dict[str, str]:
    """What Label Studio reads: its own state, local files on, local backends and hooks allowed, nothing sent out."""
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(state),
        "LANG": "C.UTF-8",
        "LABEL_STUDIO_BASE_DATA_DIR": str(state),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(document_root),
        "ML_BLOCK_LOCAL_IP": "false",
        "SSRF_PROTECTION_ENABLED": "false",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "NO_PROXY": "*",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"Label Studio ended with {process.returncode} before it was up:\n{tail(log)}")
        try:
            if httpx.get(f"{url}/health", timeout=5, follow_redirects=True, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    pytest.fail(f"Label Studio was not up after {START_SECONDS:.0f} s:\n{tail(log)}")


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and all that it started; the group is its own, so nothing else is hit."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait(timeout=10)


@pytest.fixture(scope="session")
def label_studio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """Label Studio with one administrator, its legacy token, and local files; about 25 s to start."""
    program = Path(os.environ.get("CELLOOP_LABEL_STUDIO_BIN", REPOSITORY / ".venv-labelstudio/bin/label-studio"))
    if not program.exists():
        pytest.fail(f"{program} is missing; run `make` to set it up or name another in CELLOOP_LABEL_STUDIO_BIN")
    state, document_root = tmp_path_factory.mktemp("label-studio"), tmp_path_factory.mktemp("display")
    port = free_port()
    server = LabelStudioServer(
        url=f"http://127.0.0.1:{port}",
        token=secrets.token_hex(20),
        email="person@example.com",
        password=secrets.token_urlsafe(16),
        document_root=document_root,
    )
    environment = label_studio_environment(state, document_root) | {
        "LABEL_STUDIO_USERNAME": server.email,
        "LABEL_STUDIO_PASSWORD": server.password,
        "LABEL_STUDIO_USER_TOKEN": server.token,
    }
    command = [str(program), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    log = state / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # its own session, so that the whole group can be ended
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            wait_until_healthy(process, server.url, log)
            yield server
        finally:
            stop_group(process)


@pytest.fixture(scope="session")
def studio(label_studio_server: LabelStudioServer) -> Iterator[LabelStudio]:
    adapter = LabelStudio(label_studio_server.url, label_studio_server.token)
    yield adapter
    adapter.close()


@pytest.fixture
def project(studio: LabelStudio) -> Iterator[int]:
    number = studio.create_project(f"test-{uuid.uuid4().hex[:12]}", CONFIG)
    yield number
    studio.delete_project(number)


@pytest.fixture(scope="session")
def person(label_studio_server: LabelStudioServer) -> Iterator[httpx.Client]:
    """A browser that is logged in."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=label_studio_server.url, follow_redirects=True, timeout=60, limits=limits) as browser:
        browser.get("/user/login/")
        form = {
            "email": label_studio_server.email,
            "password": label_studio_server.password,
            "csrfmiddlewaretoken": browser.cookies["csrftoken"],
        }
        browser.post("/user/login/", data=form).raise_for_status()
        browser.headers["X-CSRFToken"] = browser.cookies["csrftoken"]
        yield browser


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The whole stack as `celloop up` starts it, on free ports, stopped at the end of the session."""
    place = Workspace(tmp_path_factory.mktemp("workspace"))
    ports = {name: free_port() for name in ("label_studio", "mlflow", "prefect", "backend")}
    start_in_background(place, UpOptions(ports=ports), lambda text: None)
    try:
        yield place
    finally:
        stop(place, lambda text: None)
