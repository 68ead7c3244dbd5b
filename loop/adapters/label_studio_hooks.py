"""Label Studio's way back to celloop: the backend that it asks for masks and the webhook that it rings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loop.adapters.label_studio_http import Connection, StatusError, delete
from loop.adapters.label_studio_publish import stored_versions

if TYPE_CHECKING:
    from label_studio_sdk import Webhook

SECRET_HEADER: Final = "X-Celloop-Secret"
"""Header in which the webhook carries its secret; also how a webhook is known to be ours."""

WEBHOOK_ACTIONS: Final = (
    "ANNOTATION_CREATED",
    "ANNOTATIONS_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_DELETED",
    "TASKS_CREATED",
    "TASKS_DELETED",
)


@dataclass(frozen=True)
class Backend:
    """An attached backend; `reached` is whether it answered Label Studio just now, `error` what it said otherwise."""

    id: int
    url: str
    title: str
    reached: bool
    error: str


@dataclass(frozen=True)
class Hook:
    """A webhook of a project.

    `ours`: it carries celloop's secret. `automatic`: it is like those that Label Studio adds for a backend by itself
    and leaves behind when the backend goes: every action, no header, an address that ends with /webhook.
    """

    id: int
    url: str
    ours: bool
    automatic: bool


def backends_of(connection: Connection, project_id: int) -> list[Backend]:
    """The project's backends; Label Studio asks each whether it is well before it answers."""
    return [
        Backend(int(b.id), b.url, b.title or "", b.state not in ("DI", "ER"), b.error_message or "")
        for b in connection.sdk.ml.list(project=project_id)
    ]


def hooks_of(connection: Connection, project_id: int) -> list[Hook]:
    """The project's webhooks by number; those of the whole organization are not among them."""
    return [
        Hook(
            int(hook.id),
            hook.url,
            _is_ours(hook),
            hook.send_for_all_actions is True and not hook.headers and hook.url.rstrip("/").endswith("/webhook"),
        )
        for hook in _webhooks(connection, project_id)
    ]


def remove_hook(connection: Connection, number: int) -> None:
    """Deletes a webhook; nothing happens if there is none of this number."""
    delete(connection.sdk.webhooks.delete, number)


def refusals(connection: Connection, project_id: int, url: str) -> dict[str, str]:
    """What Label Studio has against `url` as a backend's address ("backend") or a webhook's ("webhook"), in its words.

    It is asked to keep one of each with another setting that it must refuse, so nothing is made and nobody is asked; it
    looks at the address first. By requests of our own, because the SDK lets no wrong setting through. {} = nothing.
    """
    wrong = "none of these"
    asked: dict[str, tuple[str, dict[str, Any], str]] = {
        "backend": ("/api/ml/", {"project": project_id, "url": url, "title": "?", "auth_method": wrong}, "auth_method"),
        "webhook": ("/api/webhooks/", {"project": project_id, "url": f"{url}/webhook", "actions": [wrong]}, "actions"),
    }
    found: dict[str, str] = {}
    for what, (path, body, field) in asked.items():
        try:
            connection.send("POST", path, body=body)
        except StatusError as error:
            answer = error.body if isinstance(error.body, dict) else {}
            faults = answer.get("validation_errors") or {}
            if "url" in faults:
                found[what] = " ".join(map(str, faults["url"]))
            elif field not in faults:
                found[what] = str(answer.get("detail") or error)
    return found


def connect_backend(
    connection: Connection, project_id: int, url: str, title: str, *, user: str | None, password: str | None
) -> int:
    """Attaches the backend at `url`, or corrects the one of this title or address; returns its number.

    In a project without a version Label Studio names the backend's title as its version, and would then ask the
    backend at each next task; that is undone, so that what is published counts. The webhook that Label Studio adds by
    itself is taken away too: it has no secret, and stays behind when the backend goes.

    Raises:
        RefusedError: the backend does not answer Label Studio, or Label Studio blocks its address.
    """
    sdk = connection.sdk
    mine = [b for b in sdk.ml.list(project=project_id) if b.title == title or _same(b.url, url)]
    settings: dict[str, Any] = {"project": project_id, "url": url, "title": title, "is_interactive": True}
    if user is None:
        settings |= {"auth_method": "NONE"}
    else:
        settings |= {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password or ""}
    if mine:
        number = int(mine[0].id)
        sdk.ml.update(number, **settings)
        for extra in mine[1:]:
            delete(sdk.ml.delete, extra.id)
    else:
        number = int(sdk.ml.create(**settings).id)
    if sdk.projects.get(project_id).model_version == title and title not in stored_versions(connection, project_id):
        sdk.projects.update(project_id, model_version="")
    automatic = [f"{address.rstrip('/')}/webhook" for address in [*(backend.url for backend in mine), url]]
    for hook in _webhooks(connection, project_id):
        if any(_same(hook.url, address) for address in automatic) and not _is_ours(hook):
            delete(sdk.webhooks.delete, hook.id)
    return number


def connect_webhook(connection: Connection, project_id: int, url: str, secret: str) -> int:
    """Makes Label Studio tell `url` of each new, changed or deleted annotation and task; returns the webhook's number.

    One webhook of ours is left in the project, wherever the backend listened before, and no other for this address.

    Raises:
        RefusedError: Label Studio blocks the address.
    """
    there = [hook for hook in _webhooks(connection, project_id) if _is_ours(hook) or _same(hook.url, url)]
    settings: dict[str, Any] = {
        "url": url,
        "send_payload": True,
        "send_for_all_actions": False,
        "actions": list(WEBHOOK_ACTIONS),
        "headers": {SECRET_HEADER: secret},
        "is_active": True,
    }
    if not there:
        return int(connection.sdk.webhooks.create(project=project_id, **settings).id)
    number = int(there[0].id)
    connection.sdk.webhooks.update(number, **settings)
    for extra in there[1:]:
        delete(connection.sdk.webhooks.delete, extra.id)
    return number


def _webhooks(connection: Connection, project_id: int) -> list["Webhook"]:
    found = connection.sdk.webhooks.list(project=str(project_id))
    return sorted((hook for hook in found if hook.project == project_id), key=lambda hook: int(hook.id))


def _is_ours(hook: "Webhook") -> bool:
    return SECRET_HEADER in (hook.headers or {})


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")
