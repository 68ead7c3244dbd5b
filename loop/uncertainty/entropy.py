"""Entropy of a yes-or-no probability: how unsure a model is about each pixel."""

import numpy as np

from loop.types import FloatArray

LN2 = float(np.log(2.0))


def binary_entropy(probs: FloatArray) -> FloatArray:
    """-p ln p - (1 - p) ln(1 - p) of every value, in nats.

    Args:
        probs: any shape, in [0, 1]; NaN stays NaN.

    Returns:
        Same shape, float32 in [0, ln 2]: 0 where p is 0 or 1, ln 2 where it is 0.5.
    """
    p = np.asarray(probs, dtype=np.float64)
    inside = (p > 0) & (p < 1) | np.isnan(p)
    safe = np.where(inside, p, 0.5)
    entropy = -safe * np.log(safe) - (1 - safe) * np.log1p(-safe)
    return np.where(inside, np.minimum(entropy, LN2), 0.0).astype(np.float32)
