"""Averaged weights: steadier than the last ones, above all after a short training."""

import torch
from torch import nn


class AveragedWeights:
    """An exponential moving average of a net's parameters, kept beside it.

    At step s the decay is min(decay, (1 + s) / (10 + s)), so that the first, random weights are soon forgotten.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._decay = decay
        self._average = [p.detach().clone() for p in net.parameters()]

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
