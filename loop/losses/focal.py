"""Focal loss on logits: what is already right counts little."""

import torch
from torch import Tensor
from torch.nn import functional


def focal_terms(logits: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-alpha (1 - p)^gamma y log p - (1 - alpha) p^gamma (1 - y) log(1 - p), one value an element.

    Args:
        logits: (...) float, any shape; p is their sigmoid.
        target: same shape, y in [0, 1], soft values allowed.
        alpha: in [0, 1], share of the positive side.
        gamma: >= 0; 0 makes it a cross-entropy weighted by alpha and 1 - alpha.

    Returns:
        (...) float32, >= 0, with a gradient for `logits`; no logarithm of 0 is taken.

    Source: Prytula 2023, eq. 4.17 (Lin et al. 2017, eq. 5), written out for both sides and soft targets as in eq. 4.5.
    """
    logits, target = logits.float(), target.float()
    probs = logits.sigmoid()
    positive = alpha * (1 - probs) ** gamma * target * functional.softplus(-logits)
    negative = (1 - alpha) * probs**gamma * (1 - target) * functional.softplus(logits)
    return positive + negative


def binary_focal(logits: Tensor, target: Tensor, weight: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Weighted mean of `focal_terms` over all elements; 0 where the weights sum to 0.

    Args:
        logits: (...) float, any shape.
        target: same shape, in [0, 1].
        weight: same shape, >= 0; 0 = the element does not count.
        alpha: as in `focal_terms`.
        gamma: as in `focal_terms`.

    Returns:
        () float32, >= 0, with a gradient for `logits`.
    """
    weight = weight.float()
    terms = focal_terms(logits, target, alpha=alpha, gamma=gamma)
    return (terms * weight).sum() / torch.clamp(weight.sum(), min=1e-6)
