"""Pictures for the documents: a real image in Label Studio's page before a click, after it, and after a refining click.

    python benchmarks/draw_click_pages.py --out docs/images --image STEM [--steps 400] [--sam FILE]

Starts the services and a headless Chromium, trains a small model on the other images of examples/dsb2018-mini, takes it
into service with its cells as pre-labels (clicks are answered by SAM where a file of weights is given), removes its
largest cell (mostly several that touch), clicks into it, and then, with Alt, into its far end: "not this". Writes
`click-before.png`, `click.png` and `click-refined.png` and prints one JSON line with the areas of the two answers.
"""

import argparse
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from bench_dense_page import middle, place_of_label
from harness import ROOT, report
from served_project import publish_cells, services, wait_for_model, wait_for_sam

from flows.context import LoopContext, open_context
from flows.folders import train_folder
from flows.local.workspace import Workspace
from flows.start import start_project
from loop.config import load_config
from loop.data.store import read_image
from loop.labelstudio.results import from_results
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import load_checkpoint
from loop.types import Instances

sys.path.insert(0, str(ROOT / "tests" / "services"))
from browser import find_chromium, sitting_person

MINI = ROOT / "examples" / "dsb2018-mini"
NAME = "click-pages"


def far_end(cells: Instances, i: int) -> tuple[float, float]:
    """A pixel 4 px inside a cell, the farthest from its middle, in percent of the image."""
    depth = cv2.distanceTransform(np.pad(cells.masks[i].astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    rows, columns = np.nonzero(depth >= min(4.0, depth.max()))
    height, width = cells.shape
    left, top = cells.boxes_xyxy[i][:2].tolist()
    x, y = middle(cells, i)
    far = int(np.hypot(columns + left + 0.5 - x / 100 * width, rows + top + 0.5 - y / 100 * height).argmax())
    return (left + columns[far] + 0.5) / width * 100, (top + rows[far] + 0.5) / height * 100


def copy_images(shown: Path, teaching: Path, stem: str) -> None:
    """One image of the sample to be shown, the others with their labels to be learnt from."""
    for folder in (teaching / "images", teaching / "labels", shown / "images"):
        folder.mkdir(parents=True)
    for path in sorted((MINI / "images").iterdir()):
        if path.stem == stem:
            shutil.copy(path, shown / "images")
        else:
            shutil.copy(path, teaching / "images")
            shutil.copy(MINI / "labels" / path.name, teaching / "labels")


def offer(workspace: Workspace, given: argparse.Namespace) -> tuple[LoopContext, Instances]:
    """A project of the one image with a trained model in service, and the cells that it offers there."""
    teaching, shown, model = (workspace.root.parent / name for name in ("teaching", "shown", "model"))
    copy_images(shown, teaching, given.image)
    settings = {"train.max_steps": given.steps, "model.name": "unet", "model.base": 16}
    if given.sam is not None:
        settings |= {"click.model": "sam", "pseudo.sam.checkpoint": str(given.sam.resolve())}
    config = load_config(None, settings)
    start_project(workspace, shown / "images", NAME, config)
    context = open_context(workspace, NAME)
    train_folder(teaching, model, config, lambda step, values: None)
    with context.registry.start_run("pages", params={}, tags={"seed": 0}) as run:
        version = context.registry.register(run.run_id, model, tags={"seed": 0})
    context.registry.promote(version, "the only one", {})
    (row,) = context.index.images(NAME)
    checkpoint = load_checkpoint(model)
    segmenter = Segmenter(checkpoint.net, checkpoint.model_config, checkpoint.instance_config)
    cells = segmenter.predict(read_image(Path(row.path)).pixels, image_id=row.image_id).instances
    publish_cells(context, {row.image_id: cells}, version)
    wait_for_model(context, version.label)
    if given.sam is not None:
        wait_for_sam(context)
    return context, cells


def click_and_refine(context: LoopContext, cells: Instances, out: Path, folder: Path) -> list[int]:
    """Draws the three pictures; areas of the two answers, px."""
    i = int(np.argmax([np.count_nonzero(mask) for mask in cells.masks]))
    areas = []
    with sitting_person(find_chromium(), context.endpoints, folder) as person:
        person.log_in()
        person.open_project(context.project.ls_project_id)
        person.label_all_tasks()
        person.zoom_out()
        person.page.screenshot(path=out / "click-before.png")
        person.delete_region(*middle(cells, i))
        person.switch_on()
        person.take_tool("key-point-tool")
        clicks = ((middle(cells, i), False, "click.png"), (far_end(cells, i), True, "click-refined.png"))
        for place, negative, name in clicks:
            person.click_for_cell(place_of_label(context.interface), *place, negative=negative)
            person.page.wait_for_timeout(500)
            person.page.screenshot(path=out / name)
            answer = from_results(person.suggested(), context.interface, cells.shape).instances
            areas.append(int(sum(np.count_nonzero(mask) for mask in answer.masks)))
    return areas


def main() -> None:
    """Starts everything, draws, stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image", required=True, help="stem of the image that is shown")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sam", type=Path, help="weights of a SAM that answers the clicks")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with services() as workspace:
        context, cells = offer(workspace, given)
        areas = click_and_refine(context, cells, given.out, workspace.root.parent)
        report("click_pages", image=given.image, cells=len(cells), area_px=areas)


if __name__ == "__main__":
    main()
