"""Step 7: predictions, scores, ranks and reasons into Label Studio, so that people see the chosen ones."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flows.absent import FILE_GONE, NOT_SEEN, named, unseen, vanished
from flows.context import LoopContext, group_of, registry_name
from flows.shares import dealt, is_shared, release, second_labels, set_tabs
from flows.tasks import task_data
from loop.adapters.index import ImageRow
from loop.adapters.label_studio_api import LOWEST_SCORE_FIRST, MOST_INFORMATIVE, NOT_YET_ANNOTATED, TaskPrediction
from loop.adapters.mlflow_registry import ModelVersion
from loop.data.predictions import StoredPrediction
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import to_results
from loop.types import Instances, Selection

logger = logging.getLogger(__name__)

WIDTHS = {"data.rank": 90, "data.reason": 520, "data.annotators": 200, "predictions_score": 130}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Queue:
    """The tasks in the order in which they are to be served, as rows that say what each task is to show.

    `before` are the same images as the index has them, by id; `gone` are the ids of those whose file is away.
    """

    rows: tuple[ImageRow, ...]
    before: Mapping[str, ImageRow]
    gone: frozenset[str]


def publish(
    context: LoopContext,
    round_number: int,
    version: ModelVersion | None,
    selections: Sequence[Selection],
    predictions: Mapping[str, StoredPrediction],
    *,
    calibrated: Collection[str] = (),
    progress: Progress | None = None,
) -> str:
    """Makes Label Studio show this round's predictions in this round's order; returns the published version.

    Every open task gets one prediction of the version, with score = rank / (number of tasks + 1): Label Studio serves
    the lowest score first. The selected batch comes first in its order, then what a second person is still to label,
    then images that the model could not look at, with a word of why, then the rest by uncertainty. With no open task
    nothing changes in Label Studio. Safe to repeat: what is there already is kept, older versions go only when the new
    one is complete. Each region's score is its cell's.

    An image whose file has gone since it was chosen leaves the batch: it is named in the log, its task says so and
    comes last, and the index calls it gone, unless its whole folder is away.

    Args:
        context: the project.
        round_number: goes into the published version's name.
        version: the model, None before the first one.
        selections: the batch.
        predictions: by image id; the pre-labels are their cells.
        calibrated: ids of the images whose cells' scores are confidences, so those under `publish.doubtful_below` get
            the label `publish.doubtful_label`, where the label config has it, and are counted for the person. Raw
            scores of a model are none.
        progress: called as progress(done, total).

    Raises:
        ConfigError, InputError: `select.annotators` names somebody twice, or what is no login.
        RefusedError: Label Studio dropped a prediction or a task is gone; names them.
        UnreachableError: Label Studio does not answer; run the round again.
    """
    project = context.project
    model = version.label if version else ""
    queue = _queue(context, round_number, selections, predictions, calibrated)
    if not queue.rows:
        context.index.set_published(project.name, project.published_version, model)
        release(context)
        set_tabs(context, _columns(context.interface, people=True), WIDTHS)
        logger.info("project %s has no open image; what is published stands", project.name)
        return project.published_version
    published = f"{version.label if version else registry_name(project.name)}-r{round_number}"
    entries = _entries(context, queue.rows, predictions, calibrated)
    report = context.label_studio.publish(
        project.ls_project_id, published, entries, chunk=context.config.publish.chunk, progress=progress
    )
    context.index.set_published(project.name, published, model)
    _show(context, queue)
    context.index.set_images(project.name, _updates(queue, predictions))
    _forget(context, queue.gone)
    release(context)
    named_people = bool(context.config.select.annotators)
    context.label_studio.set_tab(
        project.ls_project_id,
        MOST_INFORMATIVE,
        LOWEST_SCORE_FIRST,
        NOT_YET_ANNOTATED,
        columns=_columns(context.interface, people=named_people),
        widths=WIDTHS,
    )
    set_tabs(context, _columns(context.interface, people=True), WIDTHS)
    logger.info("published %s: %d new predictions, %d kept", published, report.created, report.kept)
    return published


def _queue(
    context: LoopContext,
    round_number: int,
    selections: Sequence[Selection],
    predictions: Mapping[str, StoredPrediction],
    calibrated: Collection[str],
) -> _Queue:
    images = context.index.images(context.project_name)
    lost = vanished(images)
    gone = frozenset(row.image_id for row in lost)
    if lost:
        logger.warning("the files of %d open images of %s are gone: %s", len(lost), context.project_name, named(lost))
    batch = {s.image_id: s for s in selections if s.image_id not in gone}
    blind = {row.image_id for row in unseen(images, predictions)}
    second, _ = second_labels(context, images)
    people = dealt(context, round_number, list(batch.values()), images)
    below = context.config.publish.doubtful_below
    order = _order(images, list(batch.values()), predictions, second=second, gone=gone)
    rows = []
    for row in order:
        chosen, stored = batch.get(row.image_id), predictions.get(row.image_id)
        if row.state != "open":
            rows.append(row)
        elif chosen is not None:
            sure_below = below if row.image_id in calibrated else None
            note = _note(stored, row.seconds, sure_below)
            who = people.get(row.image_id, "")
            rows.append(replace(row, rank=chosen.rank, reason=chosen.reason, note=note, annotators=who))
        else:
            reason = FILE_GONE if row.image_id in gone else NOT_SEEN if row.image_id in blind else ""
            rows.append(replace(row, rank=None, reason=reason, note="", annotators=""))
    return _Queue(tuple(rows), {row.image_id: row for row in order}, gone)


def _order(
    images: Sequence[ImageRow],
    selections: Sequence[Selection],
    predictions: Mapping[str, StoredPrediction],
    *,
    second: Sequence[ImageRow] = (),
    gone: Collection[str] = (),
) -> list[ImageRow]:
    """The open tasks, and those that a second person is still to label, in the order of `publish`.

    Behind the rest by falling uncertainty come images of a group that has a hold-out image, which may neither teach nor
    measure, and last those whose file is gone.
    """
    rank = {selection.image_id: selection.rank for selection in selections}
    measuring = {group_of(row) for row in images if row.role == "control"}
    blind = {row.image_id for row in unseen(images, predictions)}
    waiting = {row.image_id for row in second}

    def place(row: ImageRow) -> int:
        if row.image_id in gone:
            return 5
        if row.image_id in rank:
            return 0
        if row.image_id in waiting:
            return 1
        if group_of(row) in measuring:
            return 4
        return 2 if row.image_id in blind else 3

    def key(row: ImageRow) -> tuple[int, float, str]:
        stored = predictions.get(row.image_id)
        falling = -stored.uncertainty if stored else 0.0
        return (place(row), rank.get(row.image_id, falling), row.image_id)

    shown = [row for row in images if row.state == "open" or row.image_id in waiting]
    return sorted((row for row in shown if row.task_id is not None), key=key)


def _note(stored: StoredPrediction | None, seconds: float | None, sure_below: float | None) -> str:
    """What a person should know besides the reason: how many cells want a look, and how long it may take.

    `sure_below`: cells under this confidence are doubtful; None where scores are no confidences.
    """
    parts = []
    if stored is not None and sure_below is not None:
        n = int(np.count_nonzero(stored.instances.scores < np.float32(sure_below)))
        parts += [f"{n} doubtful cell{'s' if n > 1 else ''}"] if n else []
    elif stored is not None:
        n = round(stored.measures.get("doubtful_cells", 0.0))
        parts += [f"about {n} cell{'s' if n > 1 else ''} the model is unsure of"] if n else []
    if seconds:
        parts.append(f"about {round(seconds / 60)} min" if seconds >= 45 else "under a minute")
    return "; ".join(parts)


def _entries(
    context: LoopContext,
    rows: Sequence[ImageRow],
    predictions: Mapping[str, StoredPrediction],
    calibrated: Collection[str],
) -> list[TaskPrediction]:
    shown, interface = context.config.publish, context.interface
    entries = []
    for rank, row in enumerate(rows, start=1):
        stored = predictions.get(row.image_id)
        cells = stored.instances if stored else Instances.build((row.height, row.width))
        below = shown.doubtful_below if row.image_id in calibrated else 0.0
        regions = to_results(
            cells,
            interface,
            tolerance_px=shown.tolerance_px,
            doubtful_below=below,
            max_points=shown.max_points,
        )
        entries.append(TaskPrediction(row.task_id or 0, regions, rank / (len(rows) + 1)))
    return entries


def _updates(queue: _Queue, predictions: Mapping[str, StoredPrediction]) -> dict[str, dict[str, object]]:
    """What the index is to say of the open images; not their state, which a person may have changed meanwhile."""
    updates: dict[str, dict[str, object]] = {}
    for row in queue.rows:
        if row.state != "open":
            continue
        stored = predictions.get(row.image_id)
        updates[row.image_id] = {
            "score": stored.uncertainty if stored else 0.0,
            **{name: getattr(row, name) for name in ("rank", "reason", "note", "annotators")},
        }
    return updates


def _forget(context: LoopContext, gone: Collection[str]) -> None:
    """Images whose file is gone leave the pool for good, but for those whose whole folder is away, as a disk may be."""
    rows = [row for row in context.index.images(context.project_name, state="open") if row.image_id in gone]
    lost = [row.image_id for row in rows if Path(row.path).parent.is_dir()]
    context.index.set_images(context.project_name, {image_id: {"state": "gone"} for image_id in lost})


def _columns(interface: Interface, *, people: bool) -> tuple[str, ...]:
    shown = (interface.image_value_key, "rank", "reason", "modality", *(("annotators",) if people else ()))
    return ("id", *(f"data.{name}" for name in shown), "predictions_score")


def _show(context: LoopContext, queue: _Queue) -> None:
    """Writes rank, reason and people into the tasks of the batch, and into others where the words have changed.

    Label Studio replaces a task's data as a whole, one task a request. The index, which says what is to be cleared, is
    changed afterwards, so that a run that was killed here clears the rest when it is repeated.
    """
    interface = context.interface
    told = 0
    for row in queue.rows:
        before = queue.before[row.image_id]
        chosen = row.rank is not None or before.chosen_in is not None
        if row.task_id is None or row.state != "open" or not (chosen or row.told != before.told):
            continue
        people = (2 if is_shared(row.annotators) else 1) if row.annotators or before.annotators else None
        context.label_studio.set_task_data(row.task_id, task_data(interface, row), people=people)
        told += 1
    logger.info("%d reasons written for %s", told, context.project_name)
