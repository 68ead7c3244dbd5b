"""What more labels would bring: a power law through the scores so far, and how little that may say."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array
from loop.metrics.paired import Interval

FEWEST_POINTS = 3
"""A power law has three unknowns; with fewer costs there is none."""

_EXPONENTS = np.geomspace(0.1, 2.0, 20)
_SMALLEST_ERROR = 0.005


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """ap(n) = c - a * n ** -b: never falling, and never above c.

    Attributes:
        c: what it rises to, in [0, 1].
        a: >= 0.
        b: in [0.1, 2].
        cost: the largest cost that was measured, > 0.
        draws: (R, 3) float64, c, a and b of R curves that the errors of the scores allow as well.
    """

    c: float
    a: float
    b: float
    cost: float
    draws: Float64Array

    def ap(self, cost: float) -> float:
        """The fitted score at `cost` > 0, in [0, 1]."""
        return float(np.clip(self.c - self.a * cost**-self.b, 0.0, 1.0))


def fit_learning_curve(
    costs: Sequence[float],
    scores: Sequence[float],
    errors: Sequence[float],
    *,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> LearningCurve | None:
    """The power law through (cost, score) points, with curves that fit as well; None with fewer than 3 costs.

    Weighted least squares over c in [0, 1] and a >= 0 for each of 20 exponents from 0.1 to 2. Each further curve is
    fitted to scores to which errors of the stated size were added. Where the points lie further from the curve than
    their errors explain, the errors are enlarged until they do (Birge's ratio; from 4 points on).

    Args:
        costs: (N,) > 0: images, cells or seconds of people's work, in any order; equal ones are allowed.
        scores: (N,) in [0, 1].
        errors: (N,) >= 0, standard error of each score, of its hold-out images for one; below 0.005 counts as that.
        rng: draws the errors; the same state gives the same curves.
        resamples: how many further curves, at least 1.

    Raises:
        ShapeError: the three are not of the same length.
        InputError: a cost is not above 0, an error is below 0, or `resamples` is below 1.
        NonFiniteError: a number is NaN or infinite.

    Source: inverse power law of learning curves, Figueroa et al., BMC Med. Inform. Decis. Mak. 12:8 (2012), eq. 1; the
    interval is the parametric bootstrap of Efron & Tibshirani (1993), section 6.5. Differs: errors are added to the
    scores, not to the fitted curve, which at 3 or 4 points passes too near to them.
    """
    x, y, error = _checked(costs, scores, errors, resamples)
    if len(np.unique(x)) < FEWEST_POINTS:
        return None
    last = float(x.max())
    scaled = x / last
    error = np.maximum(error, _SMALLEST_ERROR)
    weights = 1 / error**2
    c, a, b = _fit(scaled, y[None], weights)[0]
    if len(y) > FEWEST_POINTS:
        away = (y - c + a * scaled**-b) / error
        error = error * np.sqrt(max(1.0, float((away**2).sum()) / (len(y) - FEWEST_POINTS)))
    draws = _fit(scaled, y + rng.normal(size=(resamples, len(y))) * error, weights)
    return LearningCurve(float(c), float(a * last**b), float(b), last, _unscaled(draws, last))


def forecast(curve: LearningCurve | None, more: float, *, confidence: float = 0.9) -> Interval | None:
    """The gain in score that `more` cost brings beyond what was spent, with its interval; None without a curve.

    It is never negative, since the curve never falls; the mean is that over all curves. Measured with scores drawn
    around known curves (c 0.4 to 0.95, b 0.2 to 1.5, a step of 8 images a round, errors of 0.01 and 0.03, 50 images
    more): the 90 % interval holds the true gain in 86 % to 89 % of 400 cases at 3 points and in 92 % to 97 % at 4, 6
    and 10. At 3 points it is wide: 0.08 to 0.11 of AP on average, against 0.01 to 0.03 at 10.

    Args:
        curve: of `fit_learning_curve`.
        more: >= 0, in the unit of its costs.
        confidence: in (0, 1), of the two-sided interval.

    Raises:
        InputError: `more` is below 0 or no number, or `confidence` is out of range.
    """
    if not (np.isfinite(more) and more >= 0):
        raise InputError(f"more is {more}; give a cost of at least 0")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.9")
    if curve is None:
        return None
    _, a, b = curve.draws.T
    gains = a * (curve.cost**-b - (curve.cost + more) ** -b)
    low, high = np.quantile(gains, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.clip(gains.mean(), low, high)), float(low), float(high))


def _checked(
    costs: npt.ArrayLike, scores: npt.ArrayLike, errors: npt.ArrayLike, resamples: int
) -> tuple[Float64Array, Float64Array, Float64Array]:
    x, y, error = (np.asarray(values, dtype=np.float64) for values in (costs, scores, errors))
    if x.ndim != 1 or x.shape != y.shape or x.shape != error.shape:
        raise ShapeError(f"{x.shape} costs, {y.shape} scores, {error.shape} errors; give one of each a point")
    for name, values in (("cost", x), ("score", y), ("error", error)):
        if not np.isfinite(values).all():
            raise NonFiniteError(f"a {name} of the learning curve is {values[~np.isfinite(values)][0]}; leave it out")
    if (x <= 0).any() or (error < 0).any():
        raise InputError(
            f"costs are {x.tolist()}, errors {error.tolist()}; give costs above 0 and errors of at least 0"
        )
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; give at least 1, such as 1000")
    return x, y, error


def _fit(x: Float64Array, scores: Float64Array, weights: Float64Array) -> Float64Array:
    """(R, 3) c, a and b of the best curve through each row of `scores` (R, N) at the costs `x` (N,) in (0, 1].

    At a given b the curve is a line over x ** -b; where its intercept c leaves [0, 1] it is held at the bound.
    """
    w = weights / weights.sum()
    z = x[None] ** -_EXPONENTS[:, None]
    z_mean, y_mean = z @ w, scores @ w
    z_square, zy = (z * z) @ w, (scores * w) @ z.T
    slope = np.maximum((y_mean[:, None] * z_mean - zy) / np.maximum(z_square - z_mean**2, 1e-12), 0.0)
    top = y_mean[:, None] + slope * z_mean
    held = np.maximum((z_mean - zy) / z_square, 0.0)
    a, c = np.where(top > 1, held, slope), np.clip(top, 0.0, 1.0)
    misfit = (scores**2 @ w)[:, None] + c**2 + a**2 * z_square - 2 * (c * y_mean[:, None] - a * zy + a * c * z_mean)
    best, rows = misfit.argmin(axis=1), np.arange(len(scores))
    return np.stack([c[rows, best], a[rows, best], _EXPONENTS[best]], axis=1)


def _unscaled(curves: Float64Array, last: float) -> Float64Array:
    """The curves over cost rather than over cost / last."""
    c, a, b = curves.T
    return np.stack([c, a * last**b, b], axis=1)
