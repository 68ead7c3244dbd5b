"""Step 7: predictions, scores, ranks and reasons into Label Studio, so that people see the chosen ones."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from flows.context import LoopContext, group_of, registry_name
from flows.start import task_data
from loop.adapters.index import ImageRow
from loop.adapters.label_studio_api import LOWEST_SCORE_FIRST, MOST_INFORMATIVE, NOT_YET_ANNOTATED, TaskPrediction
from loop.adapters.mlflow_registry import ModelVersion
from loop.data.predictions import StoredPrediction
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import to_results
from loop.types import Instances, Selection

logger = logging.getLogger(__name__)

WIDTHS = {"data.rank": 90, "data.reason": 520, "predictions_score": 130}
Progress = Callable[[int, int], None]


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

    Every open task gets one prediction of the version, with score = rank / (number of open tasks + 1): Label Studio
    serves the lowest score first. The selected batch comes first in its order, then the rest by uncertainty. With no
    open task nothing changes in Label Studio. Safe to repeat: what is there already is kept, older versions go only
    when the new one is complete. Each region's score is its cell's.

    Args:
        context: the project.
        round_number: goes into the published version's name.
        version: the model, None before the first one.
        selections: the batch.
        predictions: by image id; the pre-labels are their cells.
        calibrated: ids of the images whose cells' scores are confidences, so those under `publish.doubtful_below` get
            the label `publish.doubtful_label`, where the label config has it. Raw scores of a model are none.
        progress: called as progress(done, total).

    Raises:
        RefusedError: Label Studio dropped a prediction or a task is gone; names them.
        UnreachableError: Label Studio does not answer; run the round again.
    """
    project = context.project
    model = version.label if version else ""
    order = _order(context.index.images(project.name), selections, predictions)
    if not order:
        context.index.set_published(project.name, project.published_version, model)
        logger.info("project %s has no open image; what is published stands", project.name)
        return project.published_version
    published = f"{version.label if version else registry_name(project.name)}-r{round_number}"
    interface = context.interface
    shown = context.config.publish
    entries = []
    scores: dict[str, dict[str, object]] = {}
    for rank, row in enumerate(order, start=1):
        score = rank / (len(order) + 1)
        stored = predictions.get(row.image_id)
        cells = stored.instances if stored else Instances.build((row.height, row.width))
        below = shown.doubtful_below if row.image_id in calibrated else 0.0
        regions = to_results(cells, interface, tolerance_px=shown.tolerance_px, doubtful_below=below)
        entries.append(TaskPrediction(row.task_id or 0, regions, score))
        scores[row.image_id] = {"score": stored.uncertainty if stored else 0.0}
    report = context.label_studio.publish(
        project.ls_project_id, published, entries, chunk=shown.chunk, progress=progress
    )
    context.index.set_images(project.name, scores)
    context.index.set_published(project.name, published, model)
    _show_reasons(context, order, selections)
    context.label_studio.set_tab(
        project.ls_project_id,
        MOST_INFORMATIVE,
        LOWEST_SCORE_FIRST,
        NOT_YET_ANNOTATED,
        columns=_columns(interface),
        widths=WIDTHS,
    )
    logger.info("published %s: %d new predictions, %d kept", published, report.created, report.kept)
    return published


def _order(
    images: Sequence[ImageRow], selections: Sequence[Selection], predictions: Mapping[str, StoredPrediction]
) -> list[ImageRow]:
    """The open tasks: the batch, then the rest by falling uncertainty, last those whose labels could not be used.

    The latter are images of a group that has a hold-out image: they may neither teach nor measure.
    """
    rank = {selection.image_id: selection.rank for selection in selections}
    measuring = {group_of(row) for row in images if row.role == "control"}

    def key(row: ImageRow) -> tuple[int, float, str]:
        if row.image_id in rank:
            return (rank[row.image_id], 0.0, row.image_id)
        stored = predictions.get(row.image_id)
        place = len(rank) + (2 if group_of(row) in measuring else 1)
        return (place, -stored.uncertainty if stored else 0.0, row.image_id)

    return sorted((row for row in images if row.state == "open" and row.task_id is not None), key=key)


def _columns(interface: Interface) -> tuple[str, ...]:
    shown = (interface.image_value_key, "rank", "reason", "modality")
    return ("id", *(f"data.{name}" for name in shown), "predictions_score")


def _show_reasons(context: LoopContext, order: Sequence[ImageRow], selections: Sequence[Selection]) -> None:
    """Writes rank and reason into the tasks of the batch, and clears those of earlier batches.

    Label Studio replaces a task's data as a whole, one task a request.
    """
    reasons = {selection.image_id: selection for selection in selections}
    interface = context.interface
    for row in order:
        selection = reasons.get(row.image_id)
        if row.task_id is None or (selection is None and row.chosen_in is None):
            continue
        rank, reason = (selection.rank, selection.reason) if selection else (None, "")
        shown = replace(row, rank=rank, reason=reason)
        context.label_studio.set_task_data(row.task_id, task_data(interface, shown))
    logger.info("%d reasons written for %s", len(reasons), context.project_name)
