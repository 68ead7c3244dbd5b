"""Step 1: what people did in Label Studio since the last look, taken over into the index.

Polling is the truth (`updated_at`); a webhook only says "look now". Bodies of annotations are cached as JSON in the
workspace together with the published version that was on screen and what it offered, because deleting a prediction in
Label Studio deletes the link from the annotation to it.
"""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from flows.context import LoopContext, sync_lock
from loop.adapters.index import AnnotationRow, ImageRow
from loop.adapters.label_studio_api import Annotation, Task
from loop.labelstudio.interface import CELL_KINDS, Interface
from loop.labelstudio.regions import is_done_area
from loop.labelstudio.results import is_unusable

logger = logging.getLogger(__name__)

OVERLAP = timedelta(seconds=120)
"""How far a sync looks back before the last mark: longer than a write can wait for Label Studio's database."""


@dataclass(frozen=True)
class SyncReport:
    """How many annotations are new, changed or deleted since the last sync, and what state the images are in."""

    new: int
    updated: int
    deleted: int
    labelled: int
    skipped: int
    unusable: int
    gone: int


def sync(context: LoopContext, *, thorough: bool = False) -> SyncReport:
    """Reads new, changed and deleted annotations into the index. Safe to repeat and to kill anywhere.

    Lists what changed again and again until a pass finds nothing new, so that what a person does meanwhile is not
    missed. The mark up to which Label Studio was read moves only after everything before it is stored, and is Label
    Studio's own time, never this machine's. One sync of a project runs at a time on a machine.

    Args:
        context: the project.
        thorough: also look for deleted tasks, for cached annotations whose file is gone, and for annotations of tasks
            that were not known as images' yet when the mark passed them.

    Raises:
        UnreachableError: Label Studio does not answer; nothing is lost, run it again.
    """
    with sync_lock(context.workspace, context.project_name):
        passes = [_read_changes(context)]
        while any(passes[-1]):
            passes.append(_read_changes(context))
        tasks = None
        if thorough:
            tasks = list(context.label_studio.tasks(context.project.ls_project_id))
            passes.append(_restore_missing(context, tasks))
        gone = _mark_vanished(context, tasks)
    new, updated, deleted = (sum(found) for found in zip(*passes, strict=True))
    states = [row.state for row in context.index.images(context.project_name)]
    report = SyncReport(
        new, updated, deleted, states.count("labelled"), states.count("skipped"), states.count("unusable"), gone
    )
    logger.info("sync of %s: %s", context.project_name, asdict(report))
    return report


def _read_changes(context: LoopContext) -> tuple[int, int, int]:
    """One pass over the tasks that changed since the mark; returns (new, updated, deleted) and moves the mark."""
    project = context.project
    since = project.synced_until - OVERLAP if project.synced_until else None
    by_task, known = _by_task(context)
    new = updated = deleted = 0
    latest = project.synced_until
    for task in context.label_studio.tasks(project.ls_project_id, updated_after=since):
        latest = max(latest, task.updated_at) if latest else task.updated_at
        image = by_task.get(task.id)
        if image is None:
            logger.warning("task %s is not one of project %s's images; left alone", task.id, project.name)
            continue
        here = known.get(task.id, {})
        if not here and not task.total_annotations and not task.cancelled_annotations:
            continue
        changes = _take_over(context, image, here)
        new, updated, deleted = new + changes[0], updated + changes[1], deleted + changes[2]
    if latest is not None:
        context.index.set_synced(project.name, latest)
    return new, updated, deleted


def _by_task(context: LoopContext) -> tuple[dict[int, ImageRow], dict[int, dict[int, AnnotationRow]]]:
    """The project's images, and its known annotations by number, each by the task."""
    images = {row.task_id: row for row in context.index.images(context.project_name) if row.task_id is not None}
    known: dict[int, dict[int, AnnotationRow]] = {}
    for row in context.index.annotations(context.project_name):
        known.setdefault(row.task_id, {})[row.annotation_id] = row
    return images, known


def _restore_missing(context: LoopContext, tasks: Sequence[Task]) -> tuple[int, int, int]:
    """Reads tasks again of which the index lacks an annotation or its cached file; returns (new, updated, deleted)."""
    images, known = _by_task(context)
    new = updated = deleted = 0
    for task in tasks:
        here = known.get(task.id, {})
        complete = len(here) == task.total_annotations + task.cancelled_annotations
        if task.id not in images or (complete and all(Path(row.file).exists() for row in here.values())):
            continue
        changes = _take_over(context, images[task.id], here)
        new, updated, deleted = new + changes[0], updated + changes[1], deleted + changes[2]
    return new, updated, deleted


def _take_over(context: LoopContext, image: ImageRow, known: Mapping[int, AnnotationRow]) -> tuple[int, int, int]:
    """One task's annotations into cache and index; returns (new, updated, deleted)."""
    project = context.project
    task_id = image.task_id or 0
    annotations = context.label_studio.annotations(task_id)
    fresh = [a for a in annotations if a.id not in known or _differs(known[a.id], a)]
    interface = context.interface
    rows = [
        AnnotationRow(
            project_id=project.id,
            annotation_id=a.id,
            image_id=image.image_id,
            task_id=task_id,
            updated_at=a.updated_at,
            file=str(_cache(context, a, task_id)),
            n_regions=count_cells(a.result, interface),
            lead_time_s=a.lead_time_s,
            completed_by=a.completed_by,
            cancelled=a.was_cancelled,
            reviewed=a.ground_truth,
        )
        for a in fresh
    ]
    vanished = sorted(set(known) - {a.id for a in annotations})
    if rows:
        context.index.put_annotations(project.name, rows)
    if vanished:
        context.index.drop_annotations(project.name, vanished)
    context.index.set_images(project.name, {image.image_id: {"state": _state(annotations)}})
    new = sum(a.id not in known for a in fresh)
    return new, len(fresh) - new, len(vanished)


def count_cells(result: Sequence[Mapping[str, Any]], interface: Interface) -> int:
    """How many regions of a result are cells (or nuclei): no choices, no keypoints, no done areas."""
    return sum(item.get("type") in CELL_KINDS and not is_done_area(item, interface) for item in result)


def _differs(row: AnnotationRow, annotation: Annotation) -> bool:
    changed = row.updated_at != annotation.updated_at or row.reviewed != annotation.ground_truth
    return changed or not Path(row.file).exists()


def _state(annotations: list[Annotation]) -> str:
    if any(is_unusable(a.result) for a in annotations):
        return "unusable"
    if any(not a.was_cancelled for a in annotations):
        return "labelled"
    return "skipped" if annotations else "open"


def _cache(context: LoopContext, annotation: Annotation, task_id: int) -> Path:
    """Keeps an annotation's body; what it started from is noted once, when it is new."""
    project = context.project
    directory = context.workspace.annotations_dir / project.name
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{annotation.id}.json"
    if path.exists():
        before = load_annotation(path)
        started_from, offered = before["started_from"], before.get("offered", [])
    else:
        started_from = project.published_version
        offered = _offered(context, annotation, task_id)
    body = {
        "id": annotation.id,
        "result": annotation.result,
        "parent_prediction": annotation.parent_prediction,
        "started_from": started_from,
        "offered": offered,
        "lead_time_s": annotation.lead_time_s,
        "ground_truth": annotation.ground_truth,
    }
    temporary = directory / f".{annotation.id}-{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_text(json.dumps(body), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _offered(context: LoopContext, annotation: Annotation, task_id: int) -> list[Any]:
    """The regions of the prediction that a person started from; none where nothing says that there was one.

    An annotation that goes back to a draft has lost its link, so there it is the prediction of the published version.
    """
    left = any(str(item.get("origin", "")).startswith("prediction") for item in annotation.result)
    if annotation.parent_prediction is None and not left:
        return []
    predictions = context.label_studio.predictions(task_id)
    version = context.project.published_version
    parent = [p for p in predictions if p.id == annotation.parent_prediction]
    shown = parent or [p for p in predictions if p.model_version == version]
    return list(shown[-1].result) if shown else []


def load_annotation(path: Path) -> dict[str, Any]:
    """A cached annotation body.

    Its id, result, parent_prediction, started_from (published version), offered (the regions of that version; not in
    bodies that an earlier celloop kept), lead_time_s, ground_truth.
    """
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return body


def _mark_vanished(context: LoopContext, tasks: Sequence[Task] | None) -> int:
    """Images whose task was deleted in Label Studio leave the pool.

    `tasks` are all that there are; None = they are listed where their number says that some are missing.
    """
    project = context.project
    rows = context.index.images(project.name)
    alive = {row.task_id: row for row in rows if row.task_id is not None and row.is_present}
    if tasks is None and int(context.label_studio.project(project.ls_project_id)["task_number"]) >= len(alive):
        return 0
    listed = context.label_studio.tasks(project.ls_project_id) if tasks is None else tasks
    existing = {task.id for task in listed}
    gone = [row.image_id for task, row in alive.items() if task not in existing]
    if gone:
        context.index.set_images(project.name, {image_id: {"state": "gone"} for image_id in gone})
        logger.warning("%d tasks of %s were deleted in Label Studio: %s", len(gone), project.name, ", ".join(gone[:10]))
    return len(gone)
