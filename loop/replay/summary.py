"""What the runs of a replay add up to: areas, costs of a wanted score, who beats whom, and how sure that is.

AXIS is cells, images or seconds, each cumulative. Keys of `macro_ap` end in "_macro" where those of `ap` have nothing.
Rounds that cost nothing more on an axis (empty images on that of cells) are one point there, the last. Strategies that
share a seed must share its first point. `summarise` adds to each strategy:

- aubc: {AXIS: {score: {"mean", "sd", "per_seed"}}}, from the shared start to the last cost that all strategies with
  that seed have reached; None for a seed in which one of them never rose above the start. Flat: aubc_AXIS, the means.
- final: {score: {"mean", "sd", "per_seed"}}, after the last round, whatever it cost.
- AXIS_to_90, AXIS_to_95: the smallest cost, the start included, at which the mean curve (mean cost and mean score by
  round) has that share of the full score; None = never. The same with "_ratio" at the end: as a share of
  foreground_random's.
- foreground_efficiency: beta of the mean curve, per corrected cell; foreground_efficiency_area: per unit of
  "foreground", where the runs have it.
- versus: {baseline: {quantity: {score: {"difference", "sd", "p_t", "p_permutation", "per_seed", "seeds"}}}} over the
  seeds that it shares with the baseline. Quantities: aubc_AXIS as above; aubc_AXIS_pair, up to the last cost that the
  two have reached, whatever the others did; final.

And beside the strategies:

- penalty_matrix: {winner: {loser: share of budgets}}, and loses: {name: share}, at equal corrected cells, at as many
  evenly spaced budgets as there are rounds, over the seeds that all strategies share.
- notes: what could not be computed, in words.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loop.errors import InputError
from loop.metrics.curves import aubc, common_budget, cost_to, foreground_efficiency, rising, score_at
from loop.metrics.matching import Float64Array
from loop.metrics.penalty import paired_permutation, paired_t, penalty_matrix

AXES = ("cells", "images", "seconds")
SCORES = ("ap", "macro_ap")
BASELINES = ("foreground_random", "random")
SHARES = (90, 95)
_SUFFIX = {"ap": "", "macro_ap": "_macro"}
_EXACT_SEEDS = 20

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]


def summarise(document: Mapping[str, Any], *, alpha: float = 0.05) -> dict[str, Any]:
    """The replay document with all that follows from its runs, as the module says; nothing given is changed.

    Args:
        document: {"full": {"ap", "macro_ap", ..} or None, "strategies": {name: {"seeds": [{"seed", "images", "cells",
            "seconds", "ap", "macro_ap", and perhaps "foreground"}]}}}; costs are cumulative, lists are by round.
            `macro_ap` may be absent in all. Strategies may have different seeds.
        alpha: level of the penalty matrix.

    Raises:
        InputError: no runs, lists of a run differ in length, or a seed does not start alike in all strategies.
    """
    runs: Runs = {name: list(entry["seeds"]) for name, entry in document["strategies"].items()}
    _check(runs)
    scores = [score for score in SCORES if all(score in run for own in runs.values() for run in own)]
    full = {score: float(document["full"][score]) for score in scores} if document.get("full") else {}
    notes: list[str] = [] if full else ["full supervision was not measured: no shares of it"]
    strategies: dict[str, Any] = {name: dict(entry) for name, entry in document["strategies"].items()}
    for name, entry in strategies.items():
        entry |= _areas(runs, name, scores) | _goals(runs[name], full, scores)
        entry |= _efficiencies(runs[name], full, scores)
    for name, entry in strategies.items():
        entry |= _ratios(entry, strategies.get("foreground_random"))
        entry["versus"] = {
            other: _versus(runs, (name, other), strategies) for other in BASELINES if other in runs and other != name
        }
    out = {**document, "strategies": strategies, "notes": notes}
    for score in scores:
        out |= _penalties(runs, score, full.get(score), alpha, notes)
    return out


def mean_curve(seeds: Sequence[Run], axis: str, score: str) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Mean cost, mean score and its standard deviation by round, over the rounds that all seeds have had.

    Args:
        seeds: runs of one strategy, at least one.
        axis: one of `AXES`, or foreground.
        score: one of `SCORES`.

    Returns:
        Three (R,) float64; the deviation is 0 with one seed.
    """
    rounds = min(len(run[axis]) for run in seeds)
    costs = np.array([run[axis][:rounds] for run in seeds], dtype=np.float64)
    scores = np.array([run[score][:rounds] for run in seeds], dtype=np.float64)
    spread = scores.std(axis=0, ddof=1) if len(seeds) > 1 else np.zeros(rounds)
    return costs.mean(axis=0), scores.mean(axis=0), spread


def _check(runs: Runs) -> None:
    if not runs or not all(runs.values()):
        raise InputError("a strategy without a finished seed; give each strategy at least one run")
    starts: dict[Any, tuple[str, tuple[float, ...]]] = {}
    for name, own in runs.items():
        for run in own:
            lists = {key: len(run[key]) for key in (*AXES, "ap", "macro_ap", "foreground") if key in run}
            if len(set(lists.values())) != 1 or 0 in lists.values():
                raise InputError(f"seed {run['seed']} of {name!r} has lists of lengths {lists}; give one value a round")
            start = (float(run["images"][0]), float(run["cells"][0]))
            first, expected = starts.setdefault(run["seed"], (name, start))
            if start != expected:
                raise InputError(
                    f"seed {run['seed']} starts with {start[0]:g} images, {start[1]:g} cells in {name!r} but with "
                    f"{expected[0]:g}, {expected[1]:g} in {first!r}; give all strategies the same first images"
                )


def _area(run: Run, others: Sequence[Run], axis: str, score: str) -> float | None:
    """Area of one run up to the last cost of the poorest of `others`; None where one of them never cost more."""
    until = common_budget([other[axis] for other in others])
    x, y = rising(run[axis], run[score])
    return aubc(x, y, until=until) if len(x) > 1 and until > x[0] else None


def _areas(runs: Runs, name: str, scores: Sequence[str]) -> dict[str, Any]:
    rivals = {run["seed"]: [r for own in runs.values() for r in own if r["seed"] == run["seed"]] for run in runs[name]}
    table = {
        axis: {score: _spread([_area(run, rivals[run["seed"]], axis, score) for run in runs[name]]) for score in scores}
        for axis in AXES
    }
    flat = {f"aubc_{axis}{_SUFFIX[score]}": table[axis][score]["mean"] for axis in AXES for score in scores}
    final = {score: _spread([float(run[score][-1]) for run in runs[name]]) for score in scores}
    return {**flat, "aubc": table, "final": final}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        "mean": float(np.mean(known)) if whole else None,
        "sd": float(np.std(known, ddof=1)) if whole and len(known) > 1 else None,
        "per_seed": list(values),
    }


def _goals(seeds: Sequence[Run], full: Mapping[str, float], scores: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis in AXES:
        for score in scores:
            cost, mean, _ = mean_curve(seeds, axis, score)
            for share in SHARES:
                reached = cost_to(*rising(cost, mean), share / 100 * full[score]) if score in full else None
                found[f"{axis}_to_{share}{_SUFFIX[score]}"] = reached
    return found


def _ratios(entry: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for key in [f"{axis}_to_{share}{suffix}" for axis in AXES for share in SHARES for suffix in _SUFFIX.values()]:
        if key in entry:
            other = baseline[key] if baseline else None
            ratios[f"{key}_ratio"] = entry[key] / other if entry[key] is not None and other else None
    return ratios


def _efficiencies(seeds: Sequence[Run], full: Mapping[str, float], scores: Sequence[str]) -> dict[str, Any]:
    axes = {"cells": "", **({"foreground": "_area"} if all("foreground" in run for run in seeds) else {})}
    found: dict[str, Any] = {}
    for score in scores:
        for axis, kind in axes.items():
            cost, mean, _ = mean_curve(seeds, axis, score)
            x, y = rising(cost, mean)
            known = score in full and len(x) > 1
            beta = foreground_efficiency(x, y, full[score], float(mean[0])) if known else None
            found[f"foreground_efficiency{kind}{_SUFFIX[score]}"] = beta
    return found


def _versus(runs: Runs, names: tuple[str, str], strategies: Mapping[str, Any]) -> dict[str, Any]:
    """Quantity -> score -> how the first of `names` differs from the second, over the seeds of both."""
    own, other = ({run["seed"]: (i, run) for i, run in enumerate(runs[name])} for name in names)
    shared = [seed for seed in own if seed in other]
    table: dict[str, Any] = {}
    for score in strategies[names[0]]["final"]:
        for axis in AXES:
            values = [strategies[name]["aubc"][axis][score]["per_seed"] for name in names]
            whole = [(values[0][own[s][0]], values[1][other[s][0]]) for s in shared]
            pairs = [(own[s][1], other[s][1]) for s in shared]
            two = [(_area(a, (a, b), axis, score), _area(b, (a, b), axis, score)) for a, b in pairs]
            table.setdefault(f"aubc_{axis}", {})[score] = _compared(whole)
            table.setdefault(f"aubc_{axis}_pair", {})[score] = _compared(two)
        last = [(float(own[s][1][score][-1]), float(other[s][1][score][-1])) for s in shared]
        table.setdefault("final", {})[score] = _compared(last)
    return table


def _compared(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Mean and deviation of first - second over seeds, and how likely such is by chance; None = cannot be said."""
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    n, whole = len(known), len(known) == len(pairs) > 0
    first, second = [a for a, _ in known], [b for _, b in known]
    difference = np.array(first) - np.array(second)
    tested = whole and n > 1
    return {
        "difference": float(difference.mean()) if whole else None,
        "sd": float(difference.std(ddof=1)) if tested else None,
        "p_t": paired_t(first, second) if tested else None,
        "p_permutation": paired_permutation(first, second) if tested and n <= _EXACT_SEEDS else None,
        "per_seed": difference.tolist() if whole else None,
        "seeds": n,
    }


def _penalties(runs: Runs, score: str, full: float | None, alpha: float, notes: list[str]) -> dict[str, Any]:
    suffix = _SUFFIX[score]
    nothing: dict[str, Any] = {f"penalty_matrix{suffix}": {}, f"loses{suffix}": {}}
    by_seed = {name: {run["seed"]: run for run in own} for name, own in runs.items()}
    shared = [s for s in next(iter(by_seed.values())) if all(s in own for own in by_seed.values())]
    if len(shared) < 2:
        notes.append(f"no penalty matrix of {score}: all strategies must have run 2 seeds; so far {len(shared)}")
        return nothing
    rounds = max(len(run["cells"]) for own in runs.values() for run in own) - 1
    columns = {name: [_at_budgets(by_seed, name, seed, score, rounds) for seed in shared] for name in runs}
    if any(column is None for own in columns.values() for column in own):
        notes.append(f"no penalty matrix of {score}: in some seed a strategy never asked for a cell after the start")
        return nothing
    matrix = penalty_matrix({name: np.array(own).T for name, own in columns.items()}, full, alpha=alpha)
    if matrix.budgets == 0:
        notes.append(f"the penalty matrix of {score} is empty: all strategies are above 99 % of full supervision")
    wins = {a: {b: float(matrix.wins[i, j]) for j, b in enumerate(matrix.names)} for i, a in enumerate(matrix.names)}
    return {
        f"penalty_matrix{suffix}": wins,
        f"loses{suffix}": dict(zip(matrix.names, matrix.loses.tolist(), strict=True)),
    }


def _at_budgets(
    by_seed: Mapping[str, Mapping[Any, Run]], name: str, seed: Any, score: str, budgets: int
) -> list[float] | None:
    """Scores of a run at evenly spaced numbers of cells up to the common one, without the start, which all share."""
    run = by_seed[name][seed]
    start, until = float(run["cells"][0]), common_budget([own[seed]["cells"] for own in by_seed.values()])
    if until <= start:
        return None
    x, y = rising(run["cells"], run[score])
    return [score_at(x, y, at) for at in np.linspace(start, until, budgets + 1)[1:].tolist()]
