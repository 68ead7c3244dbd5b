"""Step 6: the next batch: what the model knows least of and has not seen the like of, plus a random control share."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flows.context import LoopContext, group_of
from loop.acquisition.batch import choose_batch, control_count, first_batch
from loop.adapters.index import ImageRow
from loop.data.predictions import StoredPrediction
from loop.types import Candidate, Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pool:
    """The images of a project as a choice sees them."""

    open: tuple[ImageRow, ...]
    waiting: tuple[ImageRow, ...]
    teaching: tuple[ImageRow, ...]
    control_groups: frozenset[str]
    pseudo_groups: frozenset[str]
    n_control: int

    @property
    def used_groups(self) -> frozenset[str]:
        """Groups that a model has learnt from, under a person's labels or pseudo-labels: they give no control image."""
        return frozenset(group_of(row) for row in self.teaching) | self.pseudo_groups


def select(context: LoopContext, round_number: int, predictions: Mapping[str, StoredPrediction]) -> list[Selection]:
    """The batch of a round in the order in which people shall see it; chosen once, then read back.

    Control images of earlier batches that nobody has labelled yet stay in the batch and count towards its control
    share, so that the hold-out loses none of its hard images. Other images chosen earlier and still open go back
    into the pool first. An image that a model has learnt from, under a person's labels or pseudo-labels, never becomes
    a control image, nor does its group; a person may still be asked to label a pseudo-labelled one, to teach.

    Args:
        context: the project.
        round_number: the round that chooses.
        predictions: image id -> prediction, of every open image; empty before there is a model.

    Returns:
        At most `select.batch` (before a model: `select.first_batch`) images; [] when the pool is exhausted.

    Raises:
        ConfigError: `select.strategy` is unknown.
        NonFiniteError: a prediction holds NaN or infinity; names the image.
    """
    images = context.index.images(context.project_name)
    chosen = [row for row in images if row.chosen_in == round_number and row.rank is not None]
    if chosen:
        return [_as_selection(row) for row in sorted(chosen, key=lambda row: row.rank or 0)]
    pool = _pool(images)
    rng = np.random.default_rng(_seed(context.project_name, round_number))
    fresh = _informative(context, pool, predictions, rng) if predictions else _random(context, pool, rng)
    batch = _with_waiting(pool.waiting, fresh)
    _record(context, round_number, images, batch)
    logger.info("round %d of %s: %d images chosen", round_number, context.project_name, len(batch))
    return batch


def _pool(images: Sequence[ImageRow]) -> _Pool:
    control = [row for row in images if row.role == "control"]
    control_groups = frozenset(group_of(row) for row in control)
    teaching = tuple(
        row
        for row in images
        if row.taught or (row.state == "labelled" and row.role != "control" and group_of(row) not in control_groups)
    )
    return _Pool(
        open=tuple(row for row in images if row.state == "open" and row.role != "control"),
        waiting=tuple(row for row in control if row.state == "open"),
        teaching=teaching,
        control_groups=control_groups,
        pseudo_groups=frozenset(group_of(row) for row in images if row.pseudo_taught),
        n_control=sum(row.state in ("open", "labelled") for row in control),
    )


def _random(context: LoopContext, pool: _Pool, rng: np.random.Generator) -> list[Selection]:
    """The first batch, or what is missing of it while there is no model."""
    settings = context.config.select
    k = max(1, settings.first_batch - len(pool.waiting))
    n_control = max(0, control_count(settings.first_batch, settings.first_control, rng) - pool.n_control)
    return first_batch(
        [(row.image_id, row.group) for row in pool.open],
        k,
        min(n_control, k) / k,
        rng,
        used_groups=pool.used_groups,
        control_groups=pool.control_groups,
    )


def _informative(
    context: LoopContext, pool: _Pool, predictions: Mapping[str, StoredPrediction], rng: np.random.Generator
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
        for row in pool.open
        if row.image_id in predictions
    ]
    k = max(1, settings.batch - len(pool.waiting))
    n_control = max(0, control_count(settings.batch, settings.control, rng) - len(pool.waiting))
    return choose_batch(
        candidates,
        k=k,
        control_share=min(n_control, k) / k,
        strategy=settings.strategy,
        rng=rng,
        used_groups=pool.used_groups,
        control_groups=pool.control_groups,
        labelled=[predictions[row.image_id].embedding for row in pool.teaching if row.image_id in predictions],
    )


def _with_waiting(waiting: Sequence[ImageRow], fresh: Sequence[Selection]) -> list[Selection]:
    """The fresh choice with the waiting control images at every second place, ranked from 1."""
    together = list(fresh)
    for place, row in enumerate(sorted(waiting, key=lambda row: row.image_id)):
        reason = "drawn at random in an earlier batch and not labelled yet"
        together.insert(min(len(together), 2 * place + 1), Selection(row.image_id, 0, True, reason))
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
