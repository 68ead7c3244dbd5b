"""What runs in a workspace and how it is: one document, for people and for programs."""

from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from flows.local.processes import memory_bytes
from flows.local.services import HEALTH_PATHS, TITLES
from flows.local.state import State
from flows.local.workspace import Workspace

MIB = 2**20


@dataclass(frozen=True)
class ServiceStatus:
    """One service: `memory_mb` counts its process and all its children; `pid` is None where we did not start it."""

    name: str
    title: str
    url: str
    pid: int | None
    healthy: bool
    detail: str
    memory_mb: float | None
    log: str


@dataclass(frozen=True)
class WorkspaceStatus:
    """The services of a workspace; `running` is whether their supervisor lives."""

    workspace: str
    running: bool
    ready: bool
    supervisor_pid: int | None
    started_at: str
    services: tuple[ServiceStatus, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that should run does and is well."""
        return all(service.healthy for service in self.services)

    def document(self) -> dict[str, Any]:
        """The status as JSON-ready values."""
        return {**asdict(self), "services": [asdict(service) for service in self.services], "healthy": self.healthy}


def read_status(workspace: Workspace) -> WorkspaceStatus:
    """How the services of a workspace are now; each is asked over HTTP."""
    state = workspace.state()
    if state is None or not state.is_running():
        return WorkspaceStatus(str(workspace.root), False, False, None, "", ())
    with httpx.Client(trust_env=False, timeout=5.0, follow_redirects=True) as client:
        services = tuple(_service(workspace, state, client, name) for name in TITLES)
    return WorkspaceStatus(str(workspace.root), True, state.ready, state.supervisor.pid, state.started_at, services)


def _service(workspace: Workspace, state: State, client: httpx.Client, name: str) -> ServiceStatus:
    url = state.urls.get(name, f"http://127.0.0.1:{state.ports[name]}")
    ours = name != "label_studio" or state.label_studio_managed
    process_id = state.processes.get(name)
    process = process_id.process() if process_id else None
    healthy, detail = _ask(client, url + HEALTH_PATHS[name])
    if ours and process is None:
        healthy, detail = False, "has ended" if process_id else "not started yet"
    return ServiceStatus(
        name=name,
        title=TITLES[name] if ours else f"{TITLES[name]} (not ours)",
        url=url,
        pid=process.pid if process else None,
        healthy=healthy,
        detail=detail,
        memory_mb=_memory_mb(process),
        log=str(workspace.logs_dir / f"{name}.log") if ours else "",
    )


def _ask(client: httpx.Client, url: str) -> tuple[bool, str]:
    try:
        status = client.get(url).status_code
    except httpx.TransportError as error:
        return False, f"no answer ({type(error).__name__})"
    return status == httpx.codes.OK, "well" if status == httpx.codes.OK else f"answers {status}"


def _memory_mb(process: psutil.Process | None) -> float | None:
    if process is None:
        return None
    try:
        return round(memory_bytes(process) / MIB, 1)
    except psutil.NoSuchProcess:
        return None
