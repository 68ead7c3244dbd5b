"""What a project needs in Label Studio besides its connections, link by link; most faults can be mended from here."""

from collections.abc import Callable
from pathlib import PurePosixPath
from urllib.parse import parse_qs, urlsplit

import httpx

from flows.context import project_lock
from flows.local.doctor_project import FaultError, ProjectProbe, asked
from flows.queue import BY_PUBLISHING, QueueFault, look_at_queue, strange_versions, unfinished_endings
from loop.adapters.label_studio_api import PROJECT_SETTINGS
from loop.adapters.label_studio_hooks import Hook, hooks_of, refusals, remove_hook
from loop.adapters.label_studio_publish import delete_version
from loop.adapters.label_studio_queue import delete_predictions, doubled_predictions
from loop.adapters.label_studio_storage import connect_storage, storage_paths

LOCAL_FILES = "/data/local-files/"
BLOCKED_BY = {"backend": "ML_BLOCK_LOCAL_IP", "webhook": "SSRF_PROTECTION_ENABLED"}
ROUND = "run `celloop round`: it publishes the order anew"
BY_HAND = "delete them in Label Studio (Data Manager, Delete Predictions), then run `celloop round`"
MEND = "`celloop doctor --mend` puts it right"
ANSWER_S = 2.0


def addresses(probe: ProjectProbe) -> str:
    """That Label Studio and the backend know each other by addresses that both can reach.

    Raises:
        FaultError: Label Studio blocks or does not know the backend's, does not get through, or shows pictures from
            somewhere that the backend does not read; none of which can be mended from here.
    """
    backend, server = probe.endpoints.backend_url, probe.endpoints.label_studio_url
    refused = refusals(probe.connection, probe.row.ls_project_id, backend)
    blocked = [BLOCKED_BY[what] for what, text in refused.items() if "reserved network address" in text]
    if blocked:
        settings = " and ".join(f"{name}=false" for name in blocked)
        raise FaultError(f"Label Studio does not talk to {backend}: {refused}", f"start Label Studio with {settings}")
    if refused:
        raise FaultError(
            f"Label Studio does not take {backend} for the {' and the '.join(refused)}: {' '.join(refused.values())}",
            "give the backend an address that Label Studio's machine knows too, with a dot in its name or as numbers "
            "(CELLOOP_BACKEND_URL), then run `celloop init` again",
        )
    silent = [one for one in probe.attached() if one.url.rstrip("/") == backend and not one.reached]
    if silent and _answers(backend):
        why = silent[0].error or "no answer"
        raise FaultError(
            f"Label Studio does not get through to {backend}, though this machine does: {why}",
            "see that this name and port lead from Label Studio's machine to the backend, and what its log says",
        )
    shown = str(probe.task.data.get(probe.interface.image_value_key, ""))
    if shown.startswith(("http://", "https://")) and _origin(shown) != _origin(server):
        raise FaultError(
            f"the picture of task {probe.task.id} lies at {shown}; the backend reads from {server} alone",
            "bring the images in with `celloop init`, or give Label Studio's address as the tasks have it",
        )
    return f"{server} and {backend} know each other"


def webhooks(probe: ProjectProbe) -> str:
    """That no webhook rings where nobody listens, for each costs an annotator up to a second at every submit.

    Raises:
        FaultError: a webhook of celloop's elsewhere, a second one to the backend, or one as Label Studio makes for a
            backend, where none is attached any more and none answers. On another machine than the backend's the latter
            may be a person's own, so it is named and left to him.
    """
    hooks = hooks_of(probe.connection, probe.row.ls_project_id)
    silent = _left_behind(probe, hooks)
    host = urlsplit(probe.endpoints.backend_url).hostname
    orphans = _superfluous(probe, hooks) + [hook for hook in silent if urlsplit(hook.url).hostname == host]
    if orphans:

        def remove() -> str:
            for hook in orphans:
                remove_hook(probe.connection, hook.id)
            return f"removed {len(orphans)} webhooks: {', '.join(hook.url for hook in orphans)}"

        listed = ", ".join(f"{hook.url} (number {hook.id})" for hook in orphans)
        raise FaultError(f"{len(orphans)} webhooks of project {probe.name} ring for nobody: {listed}", MEND, remove)
    if silent:
        listed = ", ".join(f"{hook.url} (number {hook.id})" for hook in silent)
        raise FaultError(
            f"nobody answers at {listed}, which project {probe.name} rings at every submit",
            "delete these in Label Studio (Settings, Webhooks) unless you need them",
        )
    return f"{len(hooks)} webhooks"


def _superfluous(probe: ProjectProbe, hooks: list[Hook]) -> list[Hook]:
    """All of celloop's own and to the backend but the one that is needed."""
    wanted = f"{probe.endpoints.backend_url}/webhook"
    right = [hook for hook in hooks if hook.url.rstrip("/") == wanted]
    kept = next((hook for hook in right if hook.ours), None) or next(iter(right), None)
    return [hook for hook in hooks if hook is not kept and (hook.ours or hook in right)]


def _left_behind(probe: ProjectProbe, hooks: list[Hook]) -> list[Hook]:
    """Those that look as if Label Studio had made them for a backend that is there no more."""
    known = {one.url.rstrip("/") for one in probe.attached()} | {probe.endpoints.backend_url}
    found = []
    for hook in hooks:
        base = hook.url.rstrip("/").removesuffix("/webhook")
        if hook.automatic and base not in known and not _answers(base):
            found.append(hook)
    return found


def storage(probe: ProjectProbe) -> str:
    """That Label Studio may show the folders that the pictures lie in.

    Raises:
        FaultError: the project has no local-files storage for one of them.
    """
    wanted = _folders(probe)
    if not probe.endpoints.label_studio_managed or not wanted:
        return "the pictures are not read from this disk"
    there = [PurePosixPath(path) for path in storage_paths(probe.connection, probe.row.ls_project_id)]
    missing = [path for path in wanted if not any(path.is_relative_to(known) for known in there)]
    if missing:

        def connect() -> str:
            for path in missing:
                connect_storage(probe.connection, probe.row.ls_project_id, str(path))
            return f"connected {', '.join(map(str, missing))}"

        listed = ", ".join(map(str, missing))
        raise FaultError(f"project {probe.name} has no local-files storage for {listed}", MEND, connect)
    return f"Label Studio shows {', '.join(map(str, wanted))}"


def _folders(probe: ProjectProbe) -> list[PurePosixPath]:
    """The folders of the display files that Label Studio reads from the disk, by the tasks' addresses."""
    root = PurePosixPath(str(probe.workspace.root.resolve()))
    found: set[PurePosixPath] = set()
    for row in probe.index.images(probe.name):
        parts = urlsplit(row.display)
        if parts.path == LOCAL_FILES and row.task_id is not None:
            found.update((root / file).parent for file in parse_qs(parts.query).get("d", []))
    return sorted(found)


def queue(probe: ProjectProbe) -> str:
    """That people are served the published predictions in the index's order; see flows/queue.py.

    Raises:
        FaultError: they are not. Each mend puts one kind of fault right.
    """
    report = look_at_queue(probe.studio, probe.index, probe.name)
    if not report.faults:
        batch = f"{report.batch} tasks of the batch come first" if report.batch else "no batch is waiting"
        return f"{report.published or 'nothing'} is published; {batch}"
    detail = "; ".join(fault.text for fault in report.faults)
    for fault in report.faults:
        mend = _mend_of(probe, fault)
        if mend is not None:
            raise FaultError(detail, MEND, _alone(probe, mend))
    raise FaultError(detail, ROUND if any(fault.kind in BY_PUBLISHING for fault in report.faults) else BY_HAND)


def _alone(probe: ProjectProbe, mend: Callable[[], str]) -> Callable[[], str]:
    """`mend` while no round of the project runs on this machine; BusyError where one does."""

    def work() -> str:
        with project_lock(probe.workspace, probe.name):
            return mend()

    return work


def _mend_of(probe: ProjectProbe, fault: QueueFault) -> Callable[[], str] | None:
    """What puts one kind of fault right; what is published is asked when it is done, for a round may have ended."""
    number = probe.row.ls_project_id

    def published_now() -> str:
        return probe.index.project(probe.name).published_version

    def name_version() -> str:
        published = published_now()
        probe.studio.update_project(number, model_version=published)
        return f"named {published} as the version of project {probe.name}"

    def sample() -> str:
        wanted = PROJECT_SETTINGS["sampling"]
        probe.studio.update_project(number, sampling=wanted)
        return f"set project {probe.name} to {wanted}"

    def delete_strange() -> str:
        state = probe.studio.queue(number, first=1)
        names = strange_versions(state, published_now(), unfinished_endings(probe.index, probe.name))
        gone = sum(delete_version(probe.connection, number, name) for name in names)
        return f"deleted {gone} predictions of {', '.join(names) or 'no version'}"

    def delete_doubled() -> str:
        published = published_now()
        doubled = doubled_predictions(probe.connection, number, published)
        ids = [one for several in doubled.values() for one in several]
        delete_predictions(probe.connection, ids)
        return f"deleted {len(ids)} second predictions of {published} in {len(doubled)} tasks"

    mends = {"version": name_version, "sampling": sample, "strange": delete_strange, "doubled": delete_doubled}
    return mends.get(fault.kind)


def _answers(url: str) -> bool:
    """Whether a server answers this machine at /health below `url`, whatever it says."""
    try:
        asked(lambda client: client.get(f"{url}/health", timeout=ANSWER_S))
    except (FaultError, httpx.InvalidURL):
        return False
    return True


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
