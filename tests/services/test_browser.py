"""A person labels the first task of the queue in Label Studio's own pages, and the loop gets what they saw."""

import time
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import numpy.typing as npt
import pytest

from browser import Person, find_chromium, sitting_person
from flows.annotator import label_tasks
from flows.context import LoopContext
from flows.freeze import Frozen, freeze
from flows.local.workspace import Workspace
from flows.round import run_round
from flows.sync import sync
from loop.adapters.index import ImageRow
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import from_results
from loop.masks import from_label_image, to_label_image
from loop.metrics.matching import iou_matrix, match
from loop.types import Instances
from stack import DrawnProject, make_project

pytestmark = pytest.mark.services

NAME = "browser-test"
SURE = {
    "model.base": 8,
    "train.max_steps": 120,
    "train.learning_rate": 5e-3,
    "train.warmup_steps": 10,
    "train.ema": 0.9,
    "select.first_strategy": "random",
    "select.strategy": "uncertain_diverse",
    "select.embedding": "model",
    "select.quick_first": 0,
}
"""About 3 s of training, enough to find drawn cells; the queue begins with an image that fits on the screen."""


@pytest.fixture(scope="session")
def chromium() -> str:
    return find_chromium()


@pytest.fixture(scope="module")
def project(chromium: str, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> DrawnProject:
    """One model in service and its outlines published for the next batch; each test takes the next task of it."""
    drawn = make_project(workspace, tmp_path_factory.mktemp("drawn") / "drawn", NAME, n=12, **SURE)
    run_round(drawn.context)
    label_tasks(drawn.context, drawn.labels, 6)
    run_round(drawn.context)
    return drawn


@pytest.mark.parametrize(("in_ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_chromium_the_test_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.delenv("CELLOOP_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", in_ci)
    with pytest.raises(outcome, match=r"no chromium or .*install it \(apt install chromium\)"):
        find_chromium()


def test_a_person_labels_the_first_task_of_the_queue(chromium: str, project: DrawnProject, tmp_path: Path) -> None:
    context = project.context
    first, second = queue(context)[:2]
    wait_until_served(context, first)
    with sitting_person(chromium, context.endpoints, tmp_path) as person:
        person.log_in()
        person.open_project(context.project.ls_project_id)
        person.label_all_tasks()
        assert person.task_id() == first.task_id
        offered = see_outlines(person, project, first)
        gone = largest(offered)
        x, y = middle(offered, gone)
        person.delete_region(x, y)
        person.until(lambda: not colour_at(person.tinted(), x, y), "the deleted outline leaves the picture")
        click_cell_back(person, context.interface, x, y)
        person.until(lambda: colour_at(person.tinted(), x, y), "the clicked cell is drawn")
        shown = read(person.regions(), context.interface, first)
        annotation_id = person.submit()
        assert person.task_id() == second.task_id
        assert not person.strange_hosts
    assert len(shown) == len(offered)
    restored = iou_matrix(shown, offered)[:, gone]
    assert restored.max() > 0.9
    sync(context)
    frozen = freeze(context)
    assert frozen.snapshot.annotation_ids[first.image_id] == [annotation_id]
    stored = labelled(frozen, first)
    assert len(stored) == len(shown)
    assert {origin.source for origin in stored.origins} == {"human-accepted"}  # the clicked cell too
    assert len(match(iou_matrix(stored, shown), 0.99)) == len(shown)
    assert len(match(iou_matrix(stored, truth(project, first)), 0.6)) == len(shown)


def test_a_person_refines_a_click_and_draws_a_box(chromium: str, project: DrawnProject, tmp_path: Path) -> None:
    context = project.context
    row = queue(context)[0]
    wait_until_served(context, row)
    with sitting_person(chromium, context.endpoints, tmp_path) as person:
        person.page.set_viewport_size({"width": 1300, "height": 1200})  # a box needs the whole image on the screen
        person.log_in()
        person.open_project(context.project.ls_project_id)
        person.label_all_tasks()
        assert person.task_id() == row.task_id
        person.zoom_out()
        offered = read(person.regions(), context.interface, row)
        refined, boxed = np.argsort([np.count_nonzero(mask) for mask in offered.masks])[-2:].tolist()
        for cell in (refined, boxed):
            person.delete_region(*middle(offered, cell))
        person.switch_on()
        person.take_tool("key-point-tool")
        centre, edge = middle(offered, refined), far_end(offered, refined)
        point = place_of_label(context.interface, "keypointlabels")
        person.click_for_cell(point, *centre)
        (whole,) = read(person.suggested(), context.interface, row).masks
        assert is_inside(person.suggested(), context.interface, row, edge)
        person.click_for_cell(point, *edge, negative=True)
        (cut,) = read(person.suggested(), context.interface, row).masks
        assert np.count_nonzero(cut) < 0.9 * np.count_nonzero(whole)
        assert is_inside(person.suggested(), context.interface, row, centre)
        assert not is_inside(person.suggested(), context.interface, row, edge)
        person.accept()
        person.take_tool("rectangle-tool")
        person.drag_for_cell(place_of_label(context.interface, "rectanglelabels"), *corners(offered, boxed))
        (found,) = read(person.suggested(), context.interface, row).masks
        person.accept()
        shown = read(person.regions(), context.interface, row)
        annotation_id = person.submit()
    assert len(shown) == len(offered)
    assert iou_matrix(shown, offered)[:, boxed].max() > 0.9
    sync(context)
    frozen = freeze(context)
    assert frozen.snapshot.annotation_ids[row.image_id] == [annotation_id]
    stored = labelled(frozen, row)
    assert len(match(iou_matrix(stored, shown), 0.99)) == len(offered)
    areas = sorted(np.count_nonzero(mask) for mask in stored.masks)
    assert {np.count_nonzero(cut), np.count_nonzero(found)} <= set(areas)


def labelled(frozen: Frozen, row: ImageRow) -> Instances:
    """The cells of an image that the snapshot holds."""
    return next(sample for sample in frozen.snapshot.samples if sample.image.image_id == row.image_id).instances


def queue(context: LoopContext) -> list[ImageRow]:
    """The batch in the order in which the loop chose it."""
    return sorted(
        (row for row in context.index.images(NAME, state="open") if row.rank is not None), key=lambda row: row.rank or 0
    )


def wait_until_served(context: LoopContext, row: ImageRow) -> None:
    """The backend looks for a new champion every few seconds; a click before that finds no model."""
    body = {
        "tasks": [{"id": row.task_id, "data": {"image": row.display}}],
        "project": f"{context.project.ls_project_id}.0",
        "label_config": context.project.label_config,
        "params": {"context": None},
    }
    deadline = time.monotonic() + 40
    while httpx.post(f"{context.endpoints.backend_url}/predict", json=body, timeout=30).status_code != 200:
        assert time.monotonic() < deadline, "the backend does not serve the champion"
        time.sleep(0.5)


def see_outlines(person: Person, project: DrawnProject, row: ImageRow) -> Instances:
    """Looks at the picture: outlines are drawn where the page says, and that is where the cells are."""
    context = project.context
    regions = person.regions()
    published = context.label_studio.predictions(row.task_id or 0)
    assert [region["value"]["points"] for region in regions] == [
        region["value"]["points"] for region in published[0].result
    ]
    person.until(lambda: overlap(person.tinted(), drawn(regions, person.tinted().shape)) > 0.95, "outlines are drawn")
    cells = to_label_image(truth(project, row), on_overlap="score") > 0
    tinted = person.tinted()
    true = cv2.resize(cells.astype(np.uint8), tinted.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    assert overlap(tinted, true) > 0.7
    return read(regions, context.interface, row)


def place_of_label(interface: Interface, kind: str) -> int:
    """Where the first label of the smart control of a kind stands in the row above the image."""
    control = next(control for control in interface.controls if control.kind == kind and control.smart)
    before = interface.controls[: interface.controls.index(control)]
    return sum(len(other.labels) for other in before)


def click_cell_back(person: Person, interface: Interface, x: float, y: float) -> None:
    person.switch_on()
    person.take_tool("key-point-tool")
    person.click_for_cell(place_of_label(interface, "keypointlabels"), x, y)
    assert person.suggestions() == ["polygonregion"]
    person.accept()


def read(regions: list[dict[str, Any]], interface: Interface, row: ImageRow) -> Instances:
    parsed = from_results(regions, interface, (row.height, row.width))
    assert (parsed.prompts_left, parsed.unknown_labels, parsed.unreadable) == (0, (), ())
    return parsed.instances


def truth(project: DrawnProject, row: ImageRow) -> Instances:
    labels = cv2.imread(str(project.labels / f"{row.image_id}.png"), cv2.IMREAD_UNCHANGED)
    assert labels is not None
    return from_label_image(labels.astype(np.int32))


def drawn(regions: list[dict[str, Any]], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """The polygons filled at the size of the picture on screen."""
    canvas = np.zeros(shape, np.uint8)
    for region in regions:
        points = np.array(region["value"]["points"], np.float64) / 100 * shape[::-1]
        cv2.fillPoly(canvas, [points.round().astype(np.int32)], 1)
    return canvas > 0


def overlap(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def largest(cells: Instances) -> int:
    return int(np.argmax([np.count_nonzero(mask) for mask in cells.masks]))


def middle(cells: Instances, i: int) -> tuple[float, float]:
    """The pixel of a cell that lies farthest from its edge, in percent of the image."""
    depth = cv2.distanceTransform(np.pad(cells.masks[i].astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    left, top = cells.boxes_xyxy[i][:2]
    height, width = cells.shape
    return float((left + column + 0.5) / width * 100), float((top + row + 0.5) / height * 100)


def far_end(cells: Instances, i: int) -> tuple[float, float]:
    """A pixel well inside a cell, as far from its middle as there is one, in percent of the image."""
    mask = cells.masks[i]
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    left, top = cells.boxes_xyxy[i][:2]
    height, width = cells.shape
    x, y = middle(cells, i)
    rows, columns = np.nonzero(depth >= 3)
    far = int(np.hypot(rows + top + 0.5 - y / 100 * height, columns + left + 0.5 - x / 100 * width).argmax())
    return float((left + columns[far] + 0.5) / width * 100), float((top + rows[far] + 0.5) / height * 100)


def is_inside(regions: list[dict[str, Any]], interface: Interface, row: ImageRow, place: tuple[float, float]) -> bool:
    """Whether one of the regions covers a place, given in percent."""
    cells = to_label_image(read(regions, interface, row), on_overlap="score")
    return bool(cells[int(place[1] / 100 * row.height), int(place[0] / 100 * row.width)])


def corners(cells: Instances, i: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """A cell's box with a margin of 1 px, in percent of the image."""
    x0, y0, x1, y1 = cells.boxes_xyxy[i].tolist()
    height, width = cells.shape
    low = (max(x0 - 1, 0) / width * 100, max(y0 - 1, 0) / height * 100)
    return low, (min(x1 + 1, width) / width * 100, min(y1 + 1, height) / height * 100)


def colour_at(tinted: npt.NDArray[np.bool_], x: float, y: float) -> bool:
    """Whether there is colour around a place, given in percent; a small dot does not count."""
    row, column = round(y / 100 * tinted.shape[0]), round(x / 100 * tinted.shape[1])
    return bool(tinted[row - 12 : row + 13, column - 12 : column + 13].mean() > 0.8)
