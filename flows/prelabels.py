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


def calibrator_for(context: LoopContext, panel: Panel, champion: ModelVersion) -> Calibrator | None:
    """The newest calibrator that holds for these labellers; None without.

    It was fitted for the very versions that speak now, or in the last round that looked for pseudo-labels, whose models
    may have replaced those that it was fitted for: then it is the best guess, for a champion of the same network only,
    until there are labels that the new ones have not learnt from. It shows, and never teaches.
    """
    speaking = dict(panel.crew.versions)
    rows = [row.pseudo for row in context.index.rounds(context.project_name) if row.pseudo.get("snapshot")]
    for place, document in enumerate(reversed(rows)):
        name = document.get("calibrator", "")
        fitted = {labeller: found["version"] for labeller, found in document.get("labellers", {}).items()}
        same_network = document.get("network", "") == champion.tags.get("network", "")
        if not name or not (fitted == speaking or (place == 0 and fitted.keys() == speaking.keys() and same_network)):
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
) -> tuple[dict[str, StoredPrediction], frozenset[str]]:
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
        Predictions by image id, and the ids of those whose scores are calibrated confidences.
    """
    alone = set(context.config.pseudo.labellers) <= {CHAMPION, context.config.model.name}
    if alone and not any(row.pseudo.get("calibrator") for row in context.index.rounds(context.project_name)):
        return dict(predictions), frozenset()
    panel = Panel(context, champion)
    if panel.is_shadow:
        logger.warning("no labeller of %s may speak; the champion's own cells are published", context.project_name)
        return dict(predictions), frozenset()
    calibrator = calibrator_for(context, panel, champion)
    if alone and calibrator is None:
        return dict(predictions), frozenset()
    config = context.config.pseudo
    rank = {selection.image_id: selection.rank for selection in selections}
    rows = [r for r in context.index.images(context.project_name, state="open") if r.image_id in predictions]
    rows.sort(key=lambda r: (rank.get(r.image_id, np.inf), -predictions[r.image_id].uncertainty, r.image_id))
    result, looked_at = dict(predictions), set[str]()
    for done, row in enumerate(rows[: config.images], start=1):
        stored = predictions[row.image_id]
        seen = panel.see(image_ref(row), stored)
        if seen is not None and seen.proposals:
            sure = uncalibrated(seen.fused) if calibrator is None else calibrator.confidence(seen.features)
            result[row.image_id] = replace(stored, instances=shown(seen.fused.instances, sure, config))
            looked_at.add(row.image_id)
        if told is not None:
            told(done, min(len(rows), config.images))
    return result, frozenset() if calibrator is None else frozenset(looked_at)
