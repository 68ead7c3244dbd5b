"""Checks an installation from the ground up, names each fault with its cure, and mends it where it is told to.

Order: versions, Label Studio's set-up, workspace, ports, services, token; then, with a project: addresses, connections,
webhooks, storage, queue, one image as a browser gets it, one prediction, and one click through Label Studio.
"""

import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import SecretStr

from flows.local.doctor_mend import addresses, queue, storage, webhooks
from flows.local.doctor_project import FaultError, open_project
from flows.local.ports import holder, is_free
from flows.local.services import DEFAULT_PORTS, TITLES
from flows.local.status import read_status
from flows.local.versions import label_studio_versions, wrong_versions
from flows.local.workspace import Endpoints, Workspace
from loop.adapters.label_studio_api import LabelStudio
from loop.adapters.label_studio_http import StatusError
from loop.adapters.label_studio_tokens import enable_legacy_tokens
from loop.errors import LoopError, StateError

GIB = 2**30
NEEDED_BYTES = GIB
LINKS = ("addresses", "webhooks", "storage", "queue", "image", "prediction", "click")
NOTHING_RUNS = "nothing runs; start the services with `celloop up`"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `cure` is what to do about a fault, "" otherwise; `mended` what was done."""

    name: str
    outcome: Literal["ok", "mended", "fault", "skipped"]
    detail: str
    cure: str = ""
    mended: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The check as JSON-ready values."""
        return asdict(self)


def examine(workspace: Workspace, project: str | None = None, *, mend: bool = False) -> Iterator[Check]:
    """Yields each check as it is made.

    Args:
        workspace: what to look at.
        project: whose image, prediction and click; None: the first project of the workspace.
        mend: put right what can be put right from here; without it nothing is changed.
    """
    yield _tried("versions", _versions)
    yield _tried("Label Studio's set-up", _label_studio_setup)
    yield _tried("workspace", lambda: _workspace(workspace))
    yield from _ports(workspace)
    yield from _services(workspace)
    endpoints = _endpoints(workspace)
    if endpoints is None:
        for name in ("token", "project", *LINKS):
            yield Check(name, "skipped", NOTHING_RUNS)
        return
    yield _tried("token", lambda: _token(endpoints), mend=mend)
    yield from _project(workspace, endpoints, project, mend=mend)


def _tried(name: str, probe: Callable[[], str], *, mend: bool = False) -> Check:
    """The check that `probe` makes: what it returns is good, what it raises is a fault.

    With `mend` a fault that can be mended is, and `probe` looks again, until it finds none or the same once more.
    """
    done: list[str] = []
    seen: set[str] = set()
    while True:
        try:
            return Check(name, "mended" if done else "ok", probe(), mended=tuple(done))
        except FaultError as fault:
            if not mend or fault.mend is None or fault.detail in seen:
                return Check(name, "fault", fault.detail, fault.cure, tuple(done))
            seen.add(fault.detail)
            try:
                done.append(fault.mend())
            except LoopError as error:
                return Check(name, "fault", f"{fault.detail}; it could not be mended: {error}", fault.cure, tuple(done))
        except LoopError as error:
            return replace(_fault(name, error), mended=tuple(done))


def _fault(name: str, error: LoopError) -> Check:
    """An error's text says what is wrong and, after a semicolon, what to do."""
    detail, _, cure = str(error).partition("; ")
    return Check(name, "fault", detail, cure)


def _versions() -> str:
    found, wrong = wrong_versions()
    if wrong:
        shown = ", ".join(wrong[:6]) + (" ..." if len(wrong) > 6 else "")
        raise FaultError(f"{len(wrong)} packages differ from requirements/app.lock: {shown}", "run `make` to repair it")
    return f"{found} packages as locked" if found else "no lock file beside the program; nothing to compare with"


def _label_studio_setup() -> str:
    found, locked = label_studio_versions()
    if locked and found != locked:
        raise FaultError(f"Label Studio {found} is installed, {locked} is locked", "run `make` to repair it")
    return f"Label Studio {found}"


def _workspace(workspace: Workspace) -> str:
    if not workspace.root.exists():
        return f"{workspace.root} does not exist yet; `celloop up` makes it"
    free = shutil.disk_usage(workspace.root).free
    if free < NEEDED_BYTES:
        raise FaultError(f"{free / GIB:.1f} GiB are free on the disk of {workspace.root}", "make room: 1 GiB at least")
    if workspace.credentials() is not None:
        mode = stat.S_IMODE(workspace.secrets_file.stat().st_mode)
        if mode & 0o077:
            raise FaultError(
                f"{workspace.secrets_file} has mode {mode:o}; others can read it", f"chmod 600 {workspace.secrets_file}"
            )
    return f"{workspace.root}, {free / GIB:.0f} GiB free"


def _ports(workspace: Workspace) -> Iterator[Check]:
    state = workspace.state()
    if state is not None and state.is_running():
        used = ", ".join(f"{TITLES[name]} {port}" for name, port in sorted(state.ports.items()))
        yield Check("ports", "ok", used)
        return
    ports = {**DEFAULT_PORTS, **(state.ports if state else {})}
    taken = [f"{port} ({TITLES[name]}) by {holder(port)}" for name, port in ports.items() if not is_free(port)]
    if not taken:
        yield Check("ports", "ok", "all are free")
    elif state is not None:
        cure = (
            "stop that program: Label Studio's projects know the backend by its port; or run `celloop init` again after"
        )
        yield Check("ports", "fault", f"taken: {', '.join(taken)}", cure)
    else:
        yield Check("ports", "ok", f"taken: {', '.join(taken)}; `celloop up` will choose free ones")


def _services(workspace: Workspace) -> Iterator[Check]:
    status = read_status(workspace)
    if not status.running:
        yield Check("services", "skipped", NOTHING_RUNS)
    for service in status.services:
        if service.healthy:
            yield Check(service.title, "ok", f"{service.url}, {service.memory_mb or 0:.0f} MB")
        else:
            cure = f"see {service.log or 'its own log'}, then `celloop down` and `celloop up`"
            yield Check(service.title, "fault", f"{service.url}: {service.detail}", cure)


def _endpoints(workspace: Workspace) -> Endpoints | None:
    try:
        return workspace.endpoints()
    except StateError:
        return None


def _token(endpoints: Endpoints) -> str:
    try:
        info = LabelStudio(endpoints.label_studio_url, endpoints.label_studio_token).check()
    except StatusError as error:
        if error.status != 401 or "legacy token" not in str(error):
            raise
        detail, _, cure = str(error).partition("; ")
        password = SecretStr(endpoints.label_studio_password)

        def allow() -> str:
            enable_legacy_tokens(endpoints.label_studio_url, endpoints.label_studio_email, password)
            return f"switched legacy tokens on in Label Studio, as {endpoints.label_studio_email}"

        raise FaultError(detail, cure, allow if endpoints.label_studio_password else None) from error
    return f"Label Studio {info.version} knows it as {info.email}"


def _project(workspace: Workspace, endpoints: Endpoints, name: str | None, *, mend: bool) -> Iterator[Check]:
    try:
        probe = open_project(workspace, endpoints, name)
    except LoopError as error:
        yield _fault("project", error)
        return
    if probe is None:
        for what in ("project", *LINKS):
            yield Check(what, "skipped", "there is no project yet; make one with `celloop init --images DIR`")
        return
    yield _tried("addresses", lambda: addresses(probe))
    yield _tried(f"project {probe.name}", probe.connections, mend=mend)
    yield _tried("webhooks", lambda: webhooks(probe), mend=mend)
    yield _tried("storage", lambda: storage(probe), mend=mend)
    yield _tried("queue", lambda: queue(probe), mend=mend)
    yield _tried("image", probe.image)
    if not probe.has_model:
        for what in ("prediction", "click"):
            yield Check(what, "skipped", "the project has no model yet; `celloop round` makes the first one")
        return
    yield _tried("prediction", probe.prediction)
    yield _tried("click", probe.click)
