"""What a curve of score against cost is worth: the area below it, and what a wanted score costs."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array

_FASTEST = 1e4


def aubc(cost: npt.ArrayLike, score: npt.ArrayLike, *, until: float | None = None) -> float:
    """Area under the curve of score against cost, by trapezoids; cost is scaled so that its range is [0, 1].

    A curve that is 0.1 everywhere gives 0.1.

    Args:
        cost: (N,) strictly rising, N >= 2; what the labels cost, of any unit.
        score: (N,) what the model reached with them.
        until: the last cost that counts, within the range of `cost`; the score there is interpolated. None = all.

    Raises:
        ShapeError, NonFiniteError, InputError: the curve is not one, or `until` lies outside of it.

    Source: area under the budget curve (AuBC) as in Zhan et al. 2021, A Comparative Survey: Benchmarking for
    Pool-based Active Learning, and nnActive (Lueth et al. 2025).
    """
    x, y = _curve(cost, score)
    if len(x) < 2:
        raise InputError(f"the curve has {len(x)} point; an area needs at least 2")
    if until is not None:
        if not x[0] < until <= x[-1]:
            raise InputError(f"until={until}; expected more than {x[0]:g} and at most {x[-1]:g}, the range of the cost")
        end = float(np.interp(until, x, y))
        inside = x < until
        x, y = np.append(x[inside], until), np.append(y[inside], end)
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def common_budget(costs: Iterable[npt.ArrayLike]) -> float:
    """The smallest last cost: up to there, all curves can be compared.

    Args:
        costs: the cost of each curve, (N,) rising, N >= 1.

    Raises:
        InputError: there is no curve, or one is empty.
    """
    lasts = []
    for cost in costs:
        x = np.asarray(cost, dtype=np.float64)
        if len(x) == 0:
            raise InputError("a curve has no points; give each its cost, in rising order")
        lasts.append(float(x[-1]))
    if not lasts:
        raise InputError("no curves to compare; give at least one")
    return min(lasts)


def cost_to(cost: npt.ArrayLike, score: npt.ArrayLike, target: float) -> float | None:
    """The smallest cost at which the score, interpolated between its points, is at least `target`; None if never.

    Args:
        cost: (N,) strictly rising, N >= 1.
        score: (N,).
        target: the wanted score.

    Raises:
        ShapeError, NonFiniteError, InputError: the curve is not one.
    """
    x, y = _curve(cost, score)
    reached = np.flatnonzero(y >= target)
    if len(reached) == 0:
        return None
    i = int(reached[0])
    if i == 0:
        return float(x[0])
    share = (target - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def score_at(cost: npt.ArrayLike, score: npt.ArrayLike, at: float) -> float:
    """The score at the cost `at`, interpolated.

    Raises:
        ShapeError, NonFiniteError, InputError: the curve is not one, or `at` lies outside of it.
    """
    x, y = _curve(cost, score)
    if not x[0] <= at <= x[-1]:
        raise InputError(f"at={at}; expected between {x[0]:g} and {x[-1]:g}, the range of the cost")
    return float(np.interp(at, x, y))


def rising(cost: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Float64Array, Float64Array]:
    """The curve without points that cost nothing more: of several at one cost only the last stays.

    Images without a cell cost no cell; what they taught is had at the same cost.

    Args:
        cost: (N,) never falling, N >= 1.
        score: (N,).

    Returns:
        (M,) cost, strictly rising, and (M,) score, float64.

    Raises:
        ShapeError, NonFiniteError, InputError: lengths differ, a number is not finite, or the cost falls.
    """
    x, y = _numbers(cost, score)
    if np.any(np.diff(x) < 0):
        raise InputError(f"the cost falls from a point to the next: {_around(x, np.diff(x) < 0)}; give it summed up")
    stays = np.append(np.diff(x) > 0, True)
    return x[stays], y[stays]


def foreground_efficiency(cost: npt.ArrayLike, score: npt.ArrayLike, full: float, start: float) -> float | None:
    """How fast the gap to full supervision closes: beta >= 0 of y = full - (full - start) exp(-beta (x - x0)).

    Least squares in y over all points, x0 being the first cost. 0 where the score does not rise; never more than
    1e4 / (last cost - first cost), where the second point is at `full` already. None where `start` >= `full`: there is
    no gap.

    Args:
        cost: (N,) strictly rising, N >= 2: annotated foreground, such as corrected cells.
        score: (N,).
        full: score of full supervision.
        start: mean score at the first cost, over seeds.

    Returns:
        beta in 1 / unit of `cost`.

    Raises:
        ShapeError, NonFiniteError, InputError: the curve is not one, or has a single point.

    Source: nnActive (Lueth et al. 2025), foreground efficiency. Differs: beta is bounded, and found on a grid first,
    so that no starting value is needed.
    """
    x, y = _curve(cost, score)
    if len(x) < 2:
        raise InputError(f"the curve has {len(x)} point; a rate needs at least 2")
    gap = full - start
    if gap <= 0:
        return None
    length = float(x[-1] - x[0])
    way = (x - x[0]) / length

    def misfit(beta: float) -> float:
        return float(np.sum((full - gap * np.exp(-beta * way) - y) ** 2))

    grid = np.concatenate([[0.0], np.geomspace(1e-4, _FASTEST, 321)])
    best = int(np.argmin([misfit(float(beta)) for beta in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    finer = minimize_scalar(misfit, bounds=(low, high), method="bounded", options={"xatol": 1e-7 * max(high, 1.0)})
    beta = float(finer.x) if finer.fun < misfit(float(grid[best])) else float(grid[best])
    return beta / length


def _curve(cost: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Float64Array, Float64Array]:
    x, y = _numbers(cost, score)
    if np.any(np.diff(x) <= 0):
        raise InputError(
            f"the cost does not rise from a point to the next: {_around(x, np.diff(x) <= 0)}; "
            "give it summed up, one point a cost"
        )
    return x, y


def _numbers(cost: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Float64Array, Float64Array]:
    x, y = np.asarray(cost, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ShapeError(f"the cost is of shape {x.shape}, the score of {y.shape}; give one score a cost")
    if len(x) == 0:
        raise InputError("the curve has no points; give at least one cost with its score")
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        first = int(np.flatnonzero(~(np.isfinite(x) & np.isfinite(y)))[0])
        raise NonFiniteError(f"point {first} of the curve is cost {x[first]}, score {y[first]}; both must be numbers")
    return x, y


def _around(x: Float64Array, wrong: npt.NDArray[np.bool_]) -> str:
    i = int(np.flatnonzero(wrong)[0])
    return f"{x[i]:g} then {x[i + 1]:g}"
