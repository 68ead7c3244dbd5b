"""How far stated confidences are true: what happens among the cells of which 0.8 is said, and what ranks above what."""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array
from loop.types import BoolArray

Binning = Literal["width", "mass"]


class Bin(NamedTuple):
    """The cells of a range of confidence.

    From `low` to `high`; `cells` >= 1 lie in it; `confidence` is their mean, `correct` the share that is right.
    """

    low: float
    high: float
    cells: int
    confidence: float
    correct: float


def reliability(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, *, bins: int = 10, binning: Binning = "width"
) -> list[Bin]:
    """What was said against what was so, in ascending order of confidence; bins without cells are left out.

    Args:
        confidence: (N,) in [0, 1].
        correct: (N,) bool.
        bins: >= 1.
        binning: "width": ranges of equal width, each with its lower end, the last with both; "mass": as many cells in
            each as can be, equal confidences staying together.

    Raises:
        ShapeError: the two are not of the same length.
        NonFiniteError: a confidence is NaN or infinite.
        InputError: a confidence leaves [0, 1], or `bins` < 1.
    """
    said, so = _checked(confidence, correct)
    if bins < 1:
        raise InputError(f"bins={bins}; give at least 1, such as 10")
    if binning == "width":
        edges = np.linspace(0, 1, bins + 1)
    else:
        inner = np.quantile(said, np.arange(1, bins) / bins) if len(said) else np.zeros(0)
        edges = np.unique(np.concatenate([[0.0], inner, [1.0]]))
    place = np.clip(np.searchsorted(edges, said, side="right") - 1, 0, len(edges) - 2)
    table = []
    for k in np.unique(place).tolist():
        own = place == k
        means = float(said[own].mean()), float(so[own].mean())
        table.append(Bin(float(edges[k]), float(edges[k + 1]), int(own.sum()), *means))
    return table


def expected_calibration_error(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, *, bins: int = 10, binning: Binning = "width"
) -> float:
    """Mean over the cells of |mean confidence - share right| of their bin, in [0, 1]; 0 without cells.

    Args and errors as for `reliability`.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 5, for the chance of one event instead of
    that of the top class.
    """
    table = reliability(confidence, correct, bins=bins, binning=binning)
    total = sum(row.cells for row in table)
    return sum(row.cells * abs(row.confidence - row.correct) for row in table) / max(total, 1)


def brier_error(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> float:
    """Mean squared difference between confidence and truth (0 or 1), in [0, 1]; 0 without cells.

    Raises:
        ShapeError, NonFiniteError, InputError: as for `reliability`.

    Source: Brier 1950, for one event.
    """
    said, so = _checked(confidence, correct)
    return float(np.mean((said - so) ** 2)) if len(said) else 0.0


def spearman(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1], equal values sharing their mean rank; 0 where either is constant.

    Raises:
        ShapeError: the two are not of the same length.
        NonFiniteError: a value is NaN or infinite.
    """
    first, second = _pair(one, other, "values")
    if len(first) < 2:
        return 0.0
    ranks = np.stack([rankdata(first), rankdata(second)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=1).prod())
    return float((ranks[0] * ranks[1]).sum() / length) if length > 0 else 0.0


def _checked(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> tuple[Float64Array, BoolArray]:
    said, so = _pair(confidence, correct, "confidences")
    outside = np.flatnonzero((said < 0) | (said > 1))
    if len(outside):
        raise InputError(f"confidence number {outside[0]} is {said[outside[0]]}; expected a number in [0, 1]")
    return said, so.astype(np.bool_)


def _pair(one: npt.ArrayLike, other: npt.ArrayLike, what: str) -> tuple[Float64Array, Float64Array]:
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ShapeError(f"{what} are {first.shape}, compared with {second.shape}; give one a cell to both")
    for values in (first, second):
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            raise NonFiniteError(f"value number {broken[0]} of the {what} is {values[broken[0]]}; expected a number")
    return first, second
