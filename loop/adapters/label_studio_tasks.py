"""Tasks, pictures and annotations of a Label Studio project: bringing in, listing, reading back."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from loop.adapters.label_studio_http import Connection, StatusError
from loop.errors import ImageError, InputError, RefusedError

if TYPE_CHECKING:
    from label_studio_sdk import RoleBasedTask

TASK_KEY: Final = "celloop_id"
"""The key of a task's data by which a task is known again."""

LISTED: Final = 100
"""Tasks a page of Label Studio's list."""

_IMPORTED_AT_ONCE = 250
_UPLOADED_AT_ONCE = 20
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True)
class Task:
    """A task as the list shows it. `updated_at` (UTC) moves when an annotation is made, changed, skipped or deleted.

    `total_annotations` counts neither the skipped ones nor drafts; `cancelled_annotations` are the skipped ones.
    """

    id: int
    data: dict[str, Any]
    updated_at: datetime
    total_annotations: int
    cancelled_annotations: int
    is_labeled: bool


@dataclass(frozen=True)
class Annotation:
    """What a person submitted. An empty `result` means no cells; `was_cancelled` means skipped, whatever the result.

    `parent_prediction` is the prediction that it was copied from, None once that one is deleted. Times are UTC.
    """

    id: int
    task_id: int
    result: list[dict[str, Any]]
    was_cancelled: bool
    ground_truth: bool
    lead_time_s: float | None
    completed_by: int | None
    parent_prediction: int | None
    created_at: datetime
    updated_at: datetime


def import_tasks(connection: Connection, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of `tasks` in the order given, after those have been imported that the project lacks.

    Raises:
        InputError: a task without "celloop_id", or two with the same.
    """
    keys = [_task_key(task) for task in tasks]
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise InputError(f"several tasks have {TASK_KEY} {key!r}; expected one for each image")
        seen.add(key)
    numbers: dict[str, int] = {}
    projects = connection.sdk.projects
    if tasks and projects.get(project_id).task_number:
        for task in tasks_of(connection, project_id):
            numbers.setdefault(str(task.data.get(TASK_KEY)), task.id)
    new = [(key, task) for key, task in zip(keys, tasks, strict=True) if key not in numbers]
    for start in range(0, len(new), _IMPORTED_AT_ONCE):
        part = new[start : start + _IMPORTED_AT_ONCE]
        answer = projects.import_tasks(project_id, request=[dict(task) for _, task in part], return_task_ids=True)
        numbers.update(zip((key for key, _ in part), answer.task_ids, strict=True))
    return [numbers[key] for key in keys]


def upload(connection: Connection, project_id: int, paths: Sequence[Path]) -> list[str]:
    """The addresses that Label Studio shows `paths` under, after those have been sent that it lacks.

    A picture is known again by its content, which is part of the name that it is sent under. No tasks are made. The
    pictures go by a request of our own, because the SDK's import sends JSON alone.

    Args:
        connection: to Label Studio.
        project_id: Label Studio's number of the project.
        paths: PNG files, read 20 at a time.

    Raises:
        ImageError: a file cannot be read.
    """
    addresses: list[str] = []
    for start in range(0, len(paths), _UPLOADED_AT_ONCE):
        pictures = [_named_by_content(path) for path in paths[start : start + _UPLOADED_AT_ONCE]]
        there = _uploads(connection, project_id)
        missing = {name: png for name, png in pictures if name not in there}
        if missing:
            path = f"/api/projects/{project_id}/import"
            connection.send("POST", path, files=list(missing.items()), params={"commit_to_project": "false"})
            there = _uploads(connection, project_id)
        addresses += [f"/data/{there[name]}" for name, _ in pictures]
    return addresses


def tasks_of(connection: Connection, project_id: int, updated_after: datetime | None = None) -> Iterator[Task]:
    """All tasks of a project, or those changed after a time, by ascending number.

    Read in pages by number, so that tasks made or deleted meanwhile shift nothing.

    Raises:
        InputError: `updated_after` has no timezone.
    """
    filters = []
    if updated_after is not None:
        if updated_after.tzinfo is None:
            raise InputError(f"{updated_after} has no timezone; give the time as Label Studio said it, in UTC")
        value = updated_after.astimezone(UTC).strftime(_TIME_FORMAT)
        filters.append(_filter("updated_at", "greater", "Datetime", value))
    last = 0
    while True:
        items = [*filters, _filter("id", "greater", "Number", last)]
        page = list_tasks(connection, project_id, filters={"conjunction": "and", "items": items}, ordering=["tasks:id"])
        for item in page:
            yield _task(item)
        if len(page) < LISTED:
            return
        last = int(page[-1].id)


def annotations_of(connection: Connection, project_id: int, task_id: int) -> list[Annotation]:
    """Every annotation of a task, the skipped ones too, oldest first; no drafts."""
    # /api/tasks/ID/annotations leaves out the skipped ones, and /api/tasks/ID asks the backend for predictions
    selected = {"all": False, "included": [task_id]}
    found = list_tasks(connection, project_id, fields="all", selectedItems=selected)
    return sorted((_annotation(item) for task in found for item in task.annotations), key=lambda a: a.id)


def submit(
    connection: Connection,
    task_id: int,
    result: Sequence[Mapping[str, Any]],
    *,
    lead_time_s: float | None,
    unique_id: UUID | str,
    parent_prediction: int | None,
    was_cancelled: bool,
    project_of: Callable[[int], int],
) -> int:
    """Submits an annotation as the editor does; returns its number, the first one's when called again.

    Args:
        connection: to Label Studio.
        task_id: Label Studio's number of the task.
        result: result items; none = no cells.
        lead_time_s: seconds of work, or None.
        unique_id: a UUID of this annotation.
        parent_prediction: the prediction that it started from.
        was_cancelled: skipped.
        project_of: the project of a task, asked only when the annotation is there already.

    Raises:
        InputError: `unique_id` is no UUID.
        RefusedError: `unique_id` belongs to an annotation of another task.
    """
    try:
        unique = str(UUID(str(unique_id)))
    except ValueError as error:
        raise InputError(f"unique_id {unique_id!r} is no UUID; give one, e.g. uuid.uuid4()") from error
    origin = {} if parent_prediction is None else {"parent_prediction": parent_prediction}
    try:
        made = connection.sdk.annotations.create(
            task_id,
            result=list(result),
            lead_time=lead_time_s,
            unique_id=unique,
            was_cancelled=was_cancelled,
            **origin,
        )
    except StatusError as error:
        if error.status != 409:
            raise
        return submitted(connection, project_of(task_id), task_id, unique)
    return int(made.id)


def submitted(connection: Connection, project_id: int, task_id: int, unique_id: str) -> int:
    """The number of the task's annotation with this unique id; by a request of our own, for the SDK streams an export.

    Raises:
        RefusedError: the task has none.
    """
    # only the export tells unique ids; it leaves a copy in Label Studio's folder, so it is for this rare case alone
    exported = connection.get(f"/api/projects/{project_id}/export", **{"exportType": "JSON", "ids[]": task_id})
    for task in exported:
        for annotation in task["annotations"]:
            if annotation["unique_id"] == unique_id:
                return int(annotation["id"])
    raise RefusedError(
        f"unique_id {unique_id} belongs to an annotation of another task than {task_id}; give each its own"
    )


def list_tasks(
    connection: Connection, project_id: int, *, fields: str = "task_only", **query: Any
) -> Sequence["RoleBasedTask"]:
    """The first LISTED tasks that fit a query of Label Studio's list (filters, ordering, selectedItems)."""
    page = connection.sdk.tasks.list(
        project=project_id, page_size=LISTED, resolve_uri=False, fields=fields, query=json.dumps(query)
    )
    return page.items or []


def _named_by_content(path: Path) -> tuple[str, bytes]:
    try:
        png = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path} to send it to Label Studio: {error.strerror}") from error
    # Label Studio drops what is no letter or digit from a name, so it gets none
    stem = re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-")[:40]
    return f"{stem}-{hashlib.sha256(png).hexdigest()[:24]}.png", png


def _uploads(connection: Connection, project_id: int) -> dict[str, str]:
    """Where each uploaded file lies, by the name that it was sent under; Label Studio puts 8 characters before it."""
    found = connection.sdk.files.list(project_id, all_=True)
    return {str(item.file).rsplit("/", 1)[-1].split("-", 1)[-1]: str(item.file) for item in found}


def _filter(column: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}


def _task_key(task: Mapping[str, Any]) -> str:
    key = task.get("data", {}).get(TASK_KEY)
    if not key:
        raise InputError(f"a task has no {TASK_KEY!r} in its data ({str(task)[:200]}); expected the image's id there")
    return str(key)


def _task(item: "RoleBasedTask") -> Task:
    time = item.updated_at  # text where the SDK found that only its narrower kinds of task fit
    return Task(
        id=int(item.id),
        data=item.data,
        updated_at=time if isinstance(time, datetime) else datetime.fromisoformat(time),
        total_annotations=int(item.total_annotations),
        cancelled_annotations=int(item.cancelled_annotations),
        is_labeled=bool(item.is_labeled),
    )


def _annotation(item: Mapping[str, Any]) -> Annotation:
    return Annotation(
        id=int(item["id"]),
        task_id=int(item["task"]),
        result=item["result"] or [],
        was_cancelled=bool(item["was_cancelled"]),
        ground_truth=bool(item["ground_truth"]),
        lead_time_s=item["lead_time"],
        completed_by=item["completed_by"],
        parent_prediction=item["parent_prediction"],
        created_at=datetime.fromisoformat(item["created_at"]),
        updated_at=datetime.fromisoformat(item["updated_at"]),
    )
