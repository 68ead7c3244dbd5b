"""Step 6: the next batch: what a strategy wants labelled, quick images first, plus a random control share."""

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flows.absent import named, unseen, vanished
from flows.context import LoopContext, group_of
from flows.effort import Effort, cost_model
from flows.texture import Progress, textures
from loop.acquisition.batch import choose_batch, control_count, first_batch
from loop.adapters.index import ImageRow
from loop.data.predictions import StoredPrediction, candidate_of
from loop.effort.cost import CostModel
from loop.effort.expected import Rates
from loop.types import Candidate, Selection

logger = logging.getLogger(__name__)

MOST_DESCRIBED = 2000
"""Of a larger pool so many images, drawn at random, are looked at for the first batch: minutes, not hours."""


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


def select(
    context: LoopContext,
    round_number: int,
    predictions: Mapping[str, StoredPrediction],
    progress: Progress | None = None,
) -> list[Selection]:
    """The batch of a round in the order in which people shall see it; chosen once, then read back.

    Control images of earlier batches that nobody has labelled yet stay in the batch and count towards its control
    share, so that the hold-out loses none of its hard images. Other images chosen earlier and still open go back
    into the pool first. An image that a model has learnt from, under a person's labels or pseudo-labels, never becomes
    a control image, nor does its group; a person may still be asked to label a pseudo-labelled one, to teach.

    Images whose file is gone, and those that the model could not predict, are not in the choice, and are named in the
    log. Before there is a model the images to teach with are chosen by `select.first_strategy` on statistics of their
    texture.

    Args:
        context: the project.
        round_number: the round that chooses.
        predictions: image id -> prediction, of the open images and those that taught; empty before there is a model.
        progress: called as progress(done, total) over the images whose look is described.

    Returns:
        At most `select.batch` (before a model: `select.first_batch`) images; [] when the pool is exhausted.

    Raises:
        ConfigError: `select.strategy` or `select.first_strategy` is unknown.
        InputError: the predictions lack `select.measure`.
        NonFiniteError: a prediction holds NaN or infinity; names the image.
    """
    images = context.index.images(context.project_name)
    chosen = [row for row in images if row.chosen_in == round_number and row.rank is not None]
    if chosen:
        return [_as_selection(row) for row in sorted(chosen, key=lambda row: row.rank or 0)]
    pool = _pool(images, _absent(images, _measured(predictions, context.config.select.measure)))
    rng = np.random.default_rng(seed_of(f"{context.project_name}/{round_number}"))
    seconds: dict[str, float] = {}
    if predictions:
        seconds = _seconds(context, (*pool.open, *pool.waiting), predictions)
        fresh = _informative(context, pool, predictions, seconds, rng, progress=progress)
    else:
        fresh = _first(context, pool, rng, progress)
    batch = _with_waiting(pool.waiting, fresh, after=context.config.select.quick_first if seconds else 0)
    _record(context, round_number, images, batch, seconds)
    logger.info("round %d of %s: %d images chosen", round_number, context.project_name, len(batch))
    return batch


def _measured(predictions: Mapping[str, StoredPrediction], measure: str) -> Collection[str]:
    """The images whose uncertainty is known; all of them where none has the measure, which `candidate_of` refuses."""
    known = [image_id for image_id, found in predictions.items() if not found.measures or measure in found.measures]
    return known or predictions.keys()


def _absent(images: Sequence[ImageRow], predictions: Collection[str]) -> set[str]:
    """The open images that cannot be chosen; they are named in the log, but for tiles that wait for their task."""
    gone = vanished(images)
    lost = {row.image_id for row in gone}
    blind = unseen([row for row in images if row.image_id not in lost], predictions)
    if gone:
        logger.warning("%d open images are not in the choice, their files are gone: %s", len(gone), named(gone))
    if blind:
        logger.warning("%d open images are not in the choice, without a prediction: %s", len(blind), named(blind))
    waiting = {row.image_id for row in images if row.parent and row.task_id is None}
    return lost | waiting | {row.image_id for row in blind}


def _pool(images: Sequence[ImageRow], absent: Collection[str]) -> _Pool:
    control = [row for row in images if row.role == "control"]
    control_groups = frozenset(group_of(row) for row in control)
    teaching = tuple(
        row
        for row in images
        if row.taught or (row.state == "labelled" and row.role != "control" and group_of(row) not in control_groups)
    )
    return _Pool(
        open=tuple(r for r in images if r.state == "open" and r.role != "control" and r.image_id not in absent),
        waiting=tuple(row for row in control if row.state == "open" and row.image_id not in absent),
        teaching=teaching,
        control_groups=control_groups,
        pseudo_groups=frozenset(group_of(row) for row in images if row.pseudo_taught),
        n_control=sum(row.state in ("open", "labelled") for row in control),
    )


def _first(context: LoopContext, pool: _Pool, rng: np.random.Generator, progress: Progress | None) -> list[Selection]:
    """The first batch, or what is missing of it while there is no model."""
    settings = context.config.select
    rows, described = pool.open, None
    if settings.first_strategy != "random":
        some = rng.permutation(len(rows))[: max(MOST_DESCRIBED, 2 * settings.first_batch)]
        drawn = [rows[int(i)] for i in sorted(some)]
        described = textures(context, (*drawn, *pool.teaching), progress)
        rows = tuple(row for row in drawn if row.image_id in described)
    k = max(1, settings.first_batch - len(pool.waiting))
    n_control = max(0, control_count(settings.first_batch, settings.first_control, rng) - pool.n_control)
    return first_batch(
        [(row.image_id, row.group) for row in rows],
        k,
        min(n_control, k) / k,
        rng,
        used_groups=pool.used_groups,
        control_groups=pool.control_groups,
        strategy=settings.first_strategy,
        embeddings=described,
        labelled=[described[row.image_id] for row in pool.teaching if row.image_id in described] if described else (),
    )


def _seconds(
    context: LoopContext, rows: Sequence[ImageRow], predictions: Mapping[str, StoredPrediction]
) -> dict[str, float]:
    """How long a person is expected to need for each image, by image id."""
    if context.index.annotations(context.project_name):
        effort = cost_model(context)
    else:
        effort = Effort(CostModel.prior(context.config.effort), Rates.prior())
    return {row.image_id: effort.seconds(predictions[row.image_id].instances) for row in rows}


def _candidate(row: ImageRow, stored: StoredPrediction, measure: str, seconds: float) -> Candidate:
    """The image as a strategy sees it; a prediction of before there were measures has its uncertainty alone."""
    if not stored.measures:
        stored = replace(stored, measures={measure: stored.uncertainty})
    return candidate_of(stored, row.image_id, row.group, seconds=seconds, measure=measure)


def _informative(
    context: LoopContext,
    pool: _Pool,
    predictions: Mapping[str, StoredPrediction],
    seconds: Mapping[str, float],
    rng: np.random.Generator,
    *,
    progress: Progress | None,
) -> list[Selection]:
    settings = context.config.select
    teaching = [row for row in pool.teaching if row.image_id in predictions]
    embedding = {row.image_id: predictions[row.image_id].embedding for row in (*pool.open, *teaching)}
    if settings.embedding == "look":
        embedding = textures(context, (*pool.open, *teaching), progress)
    candidates = [
        replace(
            _candidate(row, predictions[row.image_id], settings.measure, seconds[row.image_id]),
            embedding=embedding[row.image_id],
        )
        for row in pool.open
        if row.image_id in embedding
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
        labelled=[embedding[row.image_id] for row in teaching if row.image_id in embedding],
        quick_first=settings.quick_first,
    )


def _with_waiting(waiting: Sequence[ImageRow], fresh: Sequence[Selection], *, after: int) -> list[Selection]:
    """The fresh choice with the waiting control images at every second place behind the first ones, ranked from 1."""
    together = list(fresh)
    for place, row in enumerate(sorted(waiting, key=lambda row: row.image_id)):
        reason = "drawn at random in an earlier batch and not labelled yet"
        together.insert(min(len(together), after + 2 * place + 1), Selection(row.image_id, 0, True, reason))
    return [
        Selection(selection.image_id, rank, selection.control, selection.reason)
        for rank, selection in enumerate(together, start=1)
    ]


def _record(
    context: LoopContext,
    round_number: int,
    images: Sequence[ImageRow],
    batch: Sequence[Selection],
    seconds: Mapping[str, float],
) -> None:
    updates: dict[str, dict[str, object]] = {
        row.image_id: {"role": "open", "rank": None, "reason": "", "note": "", "seconds": None}
        for row in images
        if row.state == "open" and row.role == "train"
    }
    for selection in batch:
        updates[selection.image_id] = {
            "role": "control" if selection.control else "train",
            "rank": selection.rank,
            "reason": selection.reason,
            "chosen_in": round_number,
            "note": "",
            "seconds": seconds.get(selection.image_id),
        }
    context.index.set_images(context.project_name, updates)


def _as_selection(row: ImageRow) -> Selection:
    return Selection(row.image_id, row.rank or 0, row.role == "control", row.reason)


def seed_of(text: str) -> int:
    """A seed that depends on nothing but the text, on any machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
