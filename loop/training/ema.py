"""Averaged weights: steadier than the last ones, above all after a short training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """An exponential moving average of a net's parameters, kept beside it.

    At step s the decay is min(decay, (1 + s) / (10 + s)), so that the first, random weights are soon forgotten.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._decay = decay
        self._average = [p.detach().clone() for p in net.parameters()]

    @property
    def tensors(self) -> list[Tensor]:
        """The averages, in the order of the net's parameters; may be written to."""
        return self._average

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Takes in the net's parameters after optimiser step `step` (1 = the first)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        current = [p.detach() for p in net.parameters()]
        torch._foreach_lerp_(self._average, current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Overwrites the net's parameters with the averaged ones."""
        for parameter, average in zip(net.parameters(), self._average, strict=True):
            parameter.copy_(average)

    @contextmanager
    def lent_to(self, net: nn.Module) -> Iterator[None]:
        """The net has the averaged weights and is in evaluation mode until the end, then its own again."""
        own = [p.detach().clone() for p in net.parameters()]
        training = net.training
        self.copy_to(net)
        net.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(net.parameters(), own, strict=True):
                    parameter.copy_(before)
            net.train(training)
