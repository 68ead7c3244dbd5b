"""The loss of an overlap head under an overlap probability map: two ways of using the map."""

from typing import Literal

import torch
from torch import Tensor

from loop.errors import ConfigError, ShapeError
from loop.losses.focal import binary_focal

TARGET_SHARE = 0.25
"""How much of the probability is taken off the target: y' = y (1 - TARGET_SHARE * P), so y' >= 0.75 on an overlap."""


def overlap_loss(
    logits: Tensor,
    target: Tensor,
    probability: Tensor | None,
    weight: Tensor,
    *,
    use: Literal["target", "loss"],
    alpha: float,
    gamma: float,
) -> Tensor:
    """Focal loss of the predicted overlaps, guided by where cells are near each other.

    "target" softens the target: y' = y (1 - 0.25 P), then the weighted mean of the focal loss (eq. 4.5). It acts on
    annotated overlaps only: a pixel without one has y' = 0 whatever P is.
    "loss" weighs the pixels: sum(w P L) / sum(w), where L is the focal loss (eq. 5.1). It acts on all pixels: little is
    taught where P is small.

    Args:
        logits: (B, H, W) float.
        target: (B, H, W) in [0, 1], 1 where two cells or more lie.
        probability: (B, H, W) in [0, 1], a map of loop/data/overlap_maps.py; None = plain focal loss, whatever `use`.
        weight: (B, H, W) >= 0; 0 = the pixel does not count.
        use: how the map is used, see above.
        alpha: in [0, 1], weight of the overlaps; 1 - alpha is that of the rest.
        gamma: >= 0, how much less a pixel counts that is nearly right.

    Returns:
        () float32 >= 0, with a gradient for `logits`; 0 where the weights sum to 0.

    Raises:
        ConfigError, ShapeError: another use; tensors of different shapes.

    Source: Prytula 2023, eq. 4.5 and 5.1. Differs: eq. 4.5 has y' = y (1 - P). The maps are near 1 exactly on the
    annotated overlaps (v2, v3 and v4 are 1 there), so the target would vanish and the head would learn to predict
    nothing. A quarter of P is taken instead: with alpha 0.25 the focal loss of a target y' is smallest at a
    probability of 0.5 when y' = 0.75, so no overlap is taught below one half. In eq. 5.1 the mean is over the weight.
    """
    shapes = [tuple(tensor.shape) for tensor in (logits, target, probability, weight) if tensor is not None]
    if len(set(shapes)) > 1:
        raise ShapeError(f"logits, target, probability and weight are {shapes}; expected (B, H, W), the same for all")
    if use not in ("target", "loss"):
        raise ConfigError(f"overlap_use={use!r}; expected target (eq. 4.5) or loss (eq. 5.1)")
    if probability is None:
        return binary_focal(logits, target, weight, alpha=alpha, gamma=gamma)
    if use == "target":
        softened = target * (1 - TARGET_SHARE * probability)
        return binary_focal(logits, softened, weight, alpha=alpha, gamma=gamma)
    # binary_focal divides by the weights it is given; eq. 5.1 divides by the number of pixels, not by the sum of P.
    guided = weight * probability
    mean = binary_focal(logits, target, guided, alpha=alpha, gamma=gamma)
    return mean * guided.sum() / torch.clamp(weight.sum(), min=1e-6)
