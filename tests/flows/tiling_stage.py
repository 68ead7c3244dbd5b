"""A Label Studio in memory and a workspace without services, for the tests of tiles."""

import time
from pathlib import Path
from typing import Any

from flows.local.workspace import Endpoints, Workspace
from loop.adapters.index import ImageRow


class Studio:
    """Projects and tasks in memory; `touched` are tasks that somebody has annotated, skipped or begun.

    An import takes `import_s` between its look at what is there and its end, as long as two may meet in it.
    """

    def __init__(self) -> None:
        self.projects: dict[int, dict[str, Any]] = {}
        self.tasks: dict[int, str] = {}
        self.touched: set[int] = set()
        self.made = 0
        self.import_s = 0.0

    def find_project(self, title: str) -> int | None:
        return next((number for number, project in self.projects.items() if project["title"] == title), None)

    def project(self, number: int) -> dict[str, Any]:
        return self.projects[number]

    def create_project(self, title: str, xml: str, description: str = "") -> int:
        number = self.find_project(title) or len(self.projects) + 1
        self.projects.setdefault(number, {"title": title, "label_config": xml})
        return number

    def connect_storage(self, number: int, directory: Path) -> int:
        assert directory.is_dir()
        return 1

    def connect_backend(self, *_: Any, **__: Any) -> int:
        return 1

    connect_webhook = connect_backend

    def import_tasks(self, number: int, tasks: list[dict[str, Any]]) -> list[int]:
        known = {image_id: task for task, image_id in self.tasks.items()}
        numbers = []
        time.sleep(self.import_s)
        for task in tasks:
            data = task["data"]
            assert data["image"].endswith(f"{data['celloop_id']}.png")
            if data["celloop_id"] not in known:
                self.made += 1
                self.tasks[self.made] = data["celloop_id"]
                known[data["celloop_id"]] = self.made
            numbers.append(known[data["celloop_id"]])
        return numbers

    def untouched(self, number: int, tasks: list[int]) -> list[int]:
        return [task for task in tasks if task in self.tasks and task not in self.touched]

    def remove_untouched(self, number: int, tasks: list[int]) -> list[int]:
        for task in self.untouched(number, tasks):
            del self.tasks[task]
        return [task for task in tasks if task not in self.tasks]


class Place(Workspace):
    """A workspace whose services are said to run."""

    def endpoints(self) -> Endpoints:
        return Endpoints("http://ls", "t" * 40, "", "", "http://m", "http://p/api", "http://b", True, "s")


def rows_of(context: Any) -> dict[str, ImageRow]:
    return {row.image_id: row for row in context.index.images("cells")}
