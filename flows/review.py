"""Which labels a person should look at again: those that models which never saw them disagree with.

Cross-fitted models look at every labelled image; the champion looks at the hold-out too, which it never learnt from.
What comes of it is a file in the workspace, and in Label Studio the tab "Review". No label is changed, and none of
these models is kept.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from flows.context import LoopContext, project_lock
from flows.freeze import freeze
from flows.predict import load_segmenter
from flows.retrain import shortened
from flows.sync import sync
from flows.telling import Tell, quiet, telling_training
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import LoopConfig
from loop.data.snapshot import Snapshot
from loop.data.store import file_sha256
from loop.data.text_file import write_text
from loop.errors import ImageError, StateError
from loop.metrics.suspicion import findings, image_score, judge, reason, suspicion_of
from loop.training.crossfit import Unseen, UnseenStore, crossfit, look
from loop.types import ImageRef, Sample

logger = logging.getLogger(__name__)

Document = dict[str, Any]

REVIEW: Final = "Review"
ANNOTATED_AND_RANKED: Final[Mapping[str, Any]] = {
    "conjunction": "and",
    "items": [
        {"filter": f"filter:tasks:{column}", "operator": "greater", "type": "Number", "value": 0}
        for column in ("data.review_rank", "total_annotations")
    ],
}
RANK, REASON = "review_rank", "review_reason"
WIDTHS = {f"data.{RANK}": 110, f"data.{REASON}": 620}

LEAST = 0.3
"""Cells of a lower suspicion are not named: the model's doubt, not the person's error."""
LISTED_SHARE, LISTED_LEAST = 0.2, 10
"""The tab lists a fifth of the labelled images at most, or ten of them, so that looking through it has an end."""

_FORMAT = 1


@dataclass(frozen=True)
class ReviewReport:
    """What a review found.

    `listed`: the images of the tab, the most suspicious first, each with image_id, rank, score, reason and findings.
    `made` is False where the same labels and settings had been reviewed already. `file` holds every image and cell.
    """

    project: str
    snapshot: str
    made: bool
    images: int
    cells: int
    listed: tuple[Document, ...]
    left_out: tuple[str, ...] = field(default=())
    file: str = ""


def review(context: LoopContext, *, folds: int = 3, tell: Tell = quiet) -> ReviewReport:
    """Ranks the labelled images and cells by how likely they hold an error, and shows the first in Label Studio.

    `folds` models are trained with `estimate.share` of the training budget each, on people's labels as they are now,
    the hold-out's among them: none of them is registered or measured, so the hold-out stays what it is. A hold-out
    image that taught nothing is seen by the champion too, and suspected where both see the same.

    Safe to repeat and to kill: the same labels, settings and champion give the review that is there, and a killed one
    goes on with the fold that it had reached. Labels that changed meanwhile are a new review.

    Args:
        context: the project.
        folds: 2 or more.
        tell: called as tell(step, done, total) while it works.

    Raises:
        StateError: nothing is labelled, or a round runs.
        InputError: all labelled images are of one group; `folds` < 2.
        ServiceError: Label Studio or MLflow stopped; run it again.
    """
    with project_lock(context.workspace, context.project_name):
        sync(context)
        snapshot = freeze(context).snapshot
        if not snapshot.samples:
            raise StateError(f"project {context.project_name} has no labelled image to review; label some first")
        champion = context.registry.champion()
        key = f"{snapshot.id}-{settings_id(context.config, folds, champion)}"
        directory = context.workspace.root / "reviews" / context.project_name
        file = directory / f"{key}.json"
        made = not file.exists()
        if made:
            _forget_unfinished(directory, key)
            document = _make(context, snapshot, champion, folds=folds, scratch=directory / key, tell=tell)
            write_text(file, json.dumps(document))
            shutil.rmtree(directory / key)
        document = json.loads(file.read_text(encoding="utf-8"))
        _show(context, document)
    listed = tuple(entry for entry in document["images"] if entry["rank"] is not None)
    logger.info("review of %s: %d of %d images listed", context.project_name, len(listed), len(document["images"]))
    return ReviewReport(
        context.project_name,
        snapshot.id,
        made,
        len(document["images"]),
        sum(entry["cells"] for entry in document["images"]),
        listed,
        tuple(document["left_out"]),
        str(file),
    )


def settings_id(config: LoopConfig, folds: int, champion: ModelVersion | None) -> str:
    """Hash of everything besides the labels that decides what a review says (16 hex digits)."""
    parts: Document = {
        "format": _FORMAT,
        "model": config.model.model_dump(mode="json"),
        "train": shortened(config, config.estimate.share).train.model_dump(mode="json"),
        "instances": config.instances.model_dump(mode="json"),
        "folds": folds,
        "champion": champion.label if champion else "",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _make(
    context: LoopContext,
    snapshot: Snapshot,
    champion: ModelVersion | None,
    *,
    folds: int,
    scratch: Path,
    tell: Tell,
) -> Document:
    faults = {sample.image.image_id: _fault(sample.image) for sample in snapshot.samples}
    samples = [sample for sample in snapshot.samples if not faults[sample.image.image_id]]
    left_out = [f"{image_id}: {fault}" for image_id, fault in faults.items() if fault]
    for line in left_out:
        logger.warning("left out of the review of %s: %s", context.project_name, line)
    if not samples:
        raise ImageError(f"all {len(faults)} labelled images have changed or vanished, first {left_out[0]}")
    seen = _crossfitted(context, samples, folds, UnseenStore(scratch / "folds"), tell)
    if champion is not None:
        seen = _with_champion(context, samples, seen, champion, UnseenStore(scratch / "champion"))
    entries = _ranked(samples, seen)
    return {
        "format": _FORMAT,
        "project": context.project_name,
        "snapshot": snapshot.id,
        "champion": champion.label if champion else "",
        "folds": folds,
        "images": entries,
        "left_out": left_out,
    }


def _crossfitted(
    context: LoopContext, samples: Sequence[Sample], folds: int, store: UnseenStore, tell: Tell
) -> list[Unseen]:
    config = shortened(context.config, context.config.estimate.share)
    images = {sample.image.image_id: sample.image for sample in samples}
    loaded = ((image_id, store.load(image)) for image_id, image in images.items())

    def told(fold: int, n_folds: int, step: int, values: dict[str, float]) -> None:
        def named(step: str, done: int, total: int, *, note: str = "", seconds_left: float | None = None) -> None:
            words = f"training model {fold + 1} of {n_folds} that checks labels"
            tell(words, done, total, note=note, seconds_left=seconds_left)

        telling_training(named, config.train)(step, values)

    def keep(_: int, found: Mapping[str, Unseen]) -> None:
        for image_id, unseen in found.items():
            store.save(images[image_id], unseen)

    return crossfit(
        samples,
        config.model,
        config.train,
        config.instances,
        folds=folds,
        log=told,
        done={image_id: unseen for image_id, unseen in loaded if unseen is not None},
        fold_done=keep,
    )


def _with_champion(
    context: LoopContext,
    samples: Sequence[Sample],
    seen: Sequence[Unseen],
    champion: ModelVersion,
    store: UnseenStore,
) -> list[Unseen]:
    """The same, but of hold-out images the champion's cells with the mean of both maps: sure is what both are sure of.

    An image that any model has learnt from is left to the cross-fitted one.
    """
    rows = context.index.images(context.project_name)
    tainted = {row.image_id for row in rows if row.taught or row.pseudo_taught}
    both = list(seen)
    segmenter = None
    for i, sample in enumerate(samples):
        image = sample.image
        if image.split != "holdout" or image.image_id in tainted:
            continue
        own = store.load(image)
        if own is None:
            segmenter = segmenter or load_segmenter(context, champion)
            own = look(segmenter, image)
            store.save(image, own)
        both[i] = Unseen(own.instances, np.mean([own.interior, seen[i].interior], axis=0, dtype=np.float32))
    return both


def _ranked(samples: Sequence[Sample], seen: Sequence[Unseen]) -> list[Document]:
    """One entry an image, the most suspicious first; ranks from 1 for those that the tab lists."""
    raw = [
        suspicion_of(sample.instances, one.instances, one.interior, sample.known)
        for sample, one in zip(samples, seen, strict=True)
    ]
    judged = judge(raw, [sample.image.modality for sample in samples])
    entries: list[Document] = []
    for sample, one, suspicion in zip(samples, seen, judged, strict=True):
        found = findings(suspicion, sample.instances, one.instances, least=LEAST)
        entries.append(
            {
                "image_id": sample.image.image_id,
                "split": sample.image.split,
                "modality": sample.image.modality,
                "cells": len(sample.instances),
                "score": round(image_score(suspicion), 4),
                "rank": None,
                "reason": reason(found),
                "findings": [finding._asdict() | {"suspicion": round(finding.suspicion, 4)} for finding in found],
            }
        )
    entries.sort(key=lambda entry: (-entry["score"], entry["image_id"]))
    most = max(LISTED_LEAST, math.ceil(LISTED_SHARE * len(entries)))
    for rank, entry in enumerate([entry for entry in entries if entry["findings"]][:most], start=1):
        entry["rank"] = rank
    return entries


def _show(context: LoopContext, document: Document) -> None:
    """Writes rank and reason into the tasks of the listed images, takes them off all others, and sets the tab.

    Only tasks that show something else are written (140 ms each). Their annotations stay as they are, so a sync finds
    nothing new in them.
    """
    project, studio = context.project, context.label_studio
    listed = {entry["image_id"]: entry for entry in document["images"] if entry["rank"] is not None}
    rows = {row.task_id: row for row in context.index.images(project.name) if row.task_id is not None}
    written = 0
    for task in list(studio.tasks(project.ls_project_id)):
        row = rows.get(task.id)
        if row is None:
            continue
        entry = listed.get(row.image_id) if row.state == "labelled" else None
        marks = {} if entry is None else {RANK: entry["rank"], REASON: entry["reason"]}
        wanted = {key: value for key, value in task.data.items() if key not in (RANK, REASON)} | marks
        if wanted != task.data:
            studio.set_task_data(task.id, wanted)
            written += 1
    shown = (context.interface.image_value_key, RANK, REASON, "modality")
    studio.set_tab(
        project.ls_project_id,
        REVIEW,
        (f"tasks:data.{RANK}",),
        ANNOTATED_AND_RANKED,
        columns=("id", *(f"data.{name}" for name in shown)),
        widths=WIDTHS,
        numbers=(f"data.{RANK}",),
    )
    logger.info("review of %s: %d tasks written, %d listed", project.name, written, len(listed))


def _fault(image: ImageRef) -> str:
    """Why an image's file is not the one that was labelled; "" = it is."""
    try:
        found = file_sha256(image.path)
    except ImageError as error:
        return str(error)
    return "" if found == image.sha256 else f"{image.path} has changed since it was labelled; restore the file"


def _forget_unfinished(directory: Path, key: str) -> None:
    """Deletes what killed reviews of other labels left behind; their predictions fit no labels that are there now."""
    for folder in directory.glob("*/"):
        if folder.name != key:
            shutil.rmtree(folder)
