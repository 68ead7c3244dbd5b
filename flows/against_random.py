"""Is the strategy better than picking at random, on this project's own images: models of both, at equal cost."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flows.context import LoopContext, group_of
from flows.freeze import Frozen
from flows.retrain import Lesson, recipe_id, shortened
from loop.acquisition.batch import FIRST_REASON
from loop.adapters.index import AnnotationRow, ImageRow
from loop.config import EffortConfig, LoopConfig
from loop.data.store import file_sha256, read_image
from loop.data.text_file import write_text
from loop.errors import ImageError
from loop.metrics.gain import gain_of_pairs
from loop.metrics.instance import image_ap
from loop.models.segmenter import Segmenter
from loop.training.trainer import Trained, train
from loop.types import Sample

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

FEWEST = 3
"""A model of fewer images of its own kind says nothing of how they were picked."""

LONGEST = 3.0
"""Times what drawing each cell by hand would take; a longer lead time held a break and counts as that."""


class Arm(NamedTuple):
    """What one model learns from, and the seconds of people's work in it."""

    samples: tuple[Sample, ...]
    seconds: float


class Work(NamedTuple):
    """Seconds of people's work by image, and whether Label Studio has measured them."""

    seconds: dict[str, float]
    measured: bool


class Fold(NamedTuple):
    """Hold-out images to measure on, and the two models that are measured: of no group that is among them."""

    measured: tuple[Sample, ...]
    random: Arm
    chosen: Arm


def against_random(
    context: LoopContext, frozen: Frozen, annotations: Mapping[str, AnnotationRow], progress: Progress | None = None
) -> dict[str, Any]:
    """The gain of the strategy over random images at equal cost, with its interval; or {"reason": why not}.

    Four models are trained, each with `estimate.share` of the training budget, one after the other in this process:
    two for each of two folds of the hold-out (`plan`). The first sets the number of steps of all. None is registered.
    What was measured lies in ROOT/estimates/PROJECT under the snapshot and the settings, so that a run that was killed
    goes on after the last model that was done and a second one gives the same answer at once.

    Two folds are two draws of the dice; the interval counts both that and the images (`gain_of_pairs`).

    Args:
        context: the project.
        frozen: the labels of this round.
        annotations: the newest annotation of each image.
        progress: called as progress(done, total) after each model.

    Raises:
        InputError, NonFiniteError: images or labels cannot be trained on or measured.
        OSError: the answer cannot be kept.
    """
    planned = plan(context, frozen, annotations)
    if isinstance(planned, str):
        return {"reason": planned}
    store = _Store(context, frozen.snapshot.id, planned)
    arms = [(f"{number}.{name}", fold, name) for number, fold in enumerate(planned) for name in ("random", "chosen")]
    for done, (key, fold, name) in enumerate(arms):
        if progress is not None:
            progress(done, len(arms))
        if key not in store.runs:
            steps = next((run["steps"] for run in store.runs.values()), None)
            store.add(key, _run(context.config, getattr(fold, name), fold.measured, steps))
    if progress is not None:
        progress(len(arms), len(arms))
    return _document(context.config, planned, store.runs)


def plan(context: LoopContext, frozen: Frozen, annotations: Mapping[str, AnnotationRow]) -> tuple[Fold, ...] | str:
    """Two folds of the hold-out by group, with what the two models of each learn from; or why there are none.

    Random: the hold-out images of the other fold. Chosen: what the strategy chose, in the order in which it did, so as
    many as it had chosen when people had worked that long. Both start from the teaching images that were drawn at
    random (the first batch, where it was): the strategy built on them, and so would chance. The longer list is cut
    where its cost comes nearest to the other's. Images that somebody labelled out of turn are in neither. No group of a
    fold's hold-out images teaches for it: the folds share none, and `freeze` keeps those of the hold-out from teaching.
    """
    settings = context.config.estimate
    if context.config.select.strategy == "random":
        return "the strategy is random itself (select.strategy)"
    rows = {row.image_id: row for row in context.index.images(context.project_name)}
    holdout, teaching = _intact(frozen.holdout), _intact(frozen.train)
    if len(holdout) < settings.min_images:
        return f"{len(holdout)} hold-out images are labelled, {settings.min_images} are needed"
    by_turn = [sample for sample in teaching if rows[sample.image.image_id].role == "train"]
    by_turn.sort(key=lambda sample: _turn(rows[sample.image.image_id]))
    chance = [sample for sample in by_turn if FIRST_REASON in rows[sample.image.image_id].reason]
    chosen = [sample for sample in by_turn if FIRST_REASON not in rows[sample.image.image_id].reason]
    if len(chosen) < FEWEST:
        return f"{len(chosen)} labelled images were chosen by the strategy, {FEWEST} are needed"
    halves = _halves(holdout, rows)
    if min(map(len, halves)) < FEWEST:
        return "the hold-out images are of too few groups to part them in two"
    seconds = work_seconds([*holdout, *teaching], annotations, context.config.effort).seconds
    folds = []
    for measured, other in (halves, halves[::-1]):
        parts = _at_equal_cost(other, chosen, seconds)
        if min(map(len, parts)) < FEWEST:
            return f"at equal cost fewer than {FEWEST} random or chosen images are left"
        random, picked = (_arm([*chance, *part], seconds) for part in parts)
        folds.append(Fold(tuple(measured), random, picked))
    return tuple(folds)


def work_seconds(samples: Sequence[Sample], annotations: Mapping[str, AnnotationRow], prior: EffortConfig) -> Work:
    """What people's work on images took: measured where all of them are; else for all what drawing the cells takes.

    Both kinds are never mixed: images that were measured would count otherwise than those that were not.
    """
    drawn = {s.image.image_id: max(prior.image_s + prior.add_s * len(s.instances), 1.0) for s in samples}
    measured: dict[str, float] = {}
    for image_id, expected in drawn.items():
        row = annotations.get(image_id)
        if row is None or row.lead_time_s is None or not 0 < row.lead_time_s < float("inf"):
            return Work(drawn, False)
        measured[image_id] = min(row.lead_time_s, LONGEST * expected)
    return Work(measured, True)


def _turn(row: ImageRow) -> tuple[int, int, str]:
    """When an image was chosen."""
    return row.chosen_in or 0, row.rank or 0, row.image_id


def _halves(holdout: Sequence[Sample], rows: Mapping[str, ImageRow]) -> tuple[list[Sample], list[Sample]]:
    """Two parts of about equal size that share no group, each in an order by chance; always the same ones."""
    groups: dict[str, list[Sample]] = {}
    for sample in sorted(holdout, key=lambda sample: _hash(sample.image.image_id)):
        groups.setdefault(group_of(rows[sample.image.image_id]), []).append(sample)
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for name in sorted(groups, key=lambda name: (-len(groups[name]), _hash(name))):
        min(parts, key=len).extend(groups[name])
    for part in parts:
        part.sort(key=lambda sample: _hash(sample.image.image_id))
    return parts


def _at_equal_cost(
    random: Sequence[Sample], chosen: Sequence[Sample], seconds: Mapping[str, float]
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Both lists, the dearer one cut after the image at which its cost is nearest to the other's."""
    totals = [np.cumsum([seconds[s.image.image_id] for s in part]) for part in (random, chosen)]
    cost = min(total[-1] for total in totals)
    cuts = [int(np.abs(total - cost).argmin()) + 1 for total in totals]
    return random[: cuts[0]], chosen[: cuts[1]]


def _arm(samples: Sequence[Sample], seconds: Mapping[str, float]) -> Arm:
    return Arm(tuple(samples), sum(seconds[sample.image.image_id] for sample in samples))


def _intact(samples: Sequence[Sample]) -> list[Sample]:
    """The images whose files are those that people saw; the log names the others."""
    kept = []
    for sample in samples:
        try:
            same = file_sha256(sample.image.path) == sample.image.sha256
        except ImageError as error:
            logger.warning("%s is left out of the estimate: %s", sample.image.image_id, error)
            continue
        if same:
            kept.append(sample)
        else:
            logger.warning("%s is left out of the estimate: %s has changed", sample.image.image_id, sample.image.path)
    return kept


def _run(config: LoopConfig, arm: Arm, measured: Sequence[Sample], steps: int | None) -> dict[str, Any]:
    """A model of the arm's images and its AP on each measured one."""
    budget: dict[str, int] = {"patience": 0} if steps is None else {"patience": 0, "max_steps": steps}
    settings = shortened(config, config.estimate.share).train.model_copy(update=budget)
    trained = train(arm.samples, config.model, settings, instances=config.instances, log=_unheard)
    logger.info(
        "a model for the estimate: %d images, %d steps, %.0f s", len(arm.samples), trained.steps, trained.seconds
    )
    return {"steps": trained.steps, "scores": _scores(config, trained, measured)}


def _scores(config: LoopConfig, trained: Trained, measured: Sequence[Sample]) -> dict[str, float]:
    settings = config.train
    segmenter = Segmenter(
        trained.net, config.model, trained.instances, device=settings.device, precision=settings.precision
    )
    found = {}
    for sample in measured:
        image_id = sample.image.image_id
        prediction = segmenter.predict(read_image(sample.image.path).pixels, image_id=image_id)
        found[image_id] = image_ap(prediction.instances, sample.instances)
    return found


def _unheard(step: int, values: dict[str, float]) -> None:
    """Nobody follows the losses of these models."""


class _Store:
    """What was measured so far, on disk after each model."""

    def __init__(self, context: LoopContext, snapshot_id: str, folds: Sequence[Fold]) -> None:
        ids = [[[s.image.image_id for s in part] for part in (f.measured, f.random[0], f.chosen[0])] for f in folds]
        recipe = recipe_id(context.config, Lesson(share=context.config.estimate.share))
        name = f"{snapshot_id}-{_hash(json.dumps([recipe, ids]))[:16]}.json"
        self._path: Path = context.workspace.root / "estimates" / context.project_name / name
        self.runs: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self.runs = json.loads(self._path.read_text(encoding="utf-8"))

    def add(self, key: str, run: dict[str, Any]) -> None:
        """Keeps one model's figures."""
        self.runs[key] = run
        write_text(self._path, json.dumps(self.runs))


def _document(config: LoopConfig, folds: Sequence[Fold], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    scores = {
        name: [
            np.array([runs[f"{number}.{name}"]["scores"][s.image.image_id] for s in fold.measured])
            for number, fold in enumerate(folds)
        ]
        for name in ("chosen", "random")
    }
    gain = gain_of_pairs(
        scores["chosen"],
        scores["random"],
        confidence=config.gate.confidence,
        resamples=config.gate.resamples,
        rng=np.random.default_rng(0),
    )
    return {
        **gain._asdict(),
        "images": sum(len(fold.measured) for fold in folds),
        "steps": runs["0.random"]["steps"],
        "folds": [
            {
                "images": len(fold.measured),
                "random_ap": float(scores["random"][number].mean()),
                "chosen_ap": float(scores["chosen"][number].mean()),
                "random_images": len(fold.random.samples),
                "chosen_images": len(fold.chosen.samples),
                "random_minutes": fold.random.seconds / 60,
                "chosen_minutes": fold.chosen.seconds / 60,
            }
            for number, fold in enumerate(folds)
        ],
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
