"""What people's work has cost so far, and what correcting a prediction is expected to cost.

An annotation is compared with what was offered once. What came of it is kept beside the annotation's body, as
NUMBER.effort.json, until the annotation changes; the ledger and the costs are both read from there.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flows.context import LoopContext, shows_a_model
from flows.sync import load_annotation
from loop.adapters.index import AnnotationRow, ImageRow
from loop.data.text_file import write_text
from loop.effort.cost import CostModel, Observation, fit_cost
from loop.effort.edits import Outcome, compare
from loop.effort.expected import Rates, expected_seconds, learn_rates
from loop.errors import LabelError, LoopError
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import from_results
from loop.types import Instances

logger = logging.getLogger(__name__)

KEPT_IOU = 0.95
"""Offered and submitted cells went through the same polygons, so one that nobody touched has IoU 1; this leaves room
for a pixel of the smallest cells (21 px in examples/dsb2018-mini)."""


@dataclass(frozen=True)
class Work:
    """One annotation beside what it started from.

    `predicted`: what a model said was on screen, be it 0 cells. `started_from` is the published version then. `seconds`
    is None where Label Studio did not measure them.
    """

    annotation: AnnotationRow
    outcome: Outcome
    predicted: bool
    started_from: str
    seconds: float | None


@dataclass(frozen=True)
class Effort:
    """What an action costs, and what a person is expected to do to a prediction."""

    cost: CostModel
    rates: Rates

    def seconds(self, instances: Instances) -> float:
        """Seconds that a person is expected to need to correct a prediction; NonFiniteError names its image."""
        return expected_seconds(instances, self.cost, self.rates)


def cost_model(context: LoopContext) -> Effort:
    """Costs and rates learnt from all that was labelled in a project; the priors where nothing was.

    Costs O(labelled images): what is known of every annotation is read once.
    """
    works = observations(context)
    measured = [
        Observation(work.outcome.edits, work.seconds, work.annotation.image_id)
        for work in works
        if work.seconds is not None
    ]
    effort = Effort(
        fit_cost(measured, context.config.effort), learn_rates(work.outcome for work in works if work.predicted)
    )
    logger.info("effort in %s: %s, %s", context.project_name, effort.cost, effort.rates)
    return effort


def observations(context: LoopContext) -> list[Work]:
    """Every annotation of a labelled image, by image, beside what it started from.

    Skipped tasks are no work on cells, and where only areas were declared done the rest of the prediction was not
    looked at; both are left out, and so is what cannot be read, with a line in the log. Only annotations that are new
    or have changed are compared.

    Raises:
        OSError: what was found cannot be kept.
    """
    images = {row.image_id: row for row in context.index.images(context.project_name) if row.state == "labelled"}
    interface = context.interface
    works: list[Work] = []
    for annotation in context.index.annotations(context.project_name):
        image = images.get(annotation.image_id)
        if image is None or annotation.cancelled:
            continue
        known = _known(annotation)
        if known is None:
            try:
                known = _compared(annotation, image, interface, context.project_name)
            except (OSError, ValueError, KeyError, LoopError) as error:
                logger.warning(
                    "annotation %d of %s says nothing of effort: %s", annotation.annotation_id, image.image_id, error
                )
                continue
            write_text(_kept_at(annotation), json.dumps(known))
        if known["whole"]:
            works.append(_work(annotation, known))
    return works


def _kept_at(annotation: AnnotationRow) -> Path:
    return Path(annotation.file).with_suffix(".effort.json")


def _known(annotation: AnnotationRow) -> dict[str, Any] | None:
    """What was found of this content of the annotation before; None where it has not been looked at."""
    path = _kept_at(annotation)
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = document["content"] == _content(annotation)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); annotation %d is compared anew", path, error, annotation.annotation_id)
        return None
    return document if same else None


def _content(annotation: AnnotationRow) -> str:
    """Names the annotation's content and the rule by which it is compared."""
    return f"{annotation.updated_at.isoformat()} kept {KEPT_IOU}"


def _work(annotation: AnnotationRow, known: dict[str, Any]) -> Work:
    outcome = Outcome(
        np.array(known["scores"], np.float32),
        np.array(known["iou"], np.float64),
        *(np.array(known[name], np.bool_) for name in ("kept", "edited", "added")),
    )
    return Work(annotation, outcome, known["predicted"], known["started_from"], _seconds(annotation))


def _compared(annotation: AnnotationRow, image: ImageRow, interface: Interface, project: str) -> dict[str, Any]:
    """The document of an annotation beside what it started from; `whole` is false where it covers a part of the image.

    Raises:
        LabelError: it cannot be read, or says nothing of what was offered.
    """
    body = load_annotation(Path(annotation.file))
    started_from = str(body["started_from"])
    if started_from and "offered" not in body:
        raise LabelError("an earlier celloop kept it without what was offered; sync cannot find that again")
    shape = (image.height, image.width)
    drawn = from_results(body["result"], interface, shape, image_id=image.image_id)
    offered = from_results(body.get("offered", ()), interface, shape, image_id=image.image_id, source="model")
    faults = [f"unknown label {name}" for name in drawn.unknown_labels] + [*drawn.unreadable, *offered.unreadable]
    if faults:
        raise LabelError("; ".join(faults))
    if not drawn.whole:
        return {"content": _content(annotation), "whole": False}
    linked = body.get("parent_prediction") is not None and shows_a_model(project, started_from)
    outcome = compare(offered.instances, drawn.instances, kept_iou=KEPT_IOU)
    return {
        "content": _content(annotation),
        "whole": True,
        "started_from": started_from,
        "predicted": bool(body.get("offered")) or linked,
        **{name: values.tolist() for name, values in outcome._asdict().items()},
    }


def _seconds(annotation: AnnotationRow) -> float | None:
    """Measured seconds; None where there are none, or no number above 0 (bulk actions and scripts send such)."""
    seconds = annotation.lead_time_s
    if seconds is None or (math.isfinite(seconds) and seconds > 0):
        return seconds
    logger.warning("annotation %d of %s took %s s; left out", annotation.annotation_id, annotation.image_id, seconds)
    return None
