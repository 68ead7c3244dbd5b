"""Doubtful cells, done areas and origins on their way through publish, sync, freeze and export."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from flows import export as export_module
from flows.export import export
from flows.freeze import freeze
from flows.local.workspace import Workspace
from flows.publish import publish
from flows.sync import load_annotation, sync
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import Annotation, TaskPrediction
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import LoopConfig
from loop.data.predictions import StoredPrediction
from loop.data.snapshot import load_snapshot
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_masks, to_dense
from loop.types import Instances, Origin

SHAPE = (20, 24)
NAMES = {"doubtful": "Cell?", "done": "Done area"}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
STEMS = ("a", "b", "c")


class FakeLabelStudio:
    """Tasks with their annotations and the predictions that were published for them."""

    def __init__(self) -> None:
        self.published: dict[int, list[dict[str, Any]]] = {}
        self.version = ""
        self.submitted: dict[int, list[Annotation]] = {}
        self.asked = 0

    def publish(self, number: int, version: str, entries: list[TaskPrediction], **_: Any) -> SimpleNamespace:
        self.version, self.published = version, {entry.task_id: list(entry.result) for entry in entries}
        return SimpleNamespace(created=len(entries), kept=0)

    def set_tab(self, *_: Any, **__: Any) -> None: ...

    def set_task_data(self, *_: Any, **__: Any) -> None: ...

    def predictions(self, task_id: int) -> list[SimpleNamespace]:
        self.asked += 1
        found = self.published.get(task_id)
        return [] if found is None else [SimpleNamespace(id=task_id, model_version=self.version, result=found)]

    def submit(self, task_id: int, result: list[dict[str, Any]], parent: int | None, at: datetime = NOON) -> None:
        self.submitted[task_id] = [
            Annotation(
                id=10 + task_id,
                task_id=task_id,
                result=result,
                was_cancelled=False,
                created_at=at,
                updated_at=at,
                lead_time_s=None,
                completed_by=1,
                parent_prediction=parent,
                ground_truth=False,
            )
        ]

    def tasks(self, number: int, updated_after: datetime | None = None) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(id=task, updated_at=found[0].updated_at, total_annotations=1, cancelled_annotations=0)
            for task, found in self.submitted.items()
        ]

    def annotations(self, task_id: int) -> list[Annotation]:
        return self.submitted[task_id]

    def project(self, number: int) -> dict[str, int]:
        return {"task_number": 3}


def make_context(root: Path, xml: str) -> Any:
    for name in STEMS:
        (root / name).touch()
    index = Index(f"sqlite:///{root / 'index.sqlite3'}")
    project = index.add_project("p", ls_project_id=1, root=root, label_config=xml)
    index.add_images(
        "p",
        [
            ImageRow(project.id, name, "0" * 64, str(root / name), "", number, "", height=20, width=24)
            for number, name in enumerate(STEMS, start=1)
        ],
    )

    class Context(SimpleNamespace):
        @property
        def project(self) -> Any:
            return index.project("p")

    return Context(
        index=index,
        interface=Interface.parse(xml, **NAMES),
        workspace=Workspace(root),
        label_studio=FakeLabelStudio(),
        project_name="p",
        config=LoopConfig(),
    )


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Any]:
    made = make_context(tmp_path, label_config(**NAMES))
    yield made
    made.index.close()


def cells(*scores: float) -> Instances:
    stack = np.zeros((len(scores), *SHAPE), bool)
    for i, mask in enumerate(stack):
        mask[2:8, 8 * i + 1 : 8 * i + 7] = True
    return from_masks(list(stack), SHAPE, scores=scores, source="model", model_version="m-v3")


def published(context: Any, *scores: float, calibrated: bool) -> list[dict[str, Any]]:
    stored = {"a": StoredPrediction(replace(cells(*scores), image_id="a"), 0.3, np.zeros(2, np.float32))}
    version = ModelVersion("m", 3, "r", "m-v3", {})
    sure = {"a"} if calibrated else set()
    assert publish(context, 2, version, (), stored, calibrated=sure).endswith("-r2")
    regions: list[dict[str, Any]] = context.label_studio.published[1]
    assert context.label_studio.published[2] == []
    return regions


def named(regions: list[dict[str, Any]]) -> list[str]:
    return [region["value"][region["type"]][0] for region in regions]


def test_only_calibrated_scores_make_a_cell_doubtful(context: Any) -> None:
    raw = published(context, 0.1, 0.9, calibrated=False)
    assert named(raw) == ["Cell", "Cell"]
    assert [region["score"] for region in raw] == [0.1, 0.9]
    assert named(published(context, 0.1, 0.9, calibrated=True)) == ["Cell?", "Cell"]
    shown = context.config.publish.model_copy(update={"doubtful_below": 0.95})
    context.config = context.config.model_copy(update={"publish": shown})
    assert named(published(context, 0.1, 0.9, calibrated=True)) == ["Cell?", "Cell?"]


def test_raw_scores_beside_calibrated_ones_make_no_cell_doubtful(context: Any) -> None:
    weak = StoredPrediction(cells(0.1), 0.3, np.zeros(2, np.float32))
    both = {name: replace(weak, instances=replace(weak.instances, image_id=name)) for name in "ab"}
    publish(context, 2, ModelVersion("m", 3, "r", "m-v3", {}), (), both, calibrated={"b"})
    shown = context.label_studio.published
    assert (named(shown[1]), named(shown[2])) == (["Cell"], ["Cell?"])


def test_a_project_from_before_the_doubtful_label_is_published_as_ever(tmp_path: Path) -> None:
    made = make_context(tmp_path, label_config())
    regions = published(made, 0.1, 0.9, calibrated=True)
    assert regions == published(made, 0.1, 0.9, calibrated=False)
    assert named(regions) == ["Cell", "Cell"]
    made.index.close()


def shifted(region: dict[str, Any]) -> dict[str, Any]:
    points = [[x, y + 10] for x, y in region["value"]["points"]]
    return {**region, "value": {**region["value"], "points": points}}


def test_origins_reach_the_snapshot_and_outlive_the_prediction(context: Any, tmp_path: Path) -> None:
    studio = context.label_studio
    first, second, third = published(context, 0.1, 0.9, 0.9, calibrated=True)
    drawn = {**shifted(third), "id": "mine", "origin": "manual"}
    studio.submit(1, [first, shifted(second), drawn], parent=1)
    studio.submit(2, [drawn], parent=None)
    assert sync(context).labelled == 2
    assert studio.asked == 1
    frozen = freeze(context)
    by = context.project.published_version
    expected = (Origin("human-accepted", by), Origin("human-edited", by), Origin("human"))
    a, b = load_snapshot(Workspace(tmp_path).snapshots_dir, frozen.snapshot.id).samples
    assert a.instances.origins == expected
    assert a.instances.labels.tolist() == [0, 0, 0]
    assert b.instances.origins == ()
    assert a.known is None
    # The next round replaces the prediction; a person who comes back to the annotation loses nothing.
    context.index.set_published("p", "m-v4-r3", "m-v4")
    studio.published.clear()
    studio.submit(1, [first, shifted(second)], parent=None, at=NOON.replace(hour=13))
    assert sync(context).updated == 1
    assert load_annotation(tmp_path / "annotations" / "p" / "11.json")["started_from"] == by
    assert freeze(context).snapshot.samples[0].instances.origins == expected[:2]


def test_a_lost_link_to_the_prediction_is_found_by_its_version(context: Any) -> None:
    (first, second) = published(context, 0.1, 0.9, calibrated=False)
    context.label_studio.submit(1, [first, shifted(second)], parent=None)
    sync(context)
    origins = [origin.source for origin in freeze(context).snapshot.samples[0].instances.origins]
    assert origins == ["human-accepted", "human-edited"]


def test_bodies_of_an_earlier_celloop_are_read(context: Any) -> None:
    (first, second) = published(context, 0.1, 0.9, calibrated=False)
    context.label_studio.submit(1, [first, second], parent=1)
    sync(context)
    (row,) = context.index.annotations("p")
    body = load_annotation(Path(row.file))
    del body["offered"]
    Path(row.file).write_text(json.dumps(body))
    origins = [origin.source for origin in freeze(context).snapshot.samples[0].instances.origins]
    assert origins == ["human-accepted", "human-accepted"]


def area(x: float, y: float, width: float, height: float) -> dict[str, Any]:
    """A done area, given in percent."""
    return {
        "id": f"area-{x}",
        "from_name": "done",
        "type": "rectanglelabels",
        "original_width": 24,
        "original_height": 20,
        "origin": "manual",
        "value": {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["Done area"]},
    }


@pytest.fixture
def partly(context: Any) -> Any:
    """`a`: the left half is done, a cell lies in the right one. `b`: the same, in the hold-out. `c`: all of it is."""
    drawn = [{**region, "origin": "manual"} for region in to_results(cells(1.0, 1.0, 1.0), context.interface)]
    half, rest = area(0, 0, 50, 100), area(50, 0, 50, 100)
    for task, regions in enumerate(([half, *drawn], [half, *drawn], [half, *drawn, rest]), start=1):
        context.label_studio.submit(task, regions, parent=None)
    context.index.set_images("p", {"b": {"role": "control"}, "c": {"role": "control"}})
    sync(context)
    return context


def test_outside_done_areas_only_the_drawn_cells_teach(partly: Any, tmp_path: Path) -> None:
    frozen = freeze(partly)
    loaded = load_snapshot(Workspace(tmp_path).snapshots_dir, frozen.snapshot.id)
    expected = np.zeros(SHAPE, bool)
    expected[:, :12] = True
    expected[0:10, 15:24] = True  # the third cell, 2:8 x 17:23, and two px around it
    expected[0:10, 7:17] = True  # the second one, 2:8 x 9:15
    for snapshot in (frozen.snapshot, loaded):
        (sample,) = snapshot.split("train")
        assert len(sample.instances) == 3
        np.testing.assert_array_equal(sample.known, expected)
        np.testing.assert_array_equal(to_dense(sample.instances), to_dense(cells(1.0, 1.0, 1.0)))


def test_an_image_done_in_part_cannot_measure(partly: Any) -> None:
    frozen = freeze(partly)
    assert [sample.image.image_id for sample in frozen.holdout] == ["c"]
    assert frozen.holdout[0].known is None
    (line,) = frozen.left_out
    assert line.startswith("b: it was drawn for the hold-out, which must be labelled as a whole")
    assert "(Done area) cover a part" in line


def test_done_areas_are_no_cells_in_counts_and_exports(
    partly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [row.n_regions for row in partly.index.annotations("p")] == [3, 3, 3]
    monkeypatch.setattr(export_module, "sync", lambda _: None)
    report = export(partly, tmp_path / "out", ["coco", "labels"])
    assert (report.images, report.cells, report.left_out) == (3, 9, ())
    assert sorted(path.name for path in (tmp_path / "out" / "done").iterdir()) == ["a.png", "b.png"]
    done = cv2.imread(str(tmp_path / "out" / "done" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert done is not None
    np.testing.assert_array_equal(done, np.repeat(np.arange(24)[None] < 12, 20, axis=0) * np.uint8(255))
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["Cell"]


def test_what_was_offered_is_kept_where_everything_was_drawn_anew(context: Any, tmp_path: Path) -> None:
    regions = published(context, 0.1, 0.9, calibrated=False)
    drawn = [{**shifted(region), "id": f"new{i}", "origin": "manual"} for i, region in enumerate(regions)]
    context.label_studio.submit(1, drawn, parent=1)
    sync(context)
    assert load_annotation(tmp_path / "annotations" / "p" / "11.json")["offered"] == regions
    assert freeze(context).snapshot.samples[0].instances.origins == ()
