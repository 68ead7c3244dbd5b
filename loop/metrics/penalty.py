"""Which method beats which, how often, and how sure that is: paired tests over seeds."""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array

_MOST_FLIPPED = 22
_SATURATED = 0.99


class PenaltyMatrix(NamedTuple):
    """How often methods beat each other.

    `wins` (M, M) float64 in [0, 1]: entry [i, j] is the share of the counted budgets at which `names[i]` is better
    than `names[j]`, significantly; the diagonal is 0. `loses` (M,): how often a method loses, the mean of its column
    over the other methods. `budgets`: how many counted; where none did, all shares are 0.
    """

    names: tuple[str, ...]
    wins: Float64Array
    loses: Float64Array
    budgets: int


def paired_t(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Two-sided p of the paired t-test that the mean of a - b is 0.

    Differences that are all alike give 1 where they are 0, else 0.

    Args:
        a: (N,) one finite score a seed, N >= 2.
        b: (N,) scores of the same seeds in the same order.

    Raises:
        ShapeError, NonFiniteError, InputError: not of one length, not numbers, or fewer than 2 seeds.
    """
    difference = _differences(a, b)
    mean, spread = float(difference.mean()), float(difference.std(ddof=1))
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    statistic = abs(mean) / (spread / np.sqrt(len(difference)))
    return float(2 * student.sf(statistic, len(difference) - 1))


def paired_permutation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Two-sided p of the paired sign-flip test, exact.

    That is the share of the 2**N ways to swap a and b within seeds whose mean difference is at least as far from 0 as
    the one seen. Nothing is assumed of how scores are spread, only that a - b is as likely as b - a. The smallest
    possible p is 2**(1 - N): with 5 seeds 0.0625, so nothing can be significant at 0.05; with 6 it is 0.031.

    Args:
        a: (N,) one finite score a seed, 2 <= N <= 22.
        b: (N,) scores of the same seeds in the same order.

    Raises:
        ShapeError, NonFiniteError, InputError: as `paired_t`, or more than 22 seeds.
    """
    difference = _differences(a, b)
    if len(difference) > _MOST_FLIPPED:
        raise InputError(
            f"{len(difference)} seeds are {2.0 ** len(difference):.0e} ways to swap; "
            f"give at most {_MOST_FLIPPED}, or use the t-test"
        )
    sums = difference[:1]
    for d in difference[1:].tolist():
        sums = np.concatenate([sums + d, sums - d])
    seen = abs(float(difference.sum()))
    return float(np.mean(np.abs(sums) >= seen - 1e-12 * max(float(np.abs(difference).sum()), 1e-300)))


def holm(p: npt.ArrayLike) -> Float64Array:
    """P values, adjusted so that among all tests the chance of a single wrong rejection stays what it is for one.

    Args:
        p: (N,) in [0, 1]; N may be 0.

    Returns:
        (N,) float64 in [0, 1], in the same order, none smaller than given.

    Raises:
        InputError: a value is outside [0, 1].

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not np.all((values >= 0) & (values <= 1)):
        raise InputError(f"p values {values.tolist()}; expected a list of numbers in [0, 1]")
    n = len(values)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (n - np.arange(n)))
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def penalty_matrix(
    scores: Mapping[str, npt.ArrayLike], full: float | None = None, *, alpha: float = 0.05, correct: bool = True
) -> PenaltyMatrix:
    """How often each method beats each other one, significantly, over budgets.

    At each budget every two methods meet in a two-sided paired t-test over seeds. A budget at which all methods'
    means are above 99 % of `full` does not count: in saturation all tie.

    Args:
        scores: by method, (B, S): its score at each of B >= 1 budgets with each of S >= 2 seeds; the same budgets and
            seeds in the same order for all.
        full: score of full supervision; None = every budget counts.
        alpha: in (0, 1), the level of the tests.
        correct: Holm's correction over the pairs of a budget.

    Raises:
        ShapeError: methods differ in budgets or seeds.
        InputError: no method, fewer than 2 seeds, or alpha out of range.
        NonFiniteError: a score is NaN or infinite; the text names the method.

    Source: the pairwise penalty matrix of Ash et al. 2020 (BADGE), as in nnActive (Lueth et al. 2025).
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; give a number between 0 and 1, such as 0.05")
    names, cube = tuple(scores), _cube(scores)
    n = len(names)
    pairs = list(combinations(range(n), 2))
    wins, counted = np.zeros((n, n)), 0
    for budget in range(cube.shape[1]):
        means = cube[:, budget].mean(axis=1)
        if full is not None and np.all(means > _SATURATED * full):
            continue
        counted += 1
        raw = [paired_t(cube[i, budget], cube[j, budget]) for i, j in pairs]
        for (i, j), p in zip(pairs, holm(raw) if correct else raw, strict=True):
            if p < alpha:
                better, worse = (i, j) if means[i] > means[j] else (j, i)
                wins[better, worse] += 1
    wins /= max(counted, 1)
    return PenaltyMatrix(names, wins, wins.sum(axis=0) / max(n - 1, 1), counted)


def _cube(scores: Mapping[str, npt.ArrayLike]) -> Float64Array:
    """Scores as (methods, budgets, seeds) float64, checked."""
    if not scores:
        raise InputError("no methods to compare; give at least one with its scores")
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    first, shape = next((name, values.shape) for name, values in arrays.items())
    for name, values in arrays.items():
        if values.ndim != 2 or values.shape != shape:
            raise ShapeError(
                f"scores of {name!r} are of shape {values.shape}, those of {first!r} of {shape}; "
                "give both (budgets, seeds), with the same budgets and seeds"
            )
        if not np.isfinite(values).all():
            raise NonFiniteError(f"a score of {name!r} is NaN or infinite; run that seed again")
    if shape[0] < 1 or shape[1] < 2:
        raise InputError(f"{shape[0]} budgets, {shape[1]} seeds; a paired test needs a budget and at least 2 seeds")
    return np.stack(list(arrays.values()))


def _differences(a: npt.ArrayLike, b: npt.ArrayLike) -> Float64Array:
    """A - b, (N,) float64, once both are known to fit and to be numbers."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ShapeError(f"scores of shapes {first.shape} and {second.shape}; give one score a seed to both")
    if len(first) < 2:
        raise InputError(f"{len(first)} seed; a paired test needs at least 2")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise NonFiniteError("a score is NaN or infinite; every seed needs a number in both methods")
    return first - second
