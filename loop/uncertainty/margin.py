"""Margin of a yes-or-no probability: how close its two answers are."""

import numpy as np

from loop.types import FloatArray


def binary_margin(probs: FloatArray) -> FloatArray:
    """1 - |2 p - 1| of every value: one minus the difference between the probabilities of yes and no.

    Args:
        probs: any shape, in [0, 1]; NaN stays NaN.

    Returns:
        Same shape, float32 in [0, 1]: 0 where p is 0 or 1, 1 where it is 0.5.
    """
    p = np.asarray(probs, dtype=np.float32)
    margin: FloatArray = 1 - np.abs(2 * p - 1)
    return margin
