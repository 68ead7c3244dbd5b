"""A person sees doubtful cells in their own colour, declares an area done, and the loop gets both right."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from browser import EDITOR, Person, find_chromium, sitting_person
from flows.context import LoopContext, open_context
from flows.freeze import freeze
from flows.local.workspace import Workspace
from flows.publish import publish
from flows.start import start_project
from flows.sync import load_annotation, sync
from loop.adapters.index import ImageRow
from loop.config import load_config
from loop.data.predictions import StoredPrediction
from loop.masks import from_label_image, from_masks, to_dense
from loop.metrics.matching import iou_matrix
from loop.types import Instances, Origin
from stack import draw_dataset

pytestmark = pytest.mark.services

NAME = "browser-labels"


Offered = tuple[LoopContext, list[ImageRow], dict[str, Instances]]


@pytest.fixture
def offered(workspace: Workspace, tmp_path: Path) -> Offered:
    """A project whose images have their true cells as pre-labels; every other one is doubtful, the last has a hole."""
    images, labels = draw_dataset(tmp_path / "drawn", 2, seed=3)
    start_project(workspace, images, NAME, load_config(None))
    context = open_context(workspace, NAME)
    rows = sorted(context.index.images(NAME), key=lambda row: row.image_id)
    cells = {row.image_id: _with_a_hole(_read(labels / f"{row.image_id}.png", row.image_id)) for row in rows}
    stored = {name: StoredPrediction(found, 0.1, np.zeros(1, np.float32)) for name, found in cells.items()}
    publish(context, 1, None, (), stored, calibrated=stored.keys())
    return context, rows, cells


def _read(path: Path, image_id: str) -> Instances:
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert labels is not None
    found = from_label_image(labels.astype(np.int32), image_id=image_id, source="pseudo", model_version="fused-v1")
    scores = np.where(np.arange(len(found)) % 2, 0.9, 0.3).astype(np.float32)
    return replace(found, scores=scores)


def _with_a_hole(cells: Instances) -> Instances:
    stack = to_dense(cells)
    y, x = np.argwhere(stack[-1]).mean(axis=0).round().astype(int)
    stack[-1, y - 3 : y + 4, x - 3 : x + 4] = False
    fields = {"scores": cells.scores, "image_id": cells.image_id, "source": "pseudo", "model_version": "fused-v1"}
    return from_masks(list(stack), cells.shape, **fields)


def place(context: LoopContext, control: str) -> int:
    """Where the labels of a control begin in the row above the image."""
    before = [item.name for item in context.interface.controls].index(control)
    return sum(len(item.labels) for item in context.interface.controls[:before])


def inside(cells: Instances, i: int) -> tuple[float, float]:
    depth = cv2.distanceTransform(np.pad(to_dense(cells)[i].astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return (x + 0.5) / cells.shape[1] * 100, (y + 0.5) / cells.shape[0] * 100


def test_doubtful_cells_and_a_done_area(offered: Offered, tmp_path: Path) -> None:
    context, rows, cells = offered
    with sitting_person(find_chromium(), context.endpoints, tmp_path) as person:
        person.log_in()
        person.open_project(context.project.ls_project_id)
        person.label_all_tasks()
        row = next(row for row in rows if row.task_id == person.task_id())
        found = cells[row.image_id]
        before = person.regions()
        assert [region["value"][region["type"]] for region in before] == [
            ["Cell"] if i % 2 else ["Cell?"] for i in range(len(found))
        ]
        assert [region["score"] for region in before] == [0.9 if i % 2 else 0.3 for i in range(len(found))]
        x, y = inside(found, 1)
        assert colour_at(person, x, y) == "green"
        assert colour_at(person, *inside(found, 0)) == "amber"
        person.choose_label(place(context, "done"))
        person.drag((2, 2), (97, 60))
        person.until(lambda: len(person.regions()) == len(before) + 1, "the done area is drawn")
        person.page.keyboard.press("Escape")
        stretch(person, before[1], inside(found, 1))
        person.submit()
    sync(context)
    (annotation,) = context.index.annotations(NAME)
    assert annotation.n_regions == len(found)
    stated = {item["id"]: item["origin"] for item in load_annotation(Path(annotation.file))["result"]}
    # Label Studio says so of what was changed too; hence the comparison with what was offered.
    assert stated[before[1]["id"]] == "prediction"
    frozen = freeze(context)
    assert (frozen.left_out, frozen.suspicious) == ((), ())
    (sample,) = frozen.snapshot.samples
    expected = ["human-edited" if i == 1 else "human-accepted" for i in range(len(found))]
    published = context.project.published_version
    assert sample.instances.origins == tuple(Origin(source, published) for source in expected)
    assert sample.instances.labels.tolist() == [0] * len(found)
    for i in (0, *range(2, len(found))):
        assert iou_matrix(sample.instances, found)[i, i] > 0.95
    assert sample.known is not None
    height, width = found.shape
    inner = sample.known[round(0.04 * height) : round(0.58 * height), round(0.04 * width) : round(0.95 * width)]
    assert inner.all()
    assert not sample.known[round(0.8 * height) :].all()


def stretch(person: Person, region: dict[str, Any], middle: tuple[float, float]) -> None:
    """Selects a polygon that lies under the done area and pulls its rightmost corner to the right."""
    person.click(*middle)
    person.page.wait_for_function(f"() => {EDITOR}.selectedRegions.map(r => r.type).includes('polygonregion')")
    corner = max(region["value"]["points"])
    person.drag((corner[0], corner[1]), (corner[0] + 6, corner[1]))
    person.until(
        lambda: person.regions()[1]["value"]["points"] != region["value"]["points"], "the corner that was pulled moves"
    )


def colour_at(person: Person, x: float, y: float) -> str:
    """What the picture on screen is tinted with at a place, given in percent."""
    blue, green, red = person.colour(x, y)
    return "green" if green > red + 20 else "amber" if red > blue + 20 else f"({red}, {green}, {blue})"
