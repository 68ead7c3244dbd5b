"""Binary cross-entropy on logits with a weight a pixel."""

import torch
from torch import Tensor
from torch.nn import functional


def weighted_bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the binary cross-entropy over all pixels; 0 where the weights sum to 0.

    Args:
        logits: (...) float, any shape.
        target: same shape, in [0, 1].
        weight: same shape, >= 0; 0 = the pixel does not count.

    Returns:
        () float32, >= 0, with a gradient for `logits`.

    Source: Prytula 2023, eq. 4.1. Differs: a weight a pixel, and the mean is over the weight.
    """
    loss = functional.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    weight = weight.float()
    return (loss * weight).sum() / torch.clamp(weight.sum(), min=1e-6)
