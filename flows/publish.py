"""Step 7: predictions, scores, ranks and reasons into Label Studio, so that people see the chosen ones."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from flows.context import LoopContext, registry_name
from flows.start import task_data
from loop.adapters.index import ImageRow
from loop.adapters.label_studio_api import LOWEST_SCORE_FIRST, NOT_YET_ANNOTATED, TaskPrediction
from loop.adapters.mlflow_registry import ModelVersion
from loop.data.predictions import StoredPrediction
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import to_results
from loop.types import Selection

logger = logging.getLogger(__name__)

TAB = "Most informative"
Progress = Callable[[int, int], None]


def publish(
    context: LoopContext,
    round_number: int,
    version: ModelVersion | None,
    selections: Sequence[Selection],
    predictions: Mapping[str, StoredPrediction],
    progress: Progress | None = None,
) -> str:
    """Makes Label Studio show this round's predictions in this round's order; returns the published version.

    Every open task gets one prediction of the version, with score = rank / (number of open tasks + 1): Label Studio
    serves the lowest score first. The selected batch comes first in its order, then the rest by uncertainty. Safe
    to repeat: what is there already is kept, older versions go only when the new one is complete.
    """
    project = context.project
    images = [row for row in context.index.images(project.name, state="open") if row.task_id is not None]
    order = _order(images, selections, predictions)
    published = f"{version.label if version else registry_name(project.name)}-r{round_number}"
    interface = context.interface
    tolerance = context.config.publish.tolerance_px
    entries = []
    scores: dict[str, dict[str, object]] = {}
    for rank, row in enumerate(order, start=1):
        score = rank / (len(order) + 1)
        stored = predictions.get(row.image_id)
        regions = to_results(stored.instances, interface, tolerance_px=tolerance) if stored else []
        entries.append(TaskPrediction(row.task_id or 0, regions, score))
        scores[row.image_id] = {"score": stored.uncertainty if stored else None}
    report = context.label_studio.publish(
        project.ls_project_id, published, entries, chunk=context.config.publish.chunk, progress=progress
    )
    context.index.set_images(project.name, scores)
    context.index.set_published(project.name, published, version.label if version else "")
    _show_reasons(context, order, selections)
    context.label_studio.set_tab(
        project.ls_project_id, TAB, LOWEST_SCORE_FIRST, NOT_YET_ANNOTATED, columns=_columns(interface)
    )
    logger.info("published %s: %d new predictions, %d kept", published, report.created, report.kept)
    return published


def _order(
    images: Sequence[ImageRow], selections: Sequence[Selection], predictions: Mapping[str, StoredPrediction]
) -> list[ImageRow]:
    rank = {selection.image_id: selection.rank for selection in selections}

    def key(row: ImageRow) -> tuple[int, float, str]:
        if row.image_id in rank:
            return (rank[row.image_id], 0.0, row.image_id)
        stored = predictions.get(row.image_id)
        return (len(images) + len(rank) + 1, -stored.uncertainty if stored else 0.0, row.image_id)

    return sorted(images, key=key)


def _columns(interface: Interface) -> tuple[str, ...]:
    shown = (interface.image_value_key, "rank", "reason", "modality")
    return ("id", *(f"data.{name}" for name in shown), "predictions_score")


def _show_reasons(context: LoopContext, order: Sequence[ImageRow], selections: Sequence[Selection]) -> None:
    """Writes rank and reason into the tasks of the batch; Label Studio replaces a task's data as a whole."""
    reasons = {selection.image_id: selection for selection in selections}
    project = context.project
    for row in order:
        selection = reasons.get(row.image_id)
        if selection is not None and row.task_id is not None:
            chosen = replace(row, rank=selection.rank, reason=selection.reason)
            context.label_studio.set_task_data(row.task_id, task_data(context.interface, chosen))
    logger.info("%d reasons written for %s", len(reasons), project.name)
