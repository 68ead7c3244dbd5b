"""Agreement with a steadier network on the same, less changed, crops."""

import torch
from torch import Tensor
from torch.nn import functional


def consistency_loss(logits: Tensor, teacher: Tensor, *, sure: float = 0.3) -> Tensor:
    """How far the student's probabilities are from the teacher's where the teacher is sure; () float32 >= 0.

    The mean over such pixels of the Kullback-Leibler divergence of two coin tosses, which is 0 where both agree.

    Args:
        logits: (...) float, the student's raw logits, any shape, of strongly changed crops.
        teacher: same shape, the averaged weights' probabilities in [0, 1] on the same crops less changed; no gradient
            goes into them.
        sure: in [0, 0.5]: pixels count whose teacher's probability is at least so far from one half.

    Returns:
        0, with a gradient of 0, where the teacher is nowhere sure or there is no pixel.

    Source: Tarvainen & Valpola 2017 (mean teacher); the threshold as in FixMatch (Sohn et al. 2020), eq. 4. Differs:
    the divergence instead of the squared distance of probabilities, a pixel instead of an image.
    """
    soft = teacher.detach().float().clamp(1e-4, 1 - 1e-4)
    cross = functional.binary_cross_entropy_with_logits(logits.float(), soft, reduction="none")
    entropy = functional.binary_cross_entropy(soft, soft, reduction="none")
    counts = ((soft - 0.5).abs() >= sure).float()
    return ((cross - entropy) * counts).sum() / torch.clamp(counts.sum(), min=1.0)
