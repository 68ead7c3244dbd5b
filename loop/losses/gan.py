"""What generator and discriminator are punished for: adversarial losses on logits, R1 penalty, L1 on planes."""

import torch
from torch import Tensor
from torch.nn import functional


def discriminator_loss(real: Tensor, fake: Tensor, *, smooth: float = 0.0) -> Tensor:
    """Half the sum of the cross-entropies of real patches against 1 - `smooth` and of made ones against 0.

    Args:
        real: (...) float logits of a person's planes.
        fake: (...) float logits of made planes.
        smooth: in [0, 0.5), one-sided label smoothing; made patches are never smoothed.

    Returns:
        () float32, >= `lowest_discriminator_loss(smooth)`, with a gradient; ln 2 where it can only guess and `smooth`
        is 0.

    Source: Isola et al. 2017, eq. 1, halved as in section 3.3; Salimans et al. 2016, section 3.4 (smoothing).
    """
    return 0.5 * (_toss(real, 1 - smooth) + _toss(fake, 0.0))


def lowest_discriminator_loss(smooth: float) -> float:
    """The `discriminator_loss` of a discriminator that never errs: half the entropy of the smoothed label."""
    label = torch.tensor(1 - smooth, dtype=torch.float64)
    return float(0.5 * (torch.special.entr(label) + torch.special.entr(1 - label)))


def generator_loss(fake: Tensor) -> Tensor:
    """The cross-entropy of made patches against 1: () float32 >= 0, with a gradient.

    Args:
        fake: (...) float logits.

    Source: Isola et al. 2017, section 3.3 (maximise log D rather than minimise log(1 - D)).
    """
    return _toss(fake, 1.0)


def gradient_penalty(scores: Tensor, inputs: Tensor) -> Tensor:
    """Half the squared norm of the gradient of the summed scores, for each score: the mean over all crops (R1).

    Args:
        scores: (B, ...) float logits of a person's planes, P of each crop.
        inputs: (B, ...) float, what they were computed from; requires a gradient.

    Returns:
        () float32 >= 0, with a gradient for the discriminator's weights.

    Source: Mescheder et al. 2018, eq. 9. Differs: without the factor gamma; the squared norm is divided by P, so that
    the penalty neither grows nor fades with the size of the crops.
    """
    (gradient,) = torch.autograd.grad(scores.float().sum(), inputs, create_graph=True)
    return 0.5 * gradient.float().square().sum() / scores.numel()


def weighted_l1(planes: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the absolute error; 0 where the weights sum to 0.

    Args:
        planes: (B, K, H, W) float in [0, 1].
        target: same shape, in [0, 1].
        weight: (B, K, H, W) or what broadcasts to it, >= 0; 0 = the pixel does not count.

    Returns:
        () float32 >= 0, with a gradient for `planes`.

    Source: Isola et al. 2017, eq. 3. Differs: a weight a pixel, and the mean is over the weight.
    """
    weight = weight.float().expand_as(planes)
    error = (planes.float() - target.float()).abs()
    return (error * weight).sum() / torch.clamp(weight.sum(), min=1e-6)


def _toss(logits: Tensor, label: float) -> Tensor:
    logits = logits.float()
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
