"""The review of labels: what is ranked and kept, how it goes on after a kill, and what Label Studio is told."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from pseudo_stage import NAME, Stage, blocks, joined, make_stage

from flows import review as review_module
from flows.review import RANK, REASON, REVIEW, review
from flows.sync import sync
from loop.adapters.label_studio_api import Annotation
from loop.errors import ImageError, InputError, StateError
from loop.labelstudio.interface import label_config
from loop.labelstudio.results import to_results
from loop.masks import to_dense
from loop.models import SEGMENTERS
from loop.training.crossfit import Unseen, crossfit
from loop.training.trainer import Trained
from loop.types import ImageRef, Instances, Sample

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Studio:
    """Tasks and annotations as Label Studio keeps them: writing a task's data moves the task's time, not theirs."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.now = NOON
        self.data: dict[int, dict[str, Any]] = {}
        self.moved: dict[int, datetime] = {}
        self.drawn: dict[int, list[Annotation]] = {}
        self.written: list[int] = []
        self.tabs: dict[str, dict[str, Any]] = {}
        for row in stage.context.index.images(NAME):
            assert row.task_id is not None
            self.data[row.task_id] = {"image": "x.png", "celloop_id": row.image_id}
            self.moved[row.task_id] = NOON
            self.drawn[row.task_id] = []

    def submit(self, image_id: str, cells: Instances) -> None:
        self.now += timedelta(minutes=10)
        task_id = self.stage.context.index.image(NAME, image_id).task_id
        assert task_id is not None
        items = to_results(cells, self.stage.context.interface, tolerance_px=0.0)
        made = Annotation(
            id=100 + task_id,
            task_id=task_id,
            result=items,
            was_cancelled=False,
            ground_truth=False,
            lead_time_s=None,
            completed_by=1,
            parent_prediction=None,
            created_at=self.now,
            updated_at=self.now,
        )
        self.drawn[task_id], self.moved[task_id] = [made], self.now

    def tasks(self, number: int, updated_after: datetime | None = None) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                id=task_id,
                data=dict(self.data[task_id]),
                updated_at=at,
                total_annotations=len(self.drawn[task_id]),
                cancelled_annotations=0,
            )
            for task_id, at in self.moved.items()
            if updated_after is None or at > updated_after
        ]

    def annotations(self, task_id: int) -> list[Annotation]:
        return self.drawn[task_id]

    def predictions(self, task_id: int) -> list[SimpleNamespace]:
        return []

    def project(self, number: int) -> dict[str, int]:
        return {"task_number": len(self.data)}

    def set_task_data(self, task_id: int, data: dict[str, Any]) -> None:
        self.now += timedelta(minutes=10)
        self.data[task_id], self.moved[task_id] = dict(data), self.now
        self.written.append(task_id)

    def set_tab(self, number: int, title: str, ordering: Any, filters: Any, **more: Any) -> None:
        self.tabs[title] = {"ordering": ordering, "filters": filters, **more}

    def shown(self) -> dict[str, tuple[int, str]]:
        return {
            data["celloop_id"]: (data[RANK], data[REASON])
            for data in self.data.values()
            if RANK in data or REASON in data
        }


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    made = make_stage(tmp_path, n=8, cells=5)
    index = made.context.index
    index.add_project(NAME, ls_project_id=1, root=tmp_path, label_config=label_config())
    context = replace(made.context, label_studio=cast(Any, Studio(made)))
    return replace(made, context=context)


def studio_of(stage: Stage) -> Studio:
    return cast(Studio, stage.context.label_studio)


def know(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> list[list[str]]:
    """Cross-fitted models that know the true cells; returns what they were asked, a list a crossfit."""
    asked: list[list[str]] = []

    def knowing(samples: list[Sample], *_: Any, done: dict[str, Unseen], fold_done: Any, **__: Any) -> list[Unseen]:
        asked.append([sample.image.image_id for sample in samples])
        found = {sample.image.image_id: truth_of(stage, sample.image) for sample in samples}
        fold_done(0, found)
        return list(found.values())

    monkeypatch.setattr(review_module, "crossfit", knowing)
    return asked


def truth_of(stage: Stage, image: ImageRef) -> Unseen:
    cells = stage.truth[image.image_id]
    return Unseen(cells, to_dense(cells).any(axis=0).astype(np.float32))


def label_all(stage: Stage, **wrong: Instances) -> None:
    for image_id, cells in stage.truth.items():
        studio_of(stage).submit(image_id, wrong.get(image_id, cells))


def without_first(cells: Instances) -> Instances:
    return cells.take(range(1, len(cells)))


def test_wrong_labels_are_listed_in_the_tab_and_nothing_else(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, stage)
    far = Instances.build((96, 96), [(0, 0, 3, 3)], [np.ones((3, 3), bool)])
    label_all(stage, i02=without_first(stage.truth["i02"]), i05=joined(stage.truth["i05"], far))
    report = review(stage.context)
    assert (report.made, report.images, report.cells) == (True, 8, 8 * 5)
    assert {entry["image_id"] for entry in report.listed} == {"i02", "i05"}
    assert [entry["rank"] for entry in report.listed] == [1, 2]
    studio = studio_of(stage)
    shown = studio.shown()
    assert {image_id: text for image_id, (_, text) in shown.items()} == {
        "i02": "1 cell not drawn though the model sees a cell",
        "i05": "1 cell drawn where the model sees background",
    }
    assert sorted(rank for rank, _ in shown.values()) == [1, 2]
    assert len(studio.written) == 2
    assert all(data["image"] == "x.png" for data in studio.data.values())
    tab = studio.tabs[REVIEW]
    assert tab["ordering"] == ("tasks:data.review_rank",)
    assert tab["numbers"] == ("data.review_rank",)
    assert {"data.image", "data.review_rank", "data.review_reason"} <= set(tab["columns"])
    document = json.loads(Path(report.file).read_text(encoding="utf-8"))
    assert len(document["images"]) == 8
    (place,) = next(entry for entry in document["images"] if entry["image_id"] == "i05")["findings"]
    assert (place["kind"], place["cell"], place["suspicion"]) == ("invented", 5, 1.0)
    assert place["box_xyxy"] == [0, 0, 3, 3]


def test_a_second_review_does_nothing_and_its_marks_are_no_new_labels(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = know(monkeypatch, stage)
    label_all(stage, i02=without_first(stage.truth["i02"]))
    first = review(stage.context)
    studio = studio_of(stage)
    written = list(studio.written)
    found = sync(stage.context)
    assert (found.new, found.updated, found.deleted) == (0, 0, 0)
    second = review(stage.context)
    assert second == replace(first, made=False)
    assert (len(asked), studio.written) == (1, written)
    review(stage.context, folds=2)
    assert len(asked) == 2
    assert studio.written == written
    assert sorted(path.suffix for path in Path(first.file).parent.iterdir()) == [".json", ".json"]


def test_a_mended_label_leaves_the_tab(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = know(monkeypatch, stage)
    label_all(stage, i02=without_first(stage.truth["i02"]), i05=without_first(stage.truth["i05"]))
    assert len(review(stage.context).listed) == 2
    studio_of(stage).submit("i02", stage.truth["i02"])
    report = review(stage.context)
    assert (report.made, len(asked)) == (True, 2)
    assert {image_id: rank for image_id, (rank, _) in studio_of(stage).shown().items()} == {"i05": 1}


def test_a_killed_review_goes_on_with_the_fold_that_it_had_reached(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_all(stage)
    trained: list[set[str]] = []
    dies_at: list[int | None] = [2]
    told: list[str] = []

    def train(samples: list[Sample], model: Any, config: Any, /, *, log: Any, instances: Any) -> Trained:
        if len(trained) == dies_at[0]:
            raise KeyboardInterrupt
        trained.append({sample.image.image_id for sample in samples})
        log(1, {"loss": 0.5})
        return Trained(SEGMENTERS[model.name](model), 1, 0.0, (0.5,), instances)

    monkeypatch.setattr(review_module, "crossfit", partial(crossfit, train=train))
    small = {"name": "unet", "base": 4, "depth": 2}
    config = stage.context.config
    context = replace(stage.context, config=config.model_copy(update={"model": config.model.model_copy(update=small)}))
    with pytest.raises(KeyboardInterrupt):
        review(context, tell=lambda step, done, total, **_: told.append(f"{step}: {done} of {total}"))
    assert told == [f"training model {k} of 3 that checks labels: 1 of 2" for k in (1, 2)]
    dies_at[0] = None
    report = review(context)
    assert (report.made, len(trained), report.images) == (True, 3, 8)
    assert not set.intersection(*trained)


def test_the_champion_sees_the_hold_out_only(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, stage)
    label_all(stage)
    index = stage.context.index
    sync(stage.context)
    index.set_images(NAME, {name: {"role": "control"} for name in ("i01", "i02", "i03")})
    index.set_images(NAME, {"i03": {"taught": True}})
    stage.learn()
    looked: list[str] = []

    def look(segmenter: Any, image: ImageRef) -> Unseen:
        looked.append(image.image_id)
        cells = blocks(image.image_id, 1) if image.image_id == "i02" else stage.truth[image.image_id]
        return Unseen(cells, to_dense(cells).any(axis=0).astype(np.float32))

    monkeypatch.setattr(review_module, "look", look)
    monkeypatch.setattr(review_module, "load_segmenter", lambda context, version: None)
    report = review(stage.context)
    assert looked == ["i01", "i02"]
    document = json.loads(Path(report.file).read_text(encoding="utf-8"))
    assert document["champion"] == f"celloop-{NAME}-v1"
    assert report.listed == ()  # the two models do not agree on i02, so nobody is sure


def test_an_image_that_changed_is_left_out_and_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = know(monkeypatch, stage)
    label_all(stage)
    rows = stage.context.index.images(NAME)
    Path(rows[0].path).unlink()
    Path(rows[1].path).write_bytes(b"another image")
    report = review(stage.context)
    assert asked == [[f"i{i:02d}" for i in range(2, 8)]]
    assert [line.split(":")[0] for line in report.left_out] == ["i00", "i01"]
    assert "has changed" in report.left_out[1]
    for row in rows:
        Path(row.path).unlink(missing_ok=True)
    studio_of(stage).submit("i05", without_first(stage.truth["i05"]))
    with pytest.raises(ImageError, match="all 8 labelled images"):
        review(stage.context)


def test_what_cannot_be_reviewed_is_said(stage: Stage) -> None:
    with pytest.raises(StateError, match="no labelled image"):
        review(stage.context)
    studio_of(stage).submit("i02", stage.truth["i02"])
    with pytest.raises(InputError, match="second slide"):
        review(stage.context)


def test_at_most_a_fifth_of_the_images_is_listed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, stage)
    monkeypatch.setattr(review_module, "LISTED_LEAST", 1)
    label_all(stage, **{name: without_first(cells) for name, cells in stage.truth.items() if name < "i04"})
    report = review(stage.context)
    assert [entry["rank"] for entry in report.listed] == [1, 2]  # a fifth of 8, rounded up
