"""A simulated annotator: takes the task that Label Studio serves, submits the known masks, as a person's browser does.

For the demo and the tests. The labels lie apart from the images that the loop sees.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.context import LoopContext
from loop.data.store import read_label_image
from loop.errors import StateError
from loop.labelstudio.results import to_results
from loop.masks import from_label_image

logger = logging.getLogger(__name__)

SECONDS_AN_IMAGE = 8.0
SECONDS_A_CELL = 4.0


@dataclass(frozen=True)
class Submitted:
    """One submitted task: which image, how many cells, and the annotation's id."""

    image_id: str
    cells: int
    annotation_id: int


def label_tasks(
    context: LoopContext, labels: Path, count: int, tell: Callable[[int, int], None] | None = None
) -> list[Submitted]:
    """Labels the next `count` tasks in the order in which Label Studio serves them.

    Args:
        context: the project.
        labels: folder of 16-bit label images STEM.png.
        count: how many tasks; fewer when the queue ends.
        tell: called as tell(done, count).

    Raises:
        StateError: there is no label image for a served task.
        LabelError, ImageError: a label image cannot be read.
    """
    submitted: list[Submitted] = []
    for done in range(1, count + 1):
        task = context.label_studio.next_task(context.project.ls_project_id)
        if task is None:
            break
        submitted.append(_submit(context, labels, task))
        if tell is not None:
            tell(done, count)
    return submitted


def _submit(context: LoopContext, labels: Path, task: dict[str, Any]) -> Submitted:
    image_id = str(task["data"]["celloop_id"])
    path = labels / f"{image_id}.png"
    if not path.is_file():
        raise StateError(f"no label image {path.name} for task {task['id']} in {labels.name}/")
    cells = from_label_image(read_label_image(path), image_id=image_id)
    regions = to_results(cells, context.interface, tolerance_px=context.config.publish.tolerance_px)
    for region in regions:
        region.pop("score", None)
        region["origin"] = "manual"
    predictions = task.get("predictions") or []
    annotation_id = context.label_studio.submit(
        int(task["id"]),
        regions,
        lead_time_s=SECONDS_AN_IMAGE + SECONDS_A_CELL * len(cells),
        unique_id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"celloop/{context.project_name}/{task['id']}")),
        parent_prediction=predictions[0]["id"] if predictions else None,
    )
    logger.info("simulated annotator: task %s (%s), %d cells", task["id"], image_id, len(cells))
    return Submitted(image_id, len(cells), annotation_id)
