"""When a round does nothing: what a new one would put right starts it, what it could not put right does not."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import round as round_module
from flows.round import _nothing_new
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import QueuedTask, QueueState

FROZEN: Any = SimpleNamespace(snapshot=SimpleNamespace(id="s"), train=(), holdout=(), left_out=(), suspicious=())


class Studio:
    """Three tasks in order; `wrong` is what is not as it should be."""

    def __init__(self) -> None:
        self.wrong: dict[str, Any] = {}

    def queue(self, project: int, *, first: int) -> QueueState:
        tasks = tuple(QueuedTask(number, number / 4, False, 1) for number in (1, 2, 3))
        right = {"version": "v-r0", "sampling": "Uncertainty sampling", "versions": {"v-r0": 3}, "first": tasks}
        return QueueState(**{**right, "scored": 3, "unscored": (), **self.wrong})

    def queued_tasks(self, project: int, tasks: list[int]) -> dict[int, QueuedTask]:
        return {number: QueuedTask(number, number / 4, False, 1) for number in tasks}


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(round_module, "_step", lambda *_: "page")
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project("p", ls_project_id=1, root=tmp_path, label_config="<View/>")
    rows = [ImageRow(project.id, f"i{n}", "0" * 64, "", "", n, score=0.5, rank=n) for n in (1, 2, 3)]
    index.add_images("p", rows)
    index.set_published("p", "v-r0", "")
    index.open_round("p")
    index.update_round("p", 0, status="done", snapshot_id="s", published_version="v-r0")
    yield SimpleNamespace(
        index=index,
        label_studio=Studio(),
        registry=SimpleNamespace(champion=lambda: None),
        project_name="p",
        project=index.project("p"),
    )
    index.close()


def test_where_nothing_is_wrong_nothing_is_done(context: Any) -> None:
    found = _nothing_new(context, FROZEN)
    assert found is not None
    assert (found.made, found.left_out) == (False, ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "w-r0"},
        {"versions": {"v-r0": 3, "w-r9": 1}},
        {"unscored": (2,), "first": (QueuedTask(1, 0.1, False, 1), QueuedTask(3, 0.3, False, 1))},
        {"first": tuple(QueuedTask(number, number / 4, False, 1) for number in (2, 1, 3))},
        {"first": tuple(QueuedTask(number, number / 4, False, 1) for number in (1, 3))},
    ],
)
def test_what_publishing_puts_right_makes_a_round(context: Any, wrong: dict[str, Any]) -> None:
    context.label_studio.wrong = wrong
    assert _nothing_new(context, FROZEN) is None


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sampling": "Sequential sampling"}, "the project is set to 'Sequential sampling'"),
        ({"versions": {"v-r0": 3, "": 2}}, "2 of ''"),
    ],
)
def test_what_publishing_leaves_as_it_is_makes_no_round_and_is_told(
    context: Any, wrong: dict[str, Any], told: str
) -> None:
    context.label_studio.wrong = wrong
    found = _nothing_new(context, FROZEN)
    assert found is not None
    (line,) = found.left_out
    assert told in line


def test_a_tile_that_cannot_be_shown_makes_no_round(context: Any) -> None:
    tile = ImageRow(context.project.id, "i9.t0000-0000", "0" * 64, "", "", parent="i9")
    context.index.add_images("p", [tile])
    assert _nothing_new(context, FROZEN) is not None
    context.index.set_images("p", {tile.image_id: {"task_id": 4}})
    assert _nothing_new(context, FROZEN) is None


def test_with_no_open_image_nothing_is_done(context: Any) -> None:
    context.index.set_images("p", {f"i{n}": {"state": "labelled"} for n in (1, 2, 3)})
    context.label_studio.wrong = {"sampling": "Sequential sampling"}
    assert _nothing_new(context, FROZEN) is not None
