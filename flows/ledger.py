"""The effort ledger: what each annotation cost beside the prediction it started from, and what that says of models."""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from flows.context import LoopContext
from flows.effort import Work, observations
from loop.adapters.index import EffortRow
from loop.effort.edits import Edits
from loop.effort.summary import Piece, Summary, summarise

logger = logging.getLogger(__name__)

Key = TypeVar("Key")


@dataclass(frozen=True)
class Ledger:
    """The lines that count, by annotation, and their sums.

    `by_version` holds only what a model offered, by the label of the model (`celloop-NAME-v3`), the oldest version
    first; `by_annotator` is by the person's number in Label Studio, None where it is not known.
    """

    rows: tuple[EffortRow, ...]
    by_version: dict[str, Summary]
    by_annotator: dict[int | None, Summary]
    by_modality: dict[str, Summary]


def write_ledger(context: LoopContext) -> Ledger:
    """Brings the ledger up to date in the index and on the models' runs in MLflow.

    Annotations that are new or have changed since are compared with what they started from; the others' lines stay as
    they are. Can be repeated; MLflow comes first, so that what it did not take is tried again.

    Raises:
        ServiceError: MLflow or the index does not answer.
        OSError: what was found cannot be kept.
    """
    modalities = {row.image_id: row.modality for row in context.index.images(context.project_name)}
    project_id = context.index.project(context.project_name).id
    known = {row.annotation_id: row for row in context.index.efforts(context.project_name)}
    lines = [_line(work, project_id, modalities[work.annotation.image_id]) for work in observations(context)]
    fresh = [row for row in lines if known.get(row.annotation_id) != row]
    ledger = _ledger(context, (known | {row.annotation_id: row for row in lines}).values())
    if fresh:
        _log(context, ledger, {model_of(row.version) for row in fresh if row.predicted})
        context.index.put_efforts(context.project_name, fresh)
        logger.info("effort ledger of %s: %d of %d lines new or changed", context.project_name, len(fresh), len(lines))
    return ledger


def read_ledger(context: LoopContext) -> Ledger:
    """The ledger as it was last written."""
    return _ledger(context, context.index.efforts(context.project_name))


def model_of(version: str) -> str:
    """The label of the model whose predictions were published under this name, e.g. "celloop-NAME-v3-r5"."""
    return re.sub(r"-r\d+$", "", version)


def _line(work: Work, project_id: int, modality: str) -> EffortRow:
    kept, edited, deleted, added = (int(count) for count in work.outcome.edits)
    return EffortRow(
        project_id=project_id,
        annotation_id=work.annotation.annotation_id,
        image_id=work.annotation.image_id,
        updated_at=work.annotation.updated_at,
        version=work.started_from,
        predicted=work.predicted,
        annotator=work.annotation.completed_by,
        modality=modality,
        kept=kept,
        edited=edited,
        deleted=deleted,
        added=added,
        edited_iou=float(work.outcome.iou[work.outcome.edited].mean()) if edited else None,
        seconds=work.seconds,
    )


def _ledger(context: LoopContext, rows: Iterable[EffortRow]) -> Ledger:
    """The sums of the lines that count.

    Lines of annotations that Label Studio no longer has do: they were work too. A line of an annotation that has
    changed since into something that says nothing (skipped, done in part, unreadable) does not.
    """
    now = {row.annotation_id: row for row in context.index.annotations(context.project_name)}

    def counts(row: EffortRow) -> bool:
        annotation = now.get(row.annotation_id)
        return annotation is None or (annotation.updated_at == row.updated_at and not annotation.cancelled)

    standing = tuple(row for row in sorted(rows, key=lambda row: row.annotation_id) if counts(row))
    versions = _sums((row for row in standing if row.predicted), lambda row: model_of(row.version))
    people = _sums(standing, lambda row: row.annotator)
    modalities = _sums(standing, lambda row: row.modality)
    return Ledger(
        standing,
        dict(sorted(versions.items(), key=lambda item: _by_number(item[0]))),
        dict(sorted(people.items(), key=lambda item: (item[0] is None, item[0] or 0))),
        dict(sorted(modalities.items())),
    )


def _by_number(label: str) -> tuple[str, int]:
    name, _, number = label.rpartition("-v")
    return (name, int(number)) if number.isdecimal() else (label, 0)


def _sums(rows: Iterable[EffortRow], key: Callable[[EffortRow], Key]) -> dict[Key, Summary]:
    groups: dict[Key, list[Piece]] = {}
    for row in rows:
        edits = Edits(row.kept, row.edited, row.deleted, row.added)
        groups.setdefault(key(row), []).append(Piece(edits, row.edited_iou, row.seconds, row.predicted))
    return {name: summarise(pieces) for name, pieces in groups.items()}


def _log(context: LoopContext, ledger: Ledger, labels: Iterable[str]) -> None:
    """Puts the sums of these models on their runs; what was offered by something else has no run here.

    A model has no sum where a sync has read another content of its only annotation meanwhile.
    """
    for label in sorted(labels):
        name, number = _by_number(label)
        found = ledger.by_version.get(label)
        if name != context.registry.model or found is None:
            continue
        figures = {
            "effort_kept_share": found.kept.mean if found.kept else None,
            "effort_edited_iou": found.edited_iou,
            "effort_seconds_per_cell": found.seconds_per_cell,
            "effort_images": float(found.images),
        }
        metrics = {metric: value for metric, value in figures.items() if value is not None}
        if not context.registry.add_metrics(number, metrics, step=found.images):
            logger.info("%s is gone from MLflow; what its corrections cost stands in the ledger only", label)
