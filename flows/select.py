"""Step 6: the next batch: what the model knows least of and has not seen the like of, plus a random control share."""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from flows.context import LoopContext
from loop.acquisition.batch import choose_batch, first_batch
from loop.adapters.index import ImageRow
from loop.data.predictions import StoredPrediction
from loop.types import Candidate, Selection

logger = logging.getLogger(__name__)


def select(context: LoopContext, round_number: int, predictions: Mapping[str, StoredPrediction]) -> list[Selection]:
    """The batch of a round in the order in which people shall see it; chosen once, then read back.

    Control images of earlier batches that nobody has labelled yet stay in the batch and count towards its control
    share, so that the hold-out loses none of its hard images. Other images chosen earlier and still open go back
    into the pool first.

    Args:
        context: the project.
        round_number: the round that chooses.
        predictions: image id -> prediction, of every open image; empty before there is a model.
    """
    images = context.index.images(context.project_name)
    chosen = [row for row in images if row.chosen_in == round_number and row.rank is not None]
    if chosen:
        return [_as_selection(row) for row in sorted(chosen, key=lambda row: row.rank or 0)]
    waiting = [row for row in images if row.state == "open" and row.role == "control"]
    pool = [row for row in images if row.state == "open" and row.role != "control"]
    rng = np.random.default_rng(_seed(context.project_name, round_number))
    settings = context.config.select
    if predictions:
        fresh = _choose(context, images, pool, predictions, rng, settings.batch, len(waiting))
    else:
        fresh = first_batch(
            [(row.image_id, row.group) for row in pool], settings.first_batch, settings.first_control, rng
        )
    batch = _interleave(waiting, fresh)
    _record(context, round_number, images, batch)
    logger.info("round %d of %s: %d images chosen", round_number, context.project_name, len(batch))
    return batch


def _choose(
    context: LoopContext,
    images: Sequence[ImageRow],
    pool: Sequence[ImageRow],
    predictions: Mapping[str, StoredPrediction],
    rng: np.random.Generator,
    k: int,
    n_waiting: int,
) -> list[Selection]:
    settings = context.config.select
    candidates = [
        Candidate(
            row.image_id,
            row.group,
            predictions[row.image_id].uncertainty,
            predictions[row.image_id].embedding,
            len(predictions[row.image_id].instances),
        )
        for row in pool
        if row.image_id in predictions
    ]
    control_groups = {row.group or row.image_id for row in images if row.role == "control"}
    taught = [row for row in images if row.state == "labelled" and (row.group or row.image_id) not in control_groups]
    n_control = max(0, round(k * settings.control) - n_waiting)
    n_fresh = max(1, k - n_waiting)
    return choose_batch(
        candidates,
        k=n_fresh,
        control_share=n_control / n_fresh,
        strategy=settings.strategy,
        rng=rng,
        used_groups={row.group or row.image_id for row in taught},
        control_groups=control_groups,
        labelled=[predictions[row.image_id].embedding for row in taught if row.image_id in predictions],
    )


def _interleave(waiting: Sequence[ImageRow], fresh: Sequence[Selection]) -> list[Selection]:
    left = [
        Selection(row.image_id, 0, True, "drawn at random in an earlier batch and not labelled yet")
        for row in sorted(waiting, key=lambda row: row.image_id)
    ]
    together = list(fresh)
    for place, selection in enumerate(left):
        together.insert(min(len(together), 2 * place + 1), selection)
    return [
        Selection(selection.image_id, rank, selection.control, selection.reason)
        for rank, selection in enumerate(together, start=1)
    ]


def _record(context: LoopContext, round_number: int, images: Sequence[ImageRow], batch: Sequence[Selection]) -> None:
    updates: dict[str, dict[str, object]] = {
        row.image_id: {"role": "open", "rank": None, "reason": ""}
        for row in images
        if row.state == "open" and row.role == "train"
    }
    for selection in batch:
        updates[selection.image_id] = {
            "role": "control" if selection.control else "train",
            "rank": selection.rank,
            "reason": selection.reason,
            "chosen_in": round_number,
        }
    context.index.set_images(context.project_name, updates)


def _as_selection(row: ImageRow) -> Selection:
    return Selection(row.image_id, row.rank or 0, row.role == "control", row.reason)


def _seed(project: str, round_number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{project}/{round_number}".encode()).digest()[:8], "big")
