"""Active learning played again on labelled images: what a strategy would have asked for, and what it had brought.

An oracle stands in for the person: asked for an image, it gives the true cells, and what correcting the model's cells
into them costs. Every round trains from scratch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loop.acquisition import ACQUISITIONS
from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.predictions import StoredPrediction, candidate_of
from loop.data.store import read_image
from loop.data.texture import describe
from loop.effort.cost import CostModel
from loop.effort.edits import count_edits
from loop.effort.expected import Rates, expected_seconds
from loop.errors import ConfigError, InputError
from loop.metrics.instance import evaluate
from loop.metrics.matching import areas
from loop.models.passes import look_again
from loop.models.segmenter import Segmenter
from loop.replay.controls import CONTROLS
from loop.replay.pool import ReplayData
from loop.training.trainer import train
from loop.types import Candidate, FloatArray, Instances, Sample, UInt8Array
from loop.uncertainty.measures import FROM_ONE_LOOK, FROM_SEVERAL_LOOKS

Unit = Literal["images", "cells"]

LEFT_ALONE = 0.75
"""A person leaves a cell of this IoU with the true one as it is."""


@dataclass(frozen=True)
class ReplayPlan:
    """How a replay goes, the same for all its strategies.

    Attributes:
        model, train, instances: the network and its training; the training's seed is replaced by the replay's.
        start: how much is labelled at first, drawn at random, the same for all strategies of a seed.
        batch: how much more each round.
        rounds: how often a model is trained, the first included.
        cost: seconds of a person's work.
        unit: what start and batch count: images, or cells that a person has corrected.
        measure: the uncertainty that strategies see as `Candidate.uncertainty`.
        embedding: what makes images alike, as `select.embedding`.
        passes, n_passes: how often the pool is looked at, as in `select`.
        full_steps: the model of full supervision trains so many times as long.
    """

    model: ModelConfig
    train: TrainConfig
    instances: InstanceConfig
    start: int
    batch: int
    rounds: int
    cost: CostModel
    unit: Unit = "images"
    measure: str = "entropy_cells"
    embedding: Literal["model", "look"] = "model"
    passes: Literal["once", "turns", "dropout"] = "once"
    n_passes: int = 4
    full_steps: float = 4.0

    def __post_init__(self) -> None:
        for name in ("start", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; give 1 or more")
        known = (*FROM_ONE_LOOK, *(() if self.passes == "once" else FROM_SEVERAL_LOOKS))
        if self.measure not in known:
            raise ConfigError(
                f"select.measure is {self.measure!r}; choose from {', '.join(known)}, or for bald and disagreement set "
                "select.passes to turns or dropout"
            )


@dataclass(frozen=True)
class Labelled:
    """What people have labelled when a round's training begins.

    Attributes:
        chosen: ids of the images that the round brought, in the order in which they were asked for.
        taught: ids of all images labelled so far, these included.
        cells: true cells in those.
        corrections: cells that a person drew, reshaped or deleted for them.
        seconds: modelled work.
        foreground: px of their cells.
    """

    chosen: tuple[str, ...] = ()
    taught: tuple[str, ...] = ()
    cells: int = 0
    corrections: float = 0.0
    seconds: float = 0.0
    foreground: int = 0


@dataclass(frozen=True, eq=False)
class Model:
    """A model at work: its figures, and what it says of every image of the pool, by id.

    `figures`: what `loop.metrics.instance.evaluate` says of the images to measure on, without what is None; ap of each
    modality as "ap.NAME".
    """

    figures: Mapping[str, float]
    offered: Mapping[str, Instances]
    candidates: Mapping[str, Candidate]


@dataclass(frozen=True)
class Played:
    """One round: what was labelled, the figures of the model taught so, and what each strategy has labelled next.

    None where the pool is exhausted, and after the last round.
    """

    figures: Mapping[str, float]
    following: Mapping[str, Labelled | None]
    labelled: Labelled


@dataclass(frozen=True, eq=False)
class Bench:
    """A replay's data and plan at hand; `pool` are the images to choose from by id.

    Pixels and looks are kept in memory once they were asked for.
    """

    data: ReplayData
    plan: ReplayPlan
    pool: Mapping[str, Sample] = field(init=False)
    _pixels: dict[Path, UInt8Array] = field(default_factory=dict)
    _looks: dict[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", {sample.image.image_id: sample for sample in self.data.pool})

    def pixels(self, sample: Sample) -> UInt8Array:
        """The image as it is read."""
        path = sample.image.path
        if path not in self._pixels:
            self._pixels[path] = read_image(path).pixels
        return self._pixels[path]

    def look(self, sample: Sample) -> FloatArray:
        """What the image looks like in numbers."""
        name = sample.image.image_id
        if name not in self._looks:
            self._looks[name] = describe(self.pixels(sample))
        return self._looks[name]


def check_strategies(names: Sequence[str]) -> None:
    """Nothing where all are keys of ACQUISITIONS or CONTROLS.

    Raises:
        ConfigError: a strategy is unknown.
    """
    unknown = sorted(set(names) - set(ACQUISITIONS) - set(CONTROLS))
    if unknown:
        known = ", ".join(sorted([*ACQUISITIONS, *CONTROLS]))
        raise ConfigError(f"strategy {unknown[0]!r} is unknown; choose from {known}")


def begin(bench: Bench, seed: int) -> Labelled:
    """What all strategies of a seed begin with: images drawn at random and drawn in from nothing.

    Raises:
        InputError: the pool is too small for it.
    """
    names = sorted(bench.pool)
    ranked = [names[int(i)] for i in np.random.default_rng([seed, 0]).permutation(len(names))]
    chosen = _within(ranked, bench, bench.plan.start)
    if len(chosen) == len(names):
        raise InputError(
            f"start={bench.plan.start} {bench.plan.unit} takes the whole pool of {len(names)} images; give less"
        )
    return _corrected(bench, Labelled(), chosen, {})


def play(bench: Bench, seed: int, number: int, labelled: Labelled, strategies: Sequence[str]) -> Played:
    """Trains on what is labelled, measures, and lets each strategy choose what is labelled next.

    Args:
        bench: data and plan.
        seed: of the training and of the strategies' chance.
        number: of the round, from 0; after the plan's last nothing is chosen.
        labelled: what people have labelled.
        strategies: keys of ACQUISITIONS, or of CONTROLS, which look at the truth.

    Raises:
        ConfigError: a strategy is unknown.
    """
    check_strategies(strategies)
    last = number + 1 >= bench.plan.rounds
    model = fit(bench, labelled.taught, seed, look=not last)
    following: dict[str, Labelled | None] = {}
    for strategy in strategies:
        chosen = [] if last else _chosen(bench, strategy, [seed, number + 1], labelled, model)
        following[strategy] = _corrected(bench, labelled, chosen, model.offered) if chosen else None
    return Played(model.figures, following, labelled)


def _chosen(bench: Bench, strategy: str, seed: Sequence[int], labelled: Labelled, model: Model) -> list[str]:
    """What the strategy asks for, as much as the batch holds.

    A batch counted in cells ends with the image in which it is full; what it is too large counts against the next.
    """
    plan = bench.plan
    taught = set(labelled.taught)
    candidates = [model.candidates[name] for name in bench.pool if name not in taught]
    if not candidates:
        return []
    room = _room(plan, seed[1], labelled)
    if strategy in CONTROLS:
        rng = np.random.default_rng(seed)
        return _within(CONTROLS[strategy](candidates, model.offered, bench.pool, rng), bench, room)
    embeddings = [model.candidates[name].embedding for name in labelled.taught]
    typical = labelled.cells / max(len(labelled.taught), 1)
    k = room if plan.unit == "images" else max(1, round(room / max(typical, 1.0)))
    while True:
        rng = np.random.default_rng(seed)
        selected = ACQUISITIONS[strategy](candidates, min(k, len(candidates)), rng, labelled=embeddings)
        found = _within([selection.image_id for selection in selected], bench, room)
        full = plan.unit == "images" or sum(len(bench.pool[name].instances) for name in found) >= room
        if full or k >= len(candidates):
            return found
        k *= 2


def _room(plan: ReplayPlan, number: int, labelled: Labelled) -> int:
    """How much the batch of round `number` may hold, in the plan's unit; at least 1."""
    if plan.unit == "images":
        return plan.batch
    return max(1, plan.start + number * plan.batch - labelled.cells)


def _within(ranked: Sequence[str], bench: Bench, room: int) -> list[str]:
    """The first of the ranked images that fill `room` images or cells."""
    if bench.plan.unit == "images":
        return list(ranked[:room])
    found: list[str] = []
    spent = 0
    for name in ranked:
        if spent >= room:
            break
        found.append(name)
        spent += len(bench.pool[name].instances)
    return found


def _corrected(bench: Bench, before: Labelled, chosen: Sequence[str], offered: Mapping[str, Instances]) -> Labelled:
    """What is labelled after a person corrected the offered cells of the chosen images, and what it cost."""
    cells, corrections, seconds, foreground = before.cells, before.corrections, before.seconds, before.foreground
    for name in chosen:
        truth = bench.pool[name].instances
        edits = count_edits(offered.get(name, Instances.build(truth.shape)), truth, kept_iou=LEFT_ALONE)
        cells += len(truth)
        corrections += edits.edited + edits.deleted + edits.added
        seconds += bench.plan.cost.seconds(edits)
        foreground += int(areas(truth).sum())
    return Labelled(tuple(chosen), (*before.taught, *chosen), cells, corrections, seconds, foreground)


def fit(bench: Bench, taught: Sequence[str], seed: int, *, times: float = 1.0, look: bool = True) -> Model:
    """A model trained from scratch on the images of these ids, measured, and asked about the pool.

    Args:
        bench: data and plan.
        taught: ids.
        seed: of the training.
        times: it trains so many times as long.
        look: False leaves the pool out.
    """
    plan = bench.plan
    budget: dict[str, Any] = {"minutes": plan.train.minutes * times, "seed": seed}
    if plan.train.max_steps is not None:
        budget["max_steps"] = round(plan.train.max_steps * times)
    config = plan.train.model_copy(update=budget)
    samples = [bench.pool[name] for name in sorted(taught)]
    trained = train(samples, plan.model, config, instances=plan.instances, log=lambda step, values: None)
    segmenter = Segmenter(trained.net, plan.model, trained.instances, device=config.device, precision=config.precision)
    figures = _measured(segmenter, bench)
    offered: dict[str, Instances] = {}
    candidates: dict[str, Candidate] = {}
    for name, sample in bench.pool.items() if look else ():
        offered[name], candidates[name] = _seen(segmenter, sample, bench)
    return Model(figures, offered, candidates)


def _measured(segmenter: Segmenter, bench: Bench) -> dict[str, float]:
    test = bench.data.test
    pairs = [(segmenter.predict(bench.pixels(s), image_id=s.image.image_id).instances, s.instances) for s in test]
    modalities = [sample.image.modality for sample in test]
    found = evaluate(pairs, modalities=modalities if all(modalities) else None)
    per = {f"ap.{name}": float(part["ap"]) for name, part in found["per"].items()}
    return {**{key: float(value) for key, value in found.items() if key != "per" and value is not None}, **per}


def _seen(segmenter: Segmenter, sample: Sample, bench: Bench) -> tuple[Instances, Candidate]:
    plan, name, pixels = bench.plan, sample.image.image_id, bench.pixels(sample)
    found = segmenter.predict(pixels, image_id=name)
    measures = dict(found.measures)
    if plan.passes != "once":
        measures |= look_again(segmenter, pixels, plan.passes, plan.n_passes, name)
    embedding = found.embedding if plan.embedding == "model" else bench.look(sample)
    stored = StoredPrediction(found.instances, found.uncertainty, embedding, measures)
    seconds = expected_seconds(found.instances, plan.cost, Rates.prior())
    return found.instances, candidate_of(stored, name, sample.image.group, seconds=seconds, measure=plan.measure)
