"""What stands in a Label Studio project's queue, and putting right what does not belong there.

Reading costs five small requests whatever the size of the project, but for the first page: 0.3 s for 100 tasks of 50
polygons. The counts of a list come with it, but the SDK drops them, so lists are asked for by requests of our own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from loop.adapters.label_studio_http import Connection, delete
from loop.adapters.label_studio_publish import predictions_of, stored_versions

NAMED: Final = 500
"""Tasks of one kind of fault that are asked for by name."""


@dataclass(frozen=True)
class QueuedTask:
    """A task in the list of a project; `score` is the mean of its predictions of the project's version, if any."""

    id: int
    score: float | None
    touched: bool
    n_predictions: int


@dataclass(frozen=True)
class QueueState:
    """A project's queue as Label Studio holds it.

    Attributes:
        version: `model_version` of the project; only predictions of it count.
        sampling: how the next task is chosen.
        versions: number of stored predictions by version, "" for those without one.
        first: tasks that nobody has annotated or skipped, in the order in which they are served.
        scored: how many tasks, touched or not, have a score of the project's version.
        unscored: numbers of untouched tasks that have none, NAMED at most.
    """

    version: str
    sampling: str
    versions: Mapping[str, int]
    first: tuple[QueuedTask, ...]
    scored: int
    unscored: tuple[int, ...]


def queue_state(connection: Connection, project_id: int, *, first: int) -> QueueState:
    """The queue now, with the `first` tasks (1 or more) that are served next.

    A task that is reserved for somebody stands in it as well: he gets it, and others the one after.
    """
    project = connection.get(f"/api/projects/{project_id}/")
    untouched = [_item(name, "equal", "Number", 0) for name in ("total_annotations", "cancelled_annotations")]
    has_score = _item("predictions_score", "empty", "Number", False)
    no_score = _item("predictions_score", "empty", "Number", True)
    return QueueState(
        version=project["model_version"] or "",
        sampling=project["sampling"],
        versions=stored_versions(connection, project_id),
        first=tuple(_task(task) for task in _page(connection, project_id, first, [*untouched, has_score])["tasks"]),
        scored=int(_page(connection, project_id, 1, [has_score])["total"]),
        unscored=tuple(
            int(task["id"]) for task in _page(connection, project_id, NAMED, [*untouched, no_score])["tasks"]
        ),
    )


def queued_tasks(connection: Connection, project_id: int, task_ids: Sequence[int]) -> dict[int, QueuedTask]:
    """Those of `task_ids` that the project has, by number."""
    if not task_ids:
        return {}
    query = {"selectedItems": {"all": False, "included": list(task_ids)}, "ordering": ["tasks:predictions_score"]}
    return {int(task["id"]): _task(task) for task in _asked(connection, project_id, len(task_ids), query)["tasks"]}


def doubled_predictions(connection: Connection, project_id: int, version: str) -> dict[int, list[int]]:
    """By task, the predictions of `version` beyond its first one; costs a request for each task with more than one."""
    several = [_item("total_predictions", "greater", "Number", 1)]
    doubled: dict[int, list[int]] = {}
    for task in _page(connection, project_id, NAMED, several)["tasks"]:
        number = int(task["id"])
        here = [p.id for p in predictions_of(connection, number) if p.model_version == version]
        if len(here) > 1:
            doubled[number] = here[1:]
    return doubled


def delete_predictions(connection: Connection, prediction_ids: Sequence[int]) -> None:
    """Deletes single predictions; one that is gone already is no error."""
    for number in prediction_ids:
        delete(connection.sdk.predictions.delete, number)


def _page(connection: Connection, project_id: int, size: int, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    query = {"filters": {"conjunction": "and", "items": list(items)}, "ordering": ["tasks:predictions_score"]}
    return _asked(connection, project_id, size, query)


def _asked(connection: Connection, project_id: int, size: int, query: Mapping[str, Any]) -> dict[str, Any]:
    """The first `size` tasks with the count of all; in several pages where the server gives fewer at once."""
    tasks: list[Any] = []
    for page in count(1):
        found: dict[str, Any] = connection.get(
            "/api/tasks/",
            project=project_id,
            page=page,
            page_size=size,
            fields="task_only",
            resolve_uri="false",
            query=json.dumps(query),
        )
        tasks += found["tasks"]
        if not found["tasks"] or len(tasks) >= min(size, int(found["total"])):
            break
    return {"tasks": tasks, "total": found["total"]}


def _task(item: Mapping[str, Any]) -> QueuedTask:
    return QueuedTask(
        id=int(item["id"]),
        score=item.get("predictions_score"),
        touched=bool(item["total_annotations"] or item["cancelled_annotations"]),
        n_predictions=int(item["total_predictions"]),
    )


def _item(column: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}
