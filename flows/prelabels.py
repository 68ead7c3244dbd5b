"""What people are shown before they draw: the labellers' fused cells, each with its confidence."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from flows.audit import proposals_dir
from flows.context import LoopContext, image_ref
from flows.labellers import CHAMPION, Panel
from loop.adapters.mlflow_registry import ModelVersion
from loop.data.predictions import StoredPrediction
from loop.errors import InputError
from loop.pseudo.calibration import Calibrator, uncalibrated
from loop.pseudo.lesson import shown
from loop.types import Selection

logger = logging.getLogger(__name__)


def last_calibrator(context: LoopContext) -> Calibrator | None:
    """The calibrator of the last round that fitted one for the labellers of the settings; None without."""
    wanted = set(context.config.pseudo.labellers)
    for row in reversed(context.index.rounds(context.project_name)):
        name = row.pseudo.get("calibrator", "")
        if not name or {*row.pseudo["labellers"], *row.pseudo["missing"]} != wanted:
            continue
        try:
            return Calibrator.from_dict(json.loads((proposals_dir(context) / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, InputError) as error:
            logger.warning("calibrator %s of %s cannot be used: %s", name, context.project_name, error)
    return None


def prelabels(
    context: LoopContext,
    champion: ModelVersion,
    predictions: Mapping[str, StoredPrediction],
    selections: Sequence[Selection],
    told: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, StoredPrediction], bool]:
    """The predictions to publish: cells fused from all labellers, the score of each its confidence.

    Uncertainty and embedding stay the champion's. Where it is the only labeller and nothing is calibrated, its own
    predictions are returned as they are. Of a large pool at most `pseudo.images` open images are looked at, the batch
    first, then by falling uncertainty; the rest keep the champion's cells until their turn comes.

    Args:
        context: the project.
        champion: the model in service.
        predictions: its predictions by image id.
        selections: the batch.
        told: called as told(done, total).

    Returns:
        Predictions by image id, and whether the scores are calibrated confidences.
    """
    calibrator = last_calibrator(context)
    alone = set(context.config.pseudo.labellers) <= {CHAMPION, context.config.model.name}
    if calibrator is None and alone:
        return dict(predictions), False
    panel = Panel(context, champion)
    if panel.is_shadow:
        logger.warning("no labeller of %s may speak; the champion's own cells are published", context.project_name)
        return dict(predictions), False
    config = context.config.pseudo
    rank = {selection.image_id: selection.rank for selection in selections}
    rows = [r for r in context.index.images(context.project_name, state="open") if r.image_id in predictions]
    rows.sort(key=lambda r: (rank.get(r.image_id, np.inf), -predictions[r.image_id].uncertainty, r.image_id))
    result = dict(predictions)
    for done, row in enumerate(rows[: config.images], start=1):
        stored = predictions[row.image_id]
        seen = panel.see(image_ref(row), stored)
        if seen is not None and seen.proposals:
            sure = uncalibrated(seen.fused) if calibrator is None else calibrator.confidence(seen.features)
            result[row.image_id] = replace(stored, instances=shown(seen.fused.instances, sure, config))
        if told is not None:
            told(done, min(len(rows), config.images))
    return result, calibrator is not None
