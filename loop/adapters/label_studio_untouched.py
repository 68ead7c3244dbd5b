"""Tasks that nobody has worked at, and deleting them: a task with an annotation, a skip or a draft never goes."""

from collections.abc import Sequence
from typing import Any, Final

from loop.adapters.label_studio_http import Connection
from loop.adapters.label_studio_tasks import LISTED, list_tasks

_ITEMS: Final = (
    ("total_annotations", "Number", 0),
    ("cancelled_annotations", "Number", 0),
    ("draft_exists", "Boolean", False),
)
_UNTOUCHED: Final[dict[str, Any]] = {
    "conjunction": "and",
    "items": [
        {"filter": f"filter:tasks:{column}", "operator": "equal", "type": kind, "value": value}
        for column, kind, value in _ITEMS
    ],
}


def untouched(connection: Connection, project_id: int, task_ids: Sequence[int]) -> list[int]:
    """Those of `task_ids` that the project has and nobody, not only the token's owner, has annotated, skipped or begun.

    Somebody who has just opened a task and drawn nothing yet is not seen.
    """
    found: set[int] = set()
    for chosen in _chunks(task_ids):
        found |= {int(task.id) for task in list_tasks(connection, project_id, filters=_UNTOUCHED, **chosen)}
    return [number for number in task_ids if number in found]


def remove_untouched(connection: Connection, project_id: int, task_ids: Sequence[int]) -> list[int]:
    """Deletes those of `task_ids` that are untouched, chosen by Label Studio itself as it deletes them.

    By a request of our own, because the SDK deletes whatever it is told to.

    Returns:
        Those that the project does not have any more.
    """
    left: set[int] = set()
    for chosen in _chunks(task_ids):
        if untouched(connection, project_id, chosen["selectedItems"]["included"]):
            connection.send(
                "POST",
                "/api/dm/actions/",
                params={"id": "delete_tasks", "project": project_id},
                body={"project": project_id, "filters": _UNTOUCHED, **chosen},
            )
        left |= {int(task.id) for task in list_tasks(connection, project_id, **chosen)}
    return [number for number in task_ids if number not in left]


def _chunks(task_ids: Sequence[int]) -> list[dict[str, Any]]:
    parts = [list(task_ids[start : start + LISTED]) for start in range(0, len(task_ids), LISTED)]
    return [{"selectedItems": {"all": False, "included": part}} for part in parts]
