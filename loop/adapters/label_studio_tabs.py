"""Tabs of Label Studio's list of tasks, the queue behind one, and who may be asked to work through it."""

from collections.abc import Mapping, Sequence
from typing import Any

from loop.adapters.label_studio_http import Connection, delete
from loop.errors import StateError


def set_tab(connection: Connection, project_id: int, wanted: Mapping[str, Any], columns: Sequence[str]) -> int:
    """Makes the tab of the title in `wanted`, or writes `wanted` over what it holds; returns its number.

    The names of the columns come by a request of our own, because the SDK has none for them.

    Args:
        connection: to Label Studio.
        project_id: Label Studio's number of the project.
        wanted: title, ordering, filters and so on, by Label Studio's own names.
        columns: the only ones to show; none = as it is.
    """
    views = connection.sdk.views
    mine = [tab for tab in views.list(project=project_id) if tab.data.get("title") == wanted["title"]]
    data: dict[str, Any] = dict(mine[0].data) if mine else {}
    data |= {"type": "list", "target": "tasks", **wanted}
    if columns:
        there = connection.get("/api/dm/columns/", project=project_id)["columns"]
        names = [".".join(filter(None, (column.get("parent"), column["id"]))) for column in there]
        hidden = [f"tasks:{name}" for name in names if name not in columns and name != "data"]
        data["hiddenColumns"] = {"explore": hidden, "labeling": hidden}
    if not mine:
        return int(views.create(project=project_id, data=data).id)
    views.update(str(mine[0].id), project=project_id, data=data)
    return int(mine[0].id)


def tab_titles(connection: Connection, project_id: int) -> list[str]:
    """The titles of all tabs, in the order in which they stand there."""
    return [str(tab.data.get("title", "")) for tab in connection.sdk.views.list(project=project_id)]


def remove_tab(connection: Connection, project_id: int, title: str) -> None:
    """Deletes every tab of this title; nothing happens if there is none."""
    for tab in connection.sdk.views.list(project=project_id):
        if tab.data.get("title") == title:
            delete(lambda number: connection.sdk.views.delete(str(number)), int(tab.id))


def queue_of(connection: Connection, project_id: int, title: str) -> dict[str, Any]:
    """What the button "Label Tasks As Displayed" of a tab asks for: its order and its filters.

    Raises:
        StateError: there is no such tab.
    """
    for tab in connection.sdk.views.list(project=project_id):
        if tab.data.get("title") == title:
            return {"ordering": tab.data.get("ordering", []), "filters": tab.data.get("filters")}
    raise StateError(f"project {project_id} has no tab {title!r}; publish again, or look for it in Label Studio")


def people(connection: Connection) -> dict[str, int]:
    """Label Studio's number of each person, by login (e-mail) and by user name, both in lower case."""
    found: dict[str, int] = {}
    for user in connection.sdk.users.list():
        for name in (user.username, user.email):
            if name:
                found[name.lower()] = int(user.id)
    return found
