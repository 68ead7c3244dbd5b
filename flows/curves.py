"""The plots of the report page, as SVG text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loop.adapters.index import RoundRow


def round_curve(rounds: Sequence[RoundRow]) -> str:
    """Hold-out AP of each round's challenger and of the champion before it, as SVG text."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbers = [row.number for row in rounds]
    axes.plot(numbers, [row.metrics["ap"] for row in rounds], "o-", label="challenger")
    against = [(row.number, row.metrics["champion_ap"]) for row in rounds if "champion_ap" in row.metrics]
    if against:
        axes.plot([n for n, _ in against], [v for _, v in against], "s--", label="champion before it")
    axes.set_xlabel("round")
    axes.set_ylabel("AP on the hold-out")
    axes.set_xticks(numbers)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def live_curve(estimates: Sequence[Mapping[str, Any]]) -> str:
    """AP on the hold-out in each round with its interval, over the labelled cells and over the minutes they took.

    Args:
        estimates: the documents of flows/estimate.py, the oldest first; at least one with a live AP.
    """
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, text in ((left, "cells", "labelled cells"), (right, "minutes", "minutes of people's work")):
        _with_intervals(axes, estimates, "live", key, style="o-", label="in service")
        _with_intervals(axes, estimates, "learnt", key, style="s--", label="of this round's labels alone")
        axes.set_xlabel(text)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    left.set_ylabel("AP on the hold-out, mean of images")
    left.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _with_intervals(
    axes: Axes, estimates: Sequence[Mapping[str, Any]], model: str, key: str, *, style: str, label: str
) -> None:
    """One model's AP of each round that has one; the second model stands a little to the right of the first."""
    found = [(document[key], document[model]) for document in estimates if document[model]]
    if not found:
        return
    aside = 0.0 if model == "live" else 0.008 * max(document[key] for document in estimates)
    aps = [part["ap"] for _, part in found]
    below = [part["ap"] - part["low"] for _, part in found]
    above = [part["high"] - part["ap"] for _, part in found]
    costs = [cost + aside for cost, _ in found]
    axes.errorbar(costs, aps, yerr=[below, above], fmt=style, capsize=3, markersize=4, linewidth=1.2, label=label)


def reliability_curve(rows: Sequence[Sequence[float]]) -> str:
    """What was said against what was so, as SVG text.

    Args:
        rows: confidence said, share that a person drew too, number of cells, of each bin; at least one.
    """
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], "--", color="0.6", label="as it should be")
    axes.plot([row[0] for row in rows], [row[1] for row in rows], "o-", label="as it is")
    for said, so, cells in rows:
        axes.annotate(f"{cells:.0f}", (said, so), textcoords="offset points", xytext=(4, -11), fontsize=8)
    axes.set_xlabel("confidence said")
    axes.set_ylabel("share that a person drew too")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
