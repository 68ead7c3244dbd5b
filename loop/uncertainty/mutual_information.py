"""Mutual information: how far several looks at the same pixels disagree, beyond what each is unsure of by itself."""

import numpy as np

from loop.errors import ShapeError
from loop.types import FloatArray
from loop.uncertainty.entropy import LN2, binary_entropy


def mutual_information(probs: FloatArray) -> FloatArray:
    """Entropy of the mean probability minus the mean of the entropies, in nats, for every pixel.

    Args:
        probs: (M, H, W) in [0, 1], the answers of M >= 1 looks; NaN stays NaN.

    Returns:
        (H, W) float32 in [0, ln 2]: 0 where all agree, be it on 0.5; ln 2 where half say 0 and half 1. Rounding makes
        no value negative.

    Raises:
        ShapeError: `probs` is not (M, H, W), or M is 0.

    Source: Houlsby et al. 2011 (BALD), eq. 2; with dropout passes as the looks Gal et al. 2017.
    """
    if probs.ndim != 3 or len(probs) == 0:
        raise ShapeError(f"probabilities of several looks are {probs.shape}; expected (M, H, W) with M of 1 or more")
    mean, each = np.zeros(probs.shape[1:]), np.zeros(probs.shape[1:])
    for look in probs:
        mean += look
        each += binary_entropy(look)
    shared = binary_entropy((mean / len(probs)).astype(np.float32))
    return np.clip(shared - each / len(probs), 0, LN2).astype(np.float32)
