"""Trains a segmenter on labelled images: the loop, top to bottom."""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.dataset import Batch, CropStream
from loop.errors import CheckpointError, NonFiniteError
from loop.models.runtime import resolve_device
from loop.training.adversarial import AdversarialLearner
from loop.training.budget import Budget, Clock
from loop.training.distributed import Group, process_group
from loop.training.learner import Learner
from loop.training.state import Progress, TrainingState, recipe_of
from loop.training.validation import Validation
from loop.types import Sample

logger = logging.getLogger(__name__)

LOG_EVERY = 10
STORE_EVERY_S = 30.0

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gave.

    Attributes:
        net: with averaged weights, in evaluation mode.
        steps: optimiser steps.
        seconds: spent on them.
        losses: one a step.
        instances: the thresholds to store with the weights; fitted where there were validation images.
        validation: ap, ap50, macro_ap and f1 on the validation images with these thresholds; None without any.
    """

    net: nn.Module
    steps: int
    seconds: float
    losses: tuple[float, ...]
    instances: InstanceConfig
    validation: dict[str, float] | None = None


def train(
    samples: Sequence[Sample],
    model: ModelConfig,
    config: TrainConfig,
    *,
    log: Log,
    instances: InstanceConfig | None = None,
    validation: Sequence[Sample] = (),
    pseudo: Sequence[Sample] = (),
    state_dir: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
    clock: Clock = time.perf_counter,
) -> Trained:
    """A segmenter trained from scratch until the budget of minutes, or of steps, is spent.

    AdamW; the learning rate rises over the first steps and then falls along a cosine to 0 at the end of the budget.
    With `max_steps` the same samples, settings and machine give the same weights (on a GPU up to the order in which it
    sums). No global seed is touched. Under `torchrun` the processes train one model together on different crops, and
    each returns the same weights; the first alone logs, validates, stores and is asked whether to stop.

    Args:
        samples: at least one labelled image; images without cells teach background.
        model: which network.
        config: budget, crops, optimiser and augmentation. A batch that does not fit into the GPU's memory is taken in
            pieces, with a warning in the log.
        log: called every ten steps and after the last with the step and {"loss": mean since the last call, "seconds":
            of the budget that are spent, "learning_rate": of this step, "seconds_left": expected}; after a validation
            with "validation_ap" beside them.
        instances: thresholds; the defaults otherwise. A sparse network's `tile` becomes the side of the crops.
        validation: images that the thresholds are fitted on, and that can end the training early (`patience`); the
            weights of the best validation, or of the end where they are better still, are then kept. They are not
            learnt from and must not be what the model is judged by later.
        pseudo: images whose cells models proposed, with how much each is believed as its weight (0: neither cell nor
            background). `pseudo_share` of the crops are of them; their weight rises from 0 over `pseudo_ramp` of the
            budget, and with `consistency` the network must agree there with its own averaged weights.
        state_dir: kept up to date, so that a killed or stopped training of the same images and settings goes on from
            there; with `max_steps` it gives the weights that it would have given. The caller deletes it once those are
            stored.
        should_stop: asked before each step but the first; True ends the training early, with what was learnt so far.
        clock: seconds of the budget; validating and storing do not count.

    Raises:
        InputError: no samples, or a crop holds more cells than a sparse network can find.
        ConfigError: the network or the device is unknown, the crop's side does not suit the network, one crop does not
            fit into the GPU's memory, or the network cannot be compiled (`compile: on`).
        ImageError, LabelError, ShapeError: an image or its labels cannot be used.
        NonFiniteError: the loss became NaN or infinite.
        CheckpointError: `state_dir` holds another training, or cannot be read or written.
    """
    if config.patience and (not validation or config.patience > config.validations):
        logger.warning(
            "train.patience=%d cannot end this training: it has %d validation images and validates %d times",
            *(config.patience, len(validation), config.validations),
        )
    with process_group(resolve_device(config.device)) as group:
        learner = learner_for(model)(model, config, group)
        stream = CropStream(samples, model, config, learner.lesson, pseudo)
        thresholds = instances or InstanceConfig()
        if learner.lesson.most_cells is not None:
            thresholds = thresholds.model_copy(update={"tile": config.crop})
        judge = Validation(validation, model, config, thresholds) if validation and group.is_first else None
        state = None
        if state_dir is not None:
            recipe = recipe_of([model, config, thresholds], group.world, samples, validation, pseudo)
            state = TrainingState(state_dir, recipe)
        progress = _progress(state, learner, group)
        run = _Run(
            learner=learner,
            config=config,
            group=group,
            budget=Budget(config, clock, progress.seconds),
            progress=progress,
            log=log,
            judge=judge,
            state=state if group.is_first else None,
            should_stop=should_stop,
        )
        run.go(stream)
        run.take_best()
    net = learner.finish()
    figures = None
    if judge is not None:
        thresholds, figures = judge.fit(net)
    return Trained(net, learner.steps, run.budget.seconds, tuple(progress.losses), thresholds, figures)


def learner_for(model: ModelConfig) -> type[Learner]:
    """How a network learns: against a discriminator (pix2pix), or by its loss alone."""
    return AdversarialLearner if model.name == "pix2pix" else Learner


def learning_rate(step: int, progress: float, config: TrainConfig) -> float:
    """The rate of step `step` (0 = the first), `progress` in [0, 1] of the budget being spent."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _progress(state: TrainingState | None, learner: Learner, group: Group) -> Progress:
    """How far the stored training is, which the learner goes on from; the same in every process of the group."""
    progress = state.load(learner) if state is not None else Progress()
    first = group.agree(learner.steps)
    if learner.steps != first:
        raise CheckpointError(
            f"process {group.rank} found a state of {learner.steps} steps, the first process one of {first:.0f}; give "
            "a folder that every machine sees"
        )
    return progress


@dataclass(eq=False)
class _Run:
    """One pass through the budget, with what happens beside the steps: reports, validations, stored states."""

    learner: Learner
    config: TrainConfig
    group: Group
    budget: Budget
    progress: Progress
    log: Log
    judge: Validation | None
    state: TrainingState | None
    should_stop: Callable[[], bool] | None

    def __post_init__(self) -> None:
        self._recent: list[Tensor] = []
        self._rate = 0.0
        self._told_at = self.learner.steps // LOG_EVERY * LOG_EVERY
        self._mean_loss: dict[str, float] = {}
        self._validated_at = -1
        self._stored_at = self.progress.seconds

    def go(self, stream: CropStream) -> None:
        """Steps until the budget is spent or something ends it; every process of the group ends at the same step."""
        learner = self.learner
        with _batches(stream, self.config, self.group, learner.steps) as batches:
            while True:
                spent = self.group.agree(1.0 if self._is_over() else self.budget.share(learner.steps))
                if learner.steps and spent >= 1:
                    break
                self._rate = learning_rate(learner.steps, spent, self.config)
                ramp = min(spent / self.config.pseudo_ramp, 1.0) if self.config.pseudo_ramp else 1.0
                self._recent.append(learner.step(next(batches), self._rate, ramp))
                self._pause(spent)
                if learner.steps % LOG_EVERY == 0 and self._told_at < learner.steps:
                    self._tell()
        self.budget.end()
        if self._told_at < learner.steps:
            self._tell()
        self._store()

    def take_best(self) -> None:
        """Puts the averaged weights of the best validation in place of the last, where `patience` asks for it."""
        if not self.config.patience:
            return
        average = self.learner.average.tensors
        if self.judge is not None and self.progress.best:
            if self._validated_at < self.learner.steps:
                self._validate(self.judge)
            for current, kept in zip(average, self.progress.best, strict=True):
                current.copy_(kept)
        self.group.share(average)

    def _is_over(self) -> bool:
        if self.learner.ended:
            return True
        if self.learner.steps and self.should_stop is not None and self.should_stop():
            return True
        return bool(self.config.patience) and self.progress.worse >= self.config.patience

    def _tell(self, **more: float) -> None:
        """Reports the steps since the last report."""
        self._read_losses()
        new = self.progress.losses[self._told_at :]
        if new:
            self._mean_loss = {"loss": math.fsum(new) / len(new)}
        self._told_at = self.learner.steps
        if self.group.is_first:
            spent = {"seconds": self.budget.seconds, "learning_rate": self._rate}
            left = {"seconds_left": self.budget.left(self.learner.steps)}
            self.log(self.learner.steps, {**self._mean_loss, **self.learner.figures(), **spent, **left, **more})

    def _read_losses(self) -> None:
        """Moves the losses of the last steps from the device to `progress`."""
        losses = [float(loss) for loss in torch.stack(self._recent).tolist()] if self._recent else []
        self._recent.clear()
        for step, loss in enumerate(losses, start=len(self.progress.losses) + 1):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss became {loss} in step {step}; lower train.learning_rate or set train.precision: fp32"
                )
        self.progress.losses += losses

    def _pause(self, spent: float) -> None:
        """Validates and stores when it is time; the clock of the budget stands still meanwhile."""
        due = int(spent * (self.config.validations + 1))
        if self.judge is not None and due > self.progress.validated:
            self.progress.validated = due
            with self.budget.paused():
                self._validate(self.judge)
        if self.budget.seconds - self._stored_at >= STORE_EVERY_S:
            with self.budget.paused():
                self._store()

    def _validate(self, judge: Validation) -> None:
        self._validated_at = self.learner.steps
        with self.learner.average.lent_to(self.learner.net):
            ap = judge.ap(self.learner.net)
        if ap > self.progress.best_ap:
            self.progress.best_ap, self.progress.worse = ap, 0
            self.progress.best = [tensor.clone() for tensor in self.learner.average.tensors]
        else:
            self.progress.worse += 1
        self._tell(validation_ap=ap)

    def _store(self) -> None:
        self._stored_at = self.budget.seconds
        if self.state is None:
            return
        self._read_losses()
        self.progress.seconds = self._stored_at
        self.state.save(self.learner, self.progress)


@contextmanager
def _batches(stream: CropStream, config: TrainConfig, group: Group, done: int) -> Iterator[Iterator[list[Batch]]]:
    """The batches of each step after the first `done`, made ahead by threads: one beside a CPU, several beside a GPU.

    Batch k of process r in step s is number (s * accumulate + k) * world + r of the stream.
    """
    workers = 1 if group.device.type == "cpu" else max(1, min(8, (os.cpu_count() or 2) // group.world - 1))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")

    def made(step: int) -> list[Batch]:
        numbers = (step * config.accumulate + k for k in range(config.accumulate))
        return [stream.batch(number * group.world + group.rank) for number in numbers]

    def ahead() -> Iterator[list[Batch]]:
        waiting = deque(pool.submit(made, done + i) for i in range(workers + 1))
        number = done + len(waiting)
        while True:
            waiting.append(pool.submit(made, number))
            number += 1
            yield waiting.popleft().result()

    try:
        yield ahead()
    finally:
        pool.shutdown(cancel_futures=True)
