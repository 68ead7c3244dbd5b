"""Step 8: one self-contained page that says what was learnt, what it cost and what to do next."""

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from jinja2 import Environment, PackageLoader, select_autoescape

from flows.advice import next_step, points
from flows.context import LoopContext, image_ref
from flows.curves import live_curve, reliability_curve, round_curve
from flows.effort import cost_model
from flows.freeze import newest_annotations, read_annotation, split_nuclei
from flows.ledger_page import corrections
from flows.overlay import overlay
from loop.adapters.index import AnnotationRow, ImageRow, RoundRow
from loop.data.predictions import PredictionStore, StoredPrediction
from loop.data.store import read_image
from loop.data.text_file import write_text
from loop.errors import ImageError, LabelError
from loop.metrics.instance import image_ap
from loop.types import Instances, UInt8Array

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """A hold-out image with the champion's cells, the person's, and the AP of the one against the other."""

    image: ImageRow
    stored: StoredPrediction
    person: Instances
    ap: float


@dataclass(frozen=True)
class Shown:
    """A hold-out image on the page: its name, the champion's AP on it, and the picture as a data address."""

    image_id: str
    ap: float
    picture: str


def write_report(context: LoopContext) -> Path:
    """Writes `reports/PROJECT.html` in the workspace and returns its path; every number is read from the index."""
    project = context.project
    images = context.index.images(project.name)
    rounds = [row for row in context.index.rounds(project.name) if row.status == "done"]
    annotations = [row for row in context.index.annotations(project.name) if not row.cancelled]
    champion = context.registry.champion()
    trained = [row for row in rounds if "ap" in row.metrics]
    agreed = [row.metrics["people"] for row in rounds if row.metrics.get("people", {}).get("images")]
    estimates = [row.metrics["estimate"] for row in rounds if row.metrics.get("estimate")]
    environment = Environment(loader=PackageLoader("flows", "templates"), autoescape=select_autoescape())
    page = environment.get_template("report.html").render(
        project=project,
        rounds=rounds,
        trained=trained,
        champion=champion.label if champion else "none yet",
        counts=_counts(images, annotations),
        advice=next_step(context, images, rounds),
        queue=_queue(images),
        curve=round_curve(trained) if trained else "",
        pseudo=[row for row in rounds if row.pseudo],
        standing=_standing(rounds),
        reliability=_reliability(rounds),
        estimate=estimates[-1] if estimates else None,
        live=live_curve(estimates) if any(found["live"] for found in estimates) else "",
        cost=cost_model(context).cost if annotations else None,
        corrections=corrections(context),
        people=agreed[-1] if agreed else None,
        points=points,
        worst=_worst(context, champion.label, images, annotations) if champion else [],
        urls=context.endpoints,
    )
    return write_text(context.workspace.root / "reports" / f"{project.name}.html", page)


def _counts(images: Sequence[ImageRow], annotations: Sequence[AnnotationRow]) -> dict[str, Any]:
    seconds = sum(row.lead_time_s or 0.0 for row in annotations)
    cells = sum(row.n_regions for row in annotations)
    return {
        "images": sum(row.is_present for row in images),
        "train": sum(row.state == "labelled" and row.role != "control" for row in images),
        "holdout": sum(row.state == "labelled" and row.role == "control" for row in images),
        "open": sum(row.state == "open" for row in images),
        "skipped": sum(row.state == "skipped" for row in images),
        "unusable": sum(row.state == "unusable" for row in images),
        "cells": cells,
        "minutes": seconds / 60,
        "seconds_a_cell": seconds / cells if cells else 0.0,
    }


def _queue(images: Sequence[ImageRow]) -> list[ImageRow]:
    waiting = [row for row in images if row.state == "open" and row.rank is not None]
    return sorted(waiting, key=lambda row: row.rank or 0)


def _standing(rounds: Sequence[RoundRow]) -> dict[str, dict[str, Any]]:
    """What the last round that learnt says of each labeller: its audit, how far it is believed, what it skipped."""
    last = next((row.pseudo for row in reversed(rounds) if row.pseudo.get("audits")), {})
    told: dict[str, dict[str, Any]] = {}
    for name, audited in last.get("audits", {}).items():
        at_work = last["labellers"].get(name, {})
        reason = last["missing"].get(name) or audited["reason"]
        skipped = at_work.get("skipped", [])
        told[name] = {**audited, "reason": reason, "version": at_work.get("version", ""), "skipped": skipped}
    return told


def _reliability(rounds: Sequence[RoundRow]) -> str:
    """What was said against what was so, for the confidence of the last round that calibrated one, as SVG text."""
    rows = next((row.pseudo["reliability"] for row in reversed(rounds) if row.pseudo.get("reliability")), None)
    return reliability_curve(rows) if rows else ""


def _worst(
    context: LoopContext,
    label: str,
    images: Sequence[ImageRow],
    annotations: Sequence[AnnotationRow],
    most: int = 6,
) -> list[Shown]:
    """The hold-out images on which the champion does worst, with its masks and the person's.

    An image or annotation that cannot be read is named in the log and not shown.
    """
    shown: list[Shown] = []
    for measured in sorted(_measure(context, label, images, annotations), key=lambda item: item.ap):
        if len(shown) == most:
            break
        try:
            picture = _picture(measured)
        except ImageError as error:
            logger.warning("%s is not shown in the report: %s", measured.image.image_id, error)
            continue
        shown.append(Shown(measured.image.image_id, measured.ap, _data_address(picture)))
    return shown


def _measure(
    context: LoopContext, label: str, images: Sequence[ImageRow], annotations: Sequence[AnnotationRow]
) -> list[Measured]:
    store = PredictionStore(context.workspace.predictions_dir, label)
    interface = context.interface
    newest = newest_annotations(annotations, context.config.labels.several)
    found = []
    for row in images:
        if row.role != "control" or row.state != "labelled" or row.image_id not in newest:
            continue
        stored = store.load(image_ref(row))
        if stored is None:
            continue
        try:
            drawn = read_annotation(newest[row.image_id], row, interface)
        except (LabelError, OSError) as error:
            logger.warning("%s is not measured for the report: %s", row.image_id, error)
            continue
        person, _ = split_nuclei(drawn, interface, context.config.publish.nucleus_label)
        found.append(Measured(row, stored, person, image_ap(stored.instances, person)))
    return found


def _picture(measured: Measured) -> UInt8Array:
    """The image with both outlines.

    Raises:
        ImageError: its file cannot be read, or has another size than the labels were drawn on.
    """
    path = Path(measured.image.path)
    pixels = read_image(path).pixels
    if pixels.shape[:2] != measured.person.shape:
        raise ImageError(
            f"{path} is {pixels.shape[:2]}, its labels lie in {measured.person.shape} (H, W); restore the file"
        )
    return overlay(pixels, measured.stored.instances, measured.person)


def _data_address(picture: Any, side: int = 480) -> str:
    height, width = picture.shape[:2]
    scale = min(1.0, side / max(height, width))
    small = cv2.resize(
        picture, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )
    _, data = cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode()
