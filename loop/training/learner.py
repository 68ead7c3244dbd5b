"""A network that learns: its weights, optimiser and averaged weights, and one optimiser step at a time."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import Batch
from loop.errors import ConfigError
from loop.losses.consistency import consistency_loss
from loop.models import new_net
from loop.models.runtime import autocast
from loop.models.sparse_seu_net import SparseOutput
from loop.training.criterion import Taught, criterion, lesson_of, taught
from loop.training.distributed import Group
from loop.training.ema import AveragedWeights
from loop.types import FloatArray

logger = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 5.0


class Learner:
    """A fresh network with AdamW and an average of its weights.

    Attributes:
        lesson: what crops must hold for the network.
        net: on the group's device, in training mode; never compiled itself, so that it predicts images of any size.
        average: of its weights.
        steps: optimiser steps so far.
        ended: why this learner can learn no more; "" while it can.

    Raises:
        ConfigError: the network is unknown, or the crop's side does not suit it.
    """

    def __init__(self, model: ModelConfig, config: TrainConfig, group: Group) -> None:
        net = new_net(model, config.seed)
        stride = int(getattr(net, "stride", 1))
        if config.crop % stride:
            fitting = config.crop + -config.crop % stride
            raise ConfigError(f"train.crop={config.crop} is not a multiple of the network's {stride}; use {fitting}")
        self.lesson = lesson_of(net)
        self.net = net.to(device=group.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.average = AveragedWeights(self.net, config.ema)
        self.steps = 0
        self.ended = ""
        self._config = config
        self._group = group
        self._drops = model.dropout > 0
        self._most = config.batch
        self._optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._eager: nn.Module = self.net if group.world == 1 else DistributedDataParallel(self.net)
        compiles = config.compile == "on" or (config.compile == "auto" and group.device.type == "cuda")
        self._call: Callable[[Tensor], Any] = torch.compile(self._eager) if compiles else self._eager
        self._proven = not compiles
        self._ramp = 1.0

    def step(self, batches: list[Batch], rate: float, ramp: float = 1.0) -> Tensor:
        """One optimiser step on the mean gradient of some batches of all processes; their mean loss, () on the device.

        A batch that does not fit into the GPU's memory is taken in pieces from then on, halved until they fit; the
        pieces' gradients are summed. Dice, means over the pixels' weights, and a sparse net's count of cells, are then
        of the piece, no longer of the batch; all else is taught as before.

        Args:
            batches: at least one.
            rate: the learning rate.
            ramp: in [0, 1], how much crops of pseudo-labelled images count beside those that people labelled.

        Raises:
            ConfigError: one crop alone does not fit, or the network was to be compiled and cannot be.
        """
        self._ramp = ramp
        for options in self._optimiser.param_groups:
            options["lr"] = rate
        with self._drawn(self.steps + 1) if self._drops else nullcontext():
            loss = self._gradients(batches)
            while loss is None:
                if self._group.device.type == "cuda":
                    torch.cuda.empty_cache()
                loss = self._gradients(batches)
        self._proven = True
        nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRADIENT_NORM)
        self._optimiser.step()
        self.steps += 1
        self.average.update(self.net, self.steps)
        return self._group.mean(loss)

    def finish(self) -> nn.Module:
        """The net with its averaged weights, in evaluation mode."""
        self.average.copy_to(self.net)
        net: nn.Module = self.net.eval()
        return net

    def figures(self) -> dict[str, float]:
        """What this kind of learner says beside the loss, each a mean since it was last asked; nothing here."""
        return {}

    def _gradients(self, batches: list[Batch]) -> Tensor | None:
        """Leaves the mean gradient in the parameters; the mean loss, or None where another try may succeed."""
        self._optimiser.zero_grad(set_to_none=True)
        try:
            return self._accumulate(batches)
        except torch.OutOfMemoryError as error:
            self._halve(error)
        except RuntimeError as error:
            self._stop_compiling(error)
        self._optimiser.zero_grad(set_to_none=True)
        return None

    def _accumulate(self, batches: list[Batch]) -> Tensor:
        pieces = [
            (batch.part(start, start + self._most), len(batch.image) * len(batches))
            for batch in batches
            for start in range(0, len(batch.image), self._most)
        ]
        total = torch.zeros((), device=self._group.device)
        for number, (piece, of) in enumerate(pieces, start=1):
            with self._alone(number < len(pieces)):
                total += self._learn(piece, len(piece.image) / of)
        return total

    def _learn(self, piece: Batch, share: float) -> Tensor:
        """Adds the gradients of a piece, of which `share` of a step's crops are; so much of its loss."""
        loss = self._loss(piece) * share
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _alone(self, alone: bool) -> AbstractContextManager[None]:
        """Keeps the gradients to this process; the last backward pass of a step sends their sum to the others."""
        if alone and isinstance(self._eager, DistributedDataParallel):
            return self._eager.no_sync()
        return nullcontext()

    def _loss(self, batch: Batch) -> Tensor:
        device = self._group.device
        image = torch.from_numpy(batch.image).to(device, non_blocking=True)
        with autocast(device, self._config.precision):
            output = self._call(image.contiguous(memory_format=torch.channels_last))
        truth, share = ramped(taught(batch, device), batch, self._ramp)
        loss = share * criterion(output, truth, self.lesson.heads, self._config)
        dense = output.dense if isinstance(output, SparseOutput) else output
        if batch.weak is None or batch.pseudo is None or not batch.pseudo.any() or dense is None:
            return loss
        pseudo = torch.from_numpy(batch.pseudo).to(device)
        agreement = consistency_loss(dense[pseudo], self._averaged(batch.weak[batch.pseudo]))
        return loss + self._config.consistency * self._ramp * agreement

    @torch.no_grad()
    def _averaged(self, images: FloatArray) -> Tensor:
        """The probabilities that the averaged weights give for some crops: (B, K, S, S) float32."""
        image = torch.from_numpy(images).to(self._group.device).contiguous(memory_format=torch.channels_last)
        names = [name for name, _ in self.net.named_parameters()]
        weights = dict(zip(names, self.average.tensors, strict=True))
        with autocast(self._group.device, self._config.precision):
            output = functional_call(self.net, weights, (image,))
        logits: Tensor = output.dense if hasattr(output, "dense") else output
        return torch.sigmoid(logits.float())

    @contextmanager
    def _drawn(self, number: int) -> Iterator[None]:
        """Torch's global generators start from the seed and `number`, and are afterwards as they were before."""
        device = self._group.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._config.seed * 1_000_003 + number)
            yield

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self._group.world > 1:
            raise ConfigError(
                f"{self._most} crops of {self._config.crop} px do not fit into one of the {self._group.world} GPUs; "
                f"set train.batch: {max(self._most // 2, 1)} and train.accumulate: {2 * self._config.accumulate}"
            ) from error
        if self._most == 1:
            raise ConfigError(
                f"one crop of {self._config.crop} px does not fit into the GPU's memory; lower train.crop or "
                "model.base, free the GPU, or set train.device: cpu"
            ) from error
        logger.warning("the GPU's memory is full with %d crops a batch: halved to %d", self._most, self._most // 2)
        self._most //= 2

    def _stop_compiling(self, error: RuntimeError) -> None:
        """Goes on uncompiled where a compiler is missing or fails; any other error is raised again."""
        if self._proven:
            raise error
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        if self._config.compile == "on":
            raise ConfigError(
                f"the network cannot be compiled here ({reason}); install a C++ compiler, or set train.compile: off"
            ) from error
        logger.warning("the network cannot be compiled here (%s): it is trained uncompiled", reason)
        self._call, self._proven = self._eager, True

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a training goes on from, but for `steps`: weights, averages and the optimiser's moments."""
        found = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        found |= {f"average.{i}": tensor for i, tensor in enumerate(self.average.tensors)}
        found |= moments_of(self._optimiser, self.net, "adam")
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Goes on from what `tensors` gave after `steps` steps.

        Raises:
            KeyError, RuntimeError: a tensor is missing or of another shape; the learner is then of no more use.
        """
        weights = {name.removeprefix("net."): t for name, t in tensors.items() if name.startswith("net.")}
        self.net.load_state_dict(weights)
        for i, average in enumerate(self.average.tensors):
            average.copy_(tensors[f"average.{i}"])
        put_moments(self._optimiser, self.net, tensors, "adam")
        self.steps = steps


def moments_of(optimiser: torch.optim.Optimizer, net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What an optimiser remembers of a net's parameters, named PREFIX.i.NAME for the i-th."""
    found: dict[str, Tensor] = {}
    for i, parameter in enumerate(net.parameters()):
        moments: Mapping[str, Any] = optimiser.state.get(parameter, {})
        found |= {f"{prefix}.{i}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return found


@torch.no_grad()
def put_moments(optimiser: torch.optim.Optimizer, net: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Gives an optimiser back what `moments_of` found, copied to where the parameters are."""
    for i, parameter in enumerate(net.parameters()):
        own = f"{prefix}.{i}."
        moments = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
        if moments:
            optimiser.state[parameter] = {
                name: tensor.clone() if name == "step" else torch.empty_like(parameter).copy_(tensor)
                for name, tensor in moments.items()
            }


def ramped(truth: Taught, batch: Batch, ramp: float) -> tuple[Taught, float]:
    """What is taught, the pseudo-labelled crops counting `ramp` times as much, and a factor for the loss.

    Losses are means over the weights, in which a factor that all crops have cancels: where all are pseudo-labelled the
    weights stay and the loss is multiplied by `ramp`; else by 1.
    """
    if batch.pseudo is None or ramp == 1:
        return truth, 1.0
    if batch.pseudo.all():
        return truth, ramp
    factors = torch.from_numpy(batch.pseudo).to(truth.weight.device) * (ramp - 1.0) + 1.0
    weights = [own * factor for own, factor in zip(truth.mask_weights, factors, strict=False)]
    return truth._replace(weight=truth.weight * factors[:, None, None, None], mask_weights=weights), 1.0
