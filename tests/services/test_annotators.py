"""A batch for two people on a real Label Studio: each is served his own tasks by rank, and a few both label blindly."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from flows.publish import publish
from flows.select import select
from flows.tasks import task_data
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import LabelStudio
from loop.config import load_config
from loop.data.predictions import StoredPrediction
from loop.data.synthetic import draw_cells
from loop.labelstudio.interface import Interface, label_config
from loop.types import Selection

pytestmark = pytest.mark.services

XML = label_config(("Cell",))
SECOND = "second@example.com"


@pytest.fixture
def second(label_studio_server: Any) -> Iterator[LabelStudio]:
    """Somebody else, who has signed up."""
    with httpx.Client(base_url=label_studio_server.url, follow_redirects=True, timeout=60) as browser:
        browser.get("/user/signup/")
        form = {"email": SECOND, "password": "a-long-word", "csrfmiddlewaretoken": browser.cookies["csrftoken"]}
        browser.post("/user/signup/", data=form).raise_for_status()
        token = browser.get("/api/current-user/token").json()["token"]
    adapter = LabelStudio(label_studio_server.url, token)
    yield adapter
    adapter.close()


@pytest.fixture
def context(studio: LabelStudio, label_studio_server: Any, tmp_path: Path) -> Iterator[Any]:
    """Ten images in Label Studio and in the index, for two people, a third of the batch for both."""
    title = f"shares-{uuid.uuid4().hex[:8]}"
    number = studio.create_project(title, XML)
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project("cells", ls_project_id=number, root=tmp_path, label_config=XML)
    rows = [
        ImageRow(project.id, f"i{n}", "0" * 64, str(tmp_path / f"i{n}.png"), f"/data/i{n}.png", height=64, width=64)
        for n in range(10)
    ]
    interface = Interface.parse(XML)
    tasks = studio.import_tasks(number, [{"data": task_data(interface, row)} for row in rows])
    index.add_images("cells", [replace(row, task_id=task) for row, task in zip(rows, tasks, strict=True)])
    for row in rows:
        Path(row.path).touch()

    class Context(SimpleNamespace):
        @property
        def project(self) -> Any:
            return index.project("cells")

    people = (label_studio_server.email, SECOND)
    settings = {"select.strategy": "uncertain_diverse", "select.embedding": "model", "select.batch": 8}
    settings |= {"select.annotators": people, "select.overlap": 0.25}
    config = load_config(None, settings)
    yield Context(
        index=index, interface=interface, label_studio=studio, project_name="cells", config=config, title=title
    )
    index.close()
    studio.delete_project(number)


def predictions() -> dict[str, StoredPrediction]:
    found = {}
    for n in range(10):
        _, cells = draw_cells(np.random.default_rng(n), (64, 64), 1 + n % 4, image_id=f"i{n}")
        measures = {"entropy_cells": 0.1 + n / 20, "doubtful_cells": float(n % 3)}
        found[f"i{n}"] = StoredPrediction(cells, 0.5, np.eye(10, dtype=np.float32)[n], measures)
    return found


def label_all(who: LabelStudio, project: int, tab: str) -> list[dict[str, Any]]:
    """Works through a tab as its button "Label Tasks As Displayed" serves it."""
    served: list[dict[str, Any]] = []
    while (task := who.next_task(project, tab=tab)) is not None:
        assert len(served) < 10, "a task that was submitted is served again"
        served.append(task)
        who.submit(task["id"], [], lead_time_s=1.0, unique_id=uuid.uuid4())
    return served


def expected(batch: list[Selection], rows: dict[str, ImageRow], person: str) -> list[str]:
    return [s.image_id for s in batch if f"[{person}]" in rows[s.image_id].annotators]


def test_each_of_two_people_is_served_his_share_in_rank_order_and_the_common_ones_blindly(
    context: Any, second: LabelStudio
) -> None:
    studio, number, stored = context.label_studio, context.project.ls_project_id, predictions()
    first_login = context.config.select.annotators[0]
    for _ in range(2):
        batch = select(context, 1, stored)
        publish(context, 1, None, batch, stored)
    rows = {row.image_id: row for row in context.index.images("cells")}
    assert studio.next_task(number)["data"]["celloop_id"] == batch[0].image_id
    studio.create_project(context.title, XML)  # as `celloop init` again does

    mine = label_all(studio, number, f"Batch for {first_login}")
    assert [task["data"]["celloop_id"] for task in mine] == expected(batch, rows, first_login)
    common = {s.image_id for s in batch if rows[s.image_id].annotators.count("[") == 2}
    assert len(common) == 2
    states = {task.data["celloop_id"]: task.is_labeled for task in studio.tasks(number)}
    assert {name for name in states if states[name]} == set(expected(batch, rows, first_login)) - common

    theirs = label_all(second, number, f"Batch for {SECOND}")
    assert [task["data"]["celloop_id"] for task in theirs] == expected(batch, rows, SECOND)
    assert {t["data"]["celloop_id"] for t in mine} & {t["data"]["celloop_id"] for t in theirs} == common
    assert {t["data"]["celloop_id"] for t in [*mine, *theirs]} == {s.image_id for s in batch}
    for task in [*mine, *theirs]:
        row = rows[task["data"]["celloop_id"]]
        assert task["data"]["reason"] == row.told
        assert row.reason
        assert "minute" in row.note
        assert task["data"]["rank"] == row.rank
        assert task["annotations"] == []
        assert len(task["predictions"]) == 1
    for image_id in common:
        assert len({a.completed_by for a in studio.annotations(rows[image_id].task_id)}) == 2
    assert all(task.is_labeled for task in studio.tasks(number) if task.data["rank"] is not None)

    fewer = context.config.select.model_copy(update={"annotators": (first_login,)})
    context.config = context.config.model_copy(update={"select": fewer})
    publish(context, 2, None, [], stored)
    assert sorted(studio.tab_titles(number)) == sorted(["Most informative", f"Batch for {first_login}"])
