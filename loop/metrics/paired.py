"""Is the challenger better than the champion on the same images, and how sure is that."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array

_CHUNK = 4_000_000


class Interval(NamedTuple):
    """A mean with its two-sided bootstrap interval, in the unit of the scores; low <= high."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    challenger: npt.ArrayLike,
    champion: npt.ArrayLike,
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """Mean of challenger - champion over the images, with its paired bootstrap interval.

    The images are drawn again with replacement, N of N, `resamples` times; each draw gives one mean difference; the
    interval runs from the (1 - confidence) / 2 to the (1 + confidence) / 2 quantile of those means. Pairing removes
    what both models find hard. With few images the interval is too narrow: at confidence 0.8 it holds the true
    difference of normal data in about 61 % of cases for N = 3, 69 % for N = 5 and 78 % for N = 30. With one
    image low = mean = high.

    Args:
        challenger: (N,) one finite score an image, higher is better.
        champion: (N,) scores of the same images in the same order.
        confidence: in (0, 1), of the two-sided interval.
        resamples: at least 1.
        rng: draws the images; the same state gives the same interval.

    Raises:
        ShapeError: the two are not of the same length.
        InputError: no images, or `confidence` or `resamples` out of range.
        NonFiniteError: a score is NaN or infinite.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3, percentile interval.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.8")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; give at least 1, such as 2000")
    difference = _differences(challenger, champion)
    n = len(difference)
    rows = max(1, _CHUNK // n)
    means = np.concatenate(
        [
            difference[rng.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(difference.mean()), low=float(low), high=float(high))


def _differences(challenger: npt.ArrayLike, champion: npt.ArrayLike) -> Float64Array:
    """Challenger - champion, (N,) float64, once both are known to fit and to be numbers."""
    first, second = np.asarray(challenger, dtype=np.float64), np.asarray(champion, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ShapeError(
            f"challenger has scores of shape {first.shape}, champion {second.shape}; give one score an image to both"
        )
    if len(first) == 0:
        raise InputError("no scores to compare; measure both models on at least one hold-out image")
    for name, scores in (("challenger", first), ("champion", second)):
        broken = np.flatnonzero(~np.isfinite(scores))
        if len(broken):
            raise NonFiniteError(
                f"the {name}'s score of image number {broken[0]} is {scores[broken[0]]}; every image needs a number"
            )
    return first - second
