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

import torch
from torch import Tensor, nn

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import Batch, CropStream
from loop.errors import ConfigError, NonFiniteError
from loop.losses.bce import weighted_bce
from loop.losses.dice import soft_dice
from loop.models import SEGMENTERS
from loop.models.blocks import initialise
from loop.models.segmenter import autocast, resolve_device
from loop.training.ema import AveragedWeights
from loop.types import Sample

logger = logging.getLogger(__name__)

LOG_EVERY = 10
MAX_GRADIENT_NORM = 5.0


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gave: the net with averaged weights in evaluation mode, and the loss of each optimiser step."""

    net: nn.Module
    steps: int
    seconds: float
    losses: tuple[float, ...]


def train(
    samples: Sequence[Sample],
    model: ModelConfig,
    config: TrainConfig,
    *,
    log: Callable[[int, dict[str, float]], None],
    should_stop: Callable[[], bool] | None = None,
) -> Trained:
    """A segmenter trained from scratch until the budget of minutes, or of steps, is spent.

    AdamW; the learning rate rises over the first steps and then falls along a cosine to 0 at the end of the budget.
    With `max_steps` the same samples, settings and machine give the same weights. No global seed is touched.

    Args:
        samples: at least one labelled image; images without cells teach background.
        model: which network.
        config: budget, crops, optimiser and augmentation. A batch that does not fit into the GPU's memory is halved,
            with a warning in the log.
        log: called every ten steps and after the last with the step and {"loss": mean since the last call,
            "seconds": since the start of the first step, "learning_rate": of this step}.
        should_stop: asked before each step; True ends the training early, with what was learnt so far.

    Raises:
        InputError: no samples.
        ConfigError: the network or the device is unknown, the crop's side does not suit the network, or one crop does
            not fit into the GPU's memory.
        ImageError, LabelError, ShapeError: an image or its labels cannot be used.
        NonFiniteError: the loss became NaN or infinite.
    """
    if model.name not in SEGMENTERS:
        raise ConfigError(f"model.name={model.name!r} is unknown; choose from {', '.join(sorted(SEGMENTERS))}")
    device = resolve_device(config.device)
    stream = CropStream(samples, model, config)
    learner = _Learner(model, config, device)
    losses: list[Tensor] = []
    started = time.perf_counter()
    logged = 0
    with _batches(stream, device) as batches:
        while True:
            step = len(losses)
            seconds = time.perf_counter() - started
            progress = step / config.max_steps if config.max_steps else seconds / (60 * config.minutes)
            if step and (progress >= 1 or (should_stop is not None and should_stop())):
                break
            rate = learning_rate(step, progress, config)
            losses.append(learner.step(next(batches), rate))
            if len(losses) - logged == LOG_EVERY:
                logged = _log(log, losses, logged, started, rate)
    if logged < len(losses):
        _log(log, losses, logged, started, rate)
    return Trained(learner.finish(), len(losses), time.perf_counter() - started, tuple(torch.stack(losses).tolist()))


def learning_rate(step: int, progress: float, config: TrainConfig) -> float:
    """The rate of step `step` (0 = the first), `progress` in [0, 1] of the budget being spent."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def criterion(logits: Tensor, target: Tensor, weight: Tensor, config: TrainConfig) -> Tensor:
    """Cross-entropy plus Dice of the interior, and `border_weight` times that of the border.

    Args:
        logits: (B, 2, H, W), interior and border.
        target: (B, 2, H, W) in {0, 1}.
        weight: (B, 1, H, W) >= 0.
        config: `border_weight`.

    Source: Prytula 2023, eq. 4.2 with two heads. Differs: Dice added, without which a short training splits worse.
    """
    total = torch.zeros((), device=logits.device)
    for channel, factor in enumerate((1.0, config.border_weight)):
        head, truth, counts = logits[:, channel], target[:, channel], weight[:, 0]
        total = total + factor * (weighted_bce(head, truth, counts) + soft_dice(head, truth, counts))
    return total


class _Learner:
    """A net with its optimiser and its averaged weights."""

    def __init__(self, model: ModelConfig, config: TrainConfig, device: torch.device) -> None:
        net = SEGMENTERS[model.name](model)
        stride = int(getattr(net, "stride", 1))
        if config.crop % stride:
            fitting = config.crop + -config.crop % stride
            raise ConfigError(f"train.crop={config.crop} is not a multiple of the network's {stride}; use {fitting}")
        initialise(net, torch.Generator().manual_seed(config.seed))
        self._net = net.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._average = AveragedWeights(self._net, config.ema)
        self._optimiser = torch.optim.AdamW(
            self._net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._config = config
        self._device = device
        self._most = config.batch
        self._steps = 0

    def step(self, batch: Batch, rate: float) -> Tensor:
        """One optimiser step; the loss, () on the device. Halves the batch until it fits into the GPU's memory."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        while True:
            try:
                loss = self._step(Batch(*(array[: self._most] for array in batch)))
                break
            except torch.OutOfMemoryError as error:
                self._halve(error)
        self._steps += 1
        self._average.update(self._net, self._steps)
        return loss

    def finish(self) -> nn.Module:
        """The net with its averaged weights, in evaluation mode."""
        self._average.copy_to(self._net)
        net: nn.Module = self._net.eval()
        return net

    def _step(self, batch: Batch) -> Tensor:
        image, target, weight = (torch.from_numpy(array).to(self._device, non_blocking=True) for array in batch)
        with autocast(self._device, self._config.precision):
            logits = self._net(image.contiguous(memory_format=torch.channels_last))
        loss = criterion(logits, target, weight, self._config)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._net.parameters(), MAX_GRADIENT_NORM)
        self._optimiser.step()
        return loss.detach()

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self._most == 1:
            raise ConfigError(
                f"one crop of {self._config.crop} px does not fit into the GPU's memory; lower train.crop or "
                "model.base, free the GPU, or set train.device: cpu"
            ) from error
        self._optimiser.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        logger.warning("the GPU's memory is full with %d crops a batch: halved to %d", self._most, self._most // 2)
        self._most //= 2


@contextmanager
def _batches(stream: CropStream, device: torch.device) -> Iterator[Iterator[Batch]]:
    """The stream's batches in order, made ahead by threads: one beside a CPU's own work, several beside a GPU."""
    workers = 1 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")

    def ahead() -> Iterator[Batch]:
        waiting = deque(pool.submit(stream.batch, i) for i in range(workers + 1))
        number = len(waiting)
        while True:
            waiting.append(pool.submit(stream.batch, number))
            number += 1
            yield waiting.popleft().result()

    try:
        yield ahead()
    finally:
        pool.shutdown(cancel_futures=True)


def _log(
    log: Callable[[int, dict[str, float]], None], losses: Sequence[Tensor], logged: int, started: float, rate: float
) -> int:
    """Reports the steps since `logged` and says how many are reported now."""
    mean = float(torch.stack(list(losses[logged:])).mean())
    if not math.isfinite(mean):
        raise NonFiniteError(
            f"the loss became {mean} within step {len(losses)}; lower train.learning_rate or set train.precision: fp32"
        )
    log(len(losses), {"loss": mean, "seconds": time.perf_counter() - started, "learning_rate": rate})
    return len(losses)
