"""What verify_queue says of queues that are hard to bring about on a real server; the index is real."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.queue import look_at_queue, verify_queue
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import QueuedTask, QueueState

RANKS = (3, 1, None, 2, None)
RIGHT = (11, 13, 10, 12, 14)


class Studio:
    """Serves what it is told to; `touched` tasks are annotated and so not in its list."""

    def __init__(self) -> None:
        self.order: tuple[int, ...] = RIGHT
        self.touched: set[int] = set()
        self.lost: set[int] = set()
        self.unscored: tuple[int, ...] = ()
        self.version, self.sampling = "v-r2", "Uncertainty sampling"
        self.versions = {"v-r2": 5}
        self.doubled: dict[int, list[int]] = {}
        self.scores: dict[int, float] = {}
        self.requests: list[str] = []

    def queue(self, project: int, *, first: int) -> QueueState:
        self.requests.append(f"first {first}")
        scores = {task: rank / 10 for rank, task in enumerate(self.order)} | self.scores
        listed = [t for t in sorted(scores, key=scores.__getitem__) if t not in {*self.touched, *self.lost}]
        tasks = tuple(QueuedTask(task, scores[task], False, 1) for task in listed[:first])
        scored = len(self.order) - len(self.lost)
        return QueueState(self.version, self.sampling, self.versions, tasks, scored, self.unscored)

    def queued_tasks(self, project: int, tasks: list[int]) -> dict[int, QueuedTask]:
        self.requests.append(f"tasks {tasks}")
        return {task: QueuedTask(task, None, task in self.touched, 0) for task in tasks}

    def doubled_predictions(self, project: int, version: str) -> dict[int, list[int]]:
        self.requests.append(f"doubled {version}")
        return self.doubled


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Any]:
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project("p", ls_project_id=1, root=tmp_path, label_config="<View/>")
    rows = [
        ImageRow(project.id, f"i{n}", "0" * 64, "", "", 10 + n, rank=rank, score=0.5) for n, rank in enumerate(RANKS)
    ]
    index.add_images("p", rows)
    index.set_published("p", "v-r2", "m")
    yield SimpleNamespace(index=index, label_studio=Studio(), project_name="p")
    index.close()


def lines(context: Any) -> tuple[str, ...]:
    return verify_queue(context).lines


def test_a_right_queue_costs_one_look(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report = verify_queue(context)
    assert (report.published, report.batch, report.faults) == ("v-r2", 3, ())
    assert context.label_studio.requests == ["first 100"]
    assert "serves its batch of 3 in order" in caplog.text


def test_a_wrong_order_names_the_tasks_and_is_a_warning(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    context.label_studio.order = (13, 11, 12, 10, 14)
    assert lines(context) == ("queue: the batch is not served by rank: task 13 (i3), task 11 (i1), task 12 (i2)",)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_tasks_that_people_have_touched_since_are_no_fault(context: Any) -> None:
    context.label_studio.touched = {11, 10}
    assert lines(context) == ()
    assert context.label_studio.requests[-1] == "tasks [11, 10]"


def test_a_task_without_a_score_is_missing_and_not_out_of_order(context: Any) -> None:
    context.label_studio.lost, context.label_studio.unscored = {13}, (13, 99)
    context.label_studio.versions = {"v-r2": 4}
    assert lines(context) == ("queue: no prediction with a score in task 13 (i3)",)


def test_tasks_of_other_images_do_not_count(context: Any) -> None:
    context.label_studio.order = (99, *RIGHT)
    assert lines(context) == ()


def test_more_predictions_than_tasks_are_looked_for_by_name(context: Any) -> None:
    context.label_studio.versions = {"v-r2": 12}
    assert lines(context) == ()
    assert context.label_studio.requests[-1] == "doubled v-r2"
    context.label_studio.doubled = {task: [1] for task in (*RIGHT, 15, 16)}
    (line,) = lines(context)
    assert line.endswith("task 11 (i1), task 13 (i3), task 10 (i0), task 12 (i2), task 14 (i4) and 2 more")


def test_equal_scores_behind_the_batch_are_named(context: Any) -> None:
    context.label_studio.scores = {14: 0.3}
    (line,) = lines(context)
    assert line == "queue: the same score as the next one in task 12 (i2)"


def test_the_version_of_an_unfinished_round_is_expected(context: Any) -> None:
    context.index.open_round("p")
    studio = context.label_studio
    studio.versions = {"v-r2": 5, "w-r0": 3, "w-r00": 1}
    assert [fault.kind for fault in look_at_queue(studio, context.index, "p").faults] == ["strange"]
    studio.versions, studio.version = {"w-r0": 5}, "w-r0"
    (fault,) = look_at_queue(studio, context.index, "p").faults
    assert (fault.kind, "celloop round" in fault.text) == ("unfinished", True)
    context.index.update_round("p", 0, status="done")
    kinds = [fault.kind for fault in look_at_queue(studio, context.index, "p").faults]
    assert kinds == ["version", "strange"]


def test_predictions_without_a_version_are_strange_too(context: Any) -> None:
    context.index.open_round("p")
    context.label_studio.versions = {"v-r2": 5, "": 2}
    assert lines(context) == ("queue: predictions of versions that are not published: 2 of ''",)


def test_nothing_published_or_open_is_no_fault_and_asks_nothing(context: Any) -> None:
    context.index.set_images("p", {f"i{n}": {"state": "labelled"} for n in range(5)})
    assert lines(context) == ()
    context.index.set_images("p", {"i0": {"state": "open"}})
    context.index.set_published("p", "", "")
    assert lines(context) == ()
    assert context.label_studio.requests == []


def test_images_that_came_after_the_publish_are_not_missed(context: Any) -> None:
    context.index.set_images("p", {"i2": {"score": None}})
    context.label_studio.order, context.label_studio.unscored = (11, 13, 10, 14), (12,)
    context.label_studio.versions = {"v-r2": 4}
    assert lines(context) == ()
