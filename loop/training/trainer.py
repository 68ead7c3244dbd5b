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
from loop.errors import NonFiniteError
from loop.models.runtime import resolve_device
from loop.training.distributed import Group, process_group
from loop.training.learner import Learner
from loop.training.state import Progress, TrainingState
from loop.training.validation import Validation
from loop.types import Sample

logger = logging.getLogger(__name__)

LOG_EVERY = 10
STORE_EVERY_S = 30.0

Log = Callable[[int, dict[str, float]], None]
Clock = Callable[[], float]


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
    state_dir: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
    clock: Clock = time.perf_counter,
) -> Trained:
    """A segmenter trained from scratch until the budget of minutes, or of steps, is spent.

    AdamW; the learning rate rises over the first steps and then falls along a cosine to 0 at the end of the budget.
    With `max_steps` the same samples, settings and machine give the same weights. No global seed is touched. Under
    `torchrun` the processes train one model together on different crops, and each returns the same weights.

    Args:
        samples: at least one labelled image; images without cells teach background.
        model: which network.
        config: budget, crops, optimiser and augmentation. A batch that does not fit into the GPU's memory is taken in
            pieces, with a warning in the log.
        log: called every ten steps and after the last with the step and {"loss": mean since the last call, "seconds":
            of the budget that are spent, "learning_rate": of this step, "seconds_left": expected}; after a validation
            with {"validation_ap"} too.
        instances: thresholds; the defaults otherwise. A sparse network's `tile` becomes the side of the crops.
        validation: images that the thresholds are fitted on, and that can end the training early (`patience`); the
            weights of the best validation are then kept. They are not learnt from and must not be what the model is
            judged by later.
        state_dir: kept up to date, so that a killed training of the same images and settings goes on from there; with
            `max_steps` it gives the weights that it would have given. The caller deletes it once those are stored.
        should_stop: asked before each step; True ends the training early, with what was learnt so far.
        clock: seconds of the budget; validating and storing do not count.

    Raises:
        InputError: no samples.
        ConfigError: the network or the device is unknown, the crop's side does not suit the network, or one crop does
            not fit into the GPU's memory.
        ImageError, LabelError, ShapeError: an image or its labels cannot be used.
        NonFiniteError: the loss became NaN or infinite.
        CheckpointError: `state_dir` holds another training, or cannot be written.
    """
    with process_group(resolve_device(config.device)) as group:
        learner = Learner(model, config, group)
        stream = CropStream(samples, model, config, learner.lesson)
        sparse = learner.lesson.most_cells is not None
        thresholds = instances or InstanceConfig()
        if sparse:
            thresholds = thresholds.model_copy(update={"tile": config.crop})
        judge = Validation(validation, model, config, thresholds) if validation and group.is_first else None
        state = TrainingState(state_dir, samples, model, config) if state_dir is not None else None
        run = _Run(learner, config, group, log, judge, state, clock, should_stop)
        run.go(stream)
        net = run.finish()
        figures = None
        if judge is not None:
            thresholds, figures = judge.fit(net)
    return Trained(net, learner.steps, run.seconds, run.losses, thresholds, figures)


def learning_rate(step: int, progress: float, config: TrainConfig) -> float:
    """The rate of step `step` (0 = the first), `progress` in [0, 1] of the budget being spent."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class _Run:
    """One pass through the budget, with what happens beside the steps: progress, validations, stored states."""

    def __init__(
        self,
        learner: Learner,
        config: TrainConfig,
        group: Group,
        log: Log,
        judge: Validation | None,
        state: TrainingState | None,
        clock: Clock,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self._learner, self._config, self._group = learner, config, group
        self._log, self._judge, self._state = log, judge, state
        self._clock, self._should_stop = clock, should_stop
        self._progress = state.load(learner) if state is not None else Progress()
        self._losses: list[Tensor] = [torch.tensor(loss) for loss in self._progress.losses]
        self._logged = len(self._losses)
        self._last: dict[str, float] = {}
        self._started = clock() - self._progress.seconds
        self._stored_at = self._progress.seconds
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """Of the budget that are spent."""
        return self._clock() - self._started if self._ended is None else self._ended

    @property
    def losses(self) -> tuple[float, ...]:
        """One a step."""
        return tuple(torch.stack(self._losses).tolist())

    def go(self, stream: CropStream) -> None:
        """Steps until the budget is spent or something ends it; every process of the group ends at the same step."""
        config, group = self._config, self._group
        rate = 0.0
        with _batches(stream, config, group, len(self._losses)) as batches:
            while True:
                step = len(self._losses)
                seconds = self.seconds
                progress = step / config.max_steps if config.max_steps else seconds / (60 * config.minutes)
                progress = group.agree(1.0 if step and self._is_over(progress) else progress)
                if step and progress >= 1:
                    break
                rate = learning_rate(step, progress, config)
                loss = self._learner.step(next(batches), rate)
                self._losses.append(loss.cpu() if group.device.type == "cpu" else loss)
                if len(self._losses) - self._logged == LOG_EVERY:
                    self._tell(rate, progress)
                self._pause(rate, progress)
        self._ended = self._clock() - self._started
        if self._logged < len(self._losses):
            self._tell(rate, 1.0)

    def finish(self) -> nn.Module:
        """The net with the averaged weights of the end, or of the best validation where `patience` asks for it."""
        if self._progress.best and self._config.patience:
            for average, kept in zip(self._learner.average.tensors, self._progress.best, strict=True):
                average.copy_(kept)
        return self._learner.finish()

    def _is_over(self, progress: float) -> bool:
        if progress >= 1 or (self._should_stop is not None and self._should_stop()):
            return True
        return bool(self._config.patience) and self._progress.worse >= self._config.patience

    def _tell(self, rate: float, progress: float) -> None:
        """Reports the steps since the last report."""
        mean = float(torch.stack(self._losses[self._logged :]).float().mean())
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the loss became {mean} within step {len(self._losses)}; lower train.learning_rate or set "
                "train.precision: fp32"
            )
        self._logged = len(self._losses)
        seconds = self.seconds
        left = seconds / progress - seconds if progress > 0 else 60 * self._config.minutes
        self._last = {"loss": mean, "seconds": seconds, "learning_rate": rate, "seconds_left": max(left, 0.0)}
        if self._group.is_first:
            self._log(self._logged, self._last)

    def _pause(self, rate: float, progress: float) -> None:
        """Validates and stores when it is time; the clock of the budget stands still meanwhile."""
        started = self._clock()
        due = int(progress * (self._config.validations + 1))
        if self._judge is not None and due > self._progress.validated:
            self._progress.validated = due
            if self._logged < len(self._losses):
                self._tell(rate, progress)
            self._validate(self._judge)
        seconds = started - self._started
        if self._state is not None and self._group.is_first and seconds - self._stored_at >= STORE_EVERY_S:
            self._stored_at = seconds
            self._progress.losses, self._progress.seconds = self.losses, seconds
            self._state.save(self._learner, self._progress)
        self._started += self._clock() - started

    def _validate(self, judge: Validation) -> None:
        with self._learner.average.lent_to(self._learner.net):
            ap = judge.ap(self._learner.net)
        if ap > self._progress.best_ap:
            self._progress.best_ap, self._progress.worse = ap, 0
            self._progress.best = [tensor.clone() for tensor in self._learner.average.tensors]
        else:
            self._progress.worse += 1
        self._log(len(self._losses), {**self._last, "validation_ap": ap})


@contextmanager
def _batches(stream: CropStream, config: TrainConfig, group: Group, done: int) -> Iterator[Iterator[list[Batch]]]:
    """The batches of each step after the first `done`, made ahead by threads: one beside a CPU, several beside a GPU.

    Batch k of process r in step s is number (s * accumulate + k) * world + r of the stream.
    """
    workers = 1 if group.device.type == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))
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
