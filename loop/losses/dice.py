"""Soft Dice loss on logits with a weight a pixel."""

from torch import Tensor


def soft_dice(logits: Tensor, target: Tensor, weight: Tensor, *, smooth: float = 1.0) -> Tensor:
    """1 - Dice of the probabilities and the target over all pixels of the batch together.

    Args:
        logits: (...) float, any shape.
        target: same shape, in [0, 1].
        weight: same shape, >= 0; 0 = the pixel does not count.
        smooth: added above and below, in pixels: it makes nothing predicted on an empty target cost 0.

    Returns:
        () float32 in [0, 1), with a gradient for `logits`. An empty target costs more the more is predicted on it.

    Source: Sudre et al. 2017, eq. 1 for two classes. Differs: over the batch, so that a crop without cells counts.
    """
    probs = logits.float().sigmoid()
    target = target.float()
    weight = weight.float()
    both = (probs * target * weight).sum()
    either = ((probs + target) * weight).sum()
    return 1 - (2 * both + smooth) / (either + smooth)
