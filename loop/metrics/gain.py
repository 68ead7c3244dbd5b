"""Does one way of choosing images teach more than another, where each pair of models is one throw of the dice."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from loop.errors import InputError, NonFiniteError
from loop.metrics.matching import Float64Array
from loop.metrics.paired import Interval, paired_bootstrap

RUN_SD, RUN_DF = 0.06, 3.0
"""How far the gain of one pair of models lies from that of all pairs that could have been trained, in AP, before any
pair is seen; and how many pairs that assumption counts for. Models of 12 to 24 images drawn at random differ by 0.10 to
0.12 in F1 from draw to draw (five seeds on drawn cells); a pair shares its seed and its first images."""


def gain_of_pairs(
    one: Sequence[Float64Array],
    other: Sequence[Float64Array],
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> Interval:
    """Mean gain of `one` over `other` per image over K pairs of models, with an interval for images and for trainings.

    What differs by the images: `paired_bootstrap` over the images of all pairs. What differs by the draw of the
    teaching images and by the training, which no image can show: a t interval of the K mean gains, their variance
    moderated by `RUN_SD` with `RUN_DF` degrees of freedom, since two pairs alone say nothing of it. The half-widths
    add up in squares, so the interval is wider than either.

    Measured with no true gain, two pairs of 12 images each, 1,000 cases, at 90 %: it lies above 0 in 0.1 %, 3.4 % and
    8.2 % of cases where the spread between pairs is 0.03, 0.06 and 0.1 (it may in 5 %); the bootstrap alone does in
    13 %, 21 % and 30 %. A true gain of 0.1 is seen in 57 %, 48 % and 40 %.

    Args:
        one: K arrays (N_k,), a score for each image of pair k, higher is better.
        other: K arrays (N_k,), scores of the same images in the same order.
        confidence: in (0, 1), of the two-sided interval.
        resamples: at least 1.
        rng: draws the images.

    Raises:
        ShapeError, InputError, NonFiniteError: as `paired_bootstrap`; also where there is no pair, or one is empty.

    Source: moderated t statistic, Smyth, Stat. Appl. Genet. Mol. Biol. 3:3 (2004), section 3. Differs: the prior is
    fixed, not estimated.
    """
    if not one or len(one) != len(other) or not all(len(scores) for scores in one):
        raise InputError(f"{len(one)} and {len(other)} models; give at least one pair, each with its images")
    images = paired_bootstrap(
        np.concatenate(one), np.concatenate(other), confidence=confidence, resamples=resamples, rng=rng
    )
    means = np.array([np.mean(first - second) for first, second in zip(one, other, strict=True)])
    k = len(means)
    scatter = float(((means - means.mean()) ** 2).sum())
    freedom = RUN_DF + k - 1
    variance = (RUN_DF * RUN_SD**2 + scatter) / freedom
    half = float(student.ppf((1 + confidence) / 2, freedom)) * np.sqrt(variance / k)
    low = images.mean - float(np.hypot(images.mean - images.low, half))
    high = images.mean + float(np.hypot(images.high - images.mean, half))
    return Interval(images.mean, low, high)


def bootstrap_mean(
    scores: Float64Array, groups: Sequence[str], *, confidence: float, resamples: int, rng: np.random.Generator
) -> Interval:
    """Mean score over images with its bootstrap interval; whole groups are drawn, since images of one are alike.

    Args:
        scores: (N,) finite, N >= 1.
        groups: the group of each image.
        confidence: in (0, 1), of the two-sided interval.
        resamples: at least 1.
        rng: draws the groups.

    Raises:
        InputError: no scores, or not one group for each.
        NonFiniteError: a score is NaN or infinite.
    """
    if len(scores) == 0 or len(groups) != len(scores):
        raise InputError(f"{len(scores)} scores with {len(groups)} groups; give at least one, each with its group")
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"image number {np.flatnonzero(~np.isfinite(scores))[0]} has a score that is no number")
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(member, weights=scores), np.bincount(member)
    drawn = rng.integers(0, len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = float(scores.mean())
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def standard_error(low: float, high: float, confidence: float) -> float:
    """The standard error behind a normal interval from `low` to `high` at `confidence` in (0, 1); >= 0."""
    return float((high - low) / 2 / norm.ppf((1 + confidence) / 2))
