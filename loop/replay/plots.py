"""A summarised replay as pictures and as a Markdown table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loop.replay.summary import AXES, SCORES, mean_curve

_AXIS_WORDS = {"cells": "corrected cells", "images": "labelled images", "seconds": "modelled hours of a person"}
_SCORE_WORDS = {"ap": "AP over images", "macro_ap": "AP averaged over modalities"}
_SUFFIX = {"ap": "", "macro_ap": "_macro"}
_WORDS = """\
AuBC: area under the curve of score against cost, cost scaled to [0, 1], from the shared start to the cost that all have
reached; mean ± standard deviation over seeds. Cells to 90 %, 95 %: corrected cells, those of the start included, until
the mean curve has that share of full supervision; in brackets as a share of foreground_random's. FG-Eff: rate at which
the gap to full supervision closes, per 1,000 cells. AuBC against foreground_random: difference by cells, up to the cost
that the two have reached; p of the paired t-test and of the exact sign-flip test over seeds, not corrected for the
number of strategies. Loses: share of meetings with other strategies at equal cells that it loses
significantly (paired t-tests, Holm)."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_MARKS = "os^Dv<>P"
_LINES = ("-", "--", ":", "-.")


def write_plots(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes the pictures of a replay as PNG and SVG and returns their paths.

    `curves_AXIS`: AP, and AP averaged over modalities, against corrected cells, images and hours: the mean over seeds
    by round with a band of one standard deviation, and lines at 100 % and 90 % of full supervision. `penalty`: who
    beats whom at which share of budgets; left out where it could not be computed. The same document gives the same
    files.

    Args:
        document: what `loop.replay.summary.summarise` returned.
        out: a folder; made where it is missing. Files of these names are overwritten.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = {f"curves_{axis}": _curves(document, axis) for axis in AXES}
    if document.get("penalty_matrix"):
        pictures["penalty"] = _penalty(document)
    paths = []
    for name, figure in pictures.items():
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = out / f"{name}.{kind}"
            with rc_context({"svg.hashsalt": name}):
                figure.savefig(path, dpi=150, metadata=metadata)
            paths.append(path)
    return paths


def table(document: Mapping[str, Any]) -> str:
    """The replay in Markdown: a table for each score, the best area by corrected cells first, and what it stands on.

    Args:
        document: what `loop.replay.summary.summarise` returned.
    """
    parts = [_table(document, score) for score in _scores(document)]
    notes = [f"Note: {note}." for note in document.get("notes", [])]
    return "\n\n".join([*parts, *notes, _WORDS]) + "\n"


def _scores(document: Mapping[str, Any]) -> list[str]:
    return [score for score in SCORES if all(score in entry["final"] for entry in document["strategies"].values())]


def _curves(document: Mapping[str, Any], axis: str) -> Figure:
    scores = _scores(document)
    figure = Figure(figsize=(5.6 * len(scores), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, score in zip(all_axes, scores, strict=True):
        for i, (name, entry) in enumerate(document["strategies"].items()):
            cost, mean, spread = mean_curve(entry["seeds"], axis, score)
            x = cost / 3600 if axis == "seconds" else cost
            colour = _COLOURS[i % len(_COLOURS)]
            mark, line = _MARKS[i % len(_MARKS)], _LINES[i // len(_COLOURS) % len(_LINES)]
            axes.plot(x, mean, linestyle=line, marker=mark, markersize=4, color=colour, label=name)
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        _full_lines(axes, document, score)
        axes.set_xlabel(_AXIS_WORDS[axis])
        axes.set_ylabel(_SCORE_WORDS[score])
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    seeds = sorted({len(entry["seeds"]) for entry in document["strategies"].values()})
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    all_axes[0].legend(title=f"mean ± sd, {several} seeds", fontsize="small")
    return figure


def _full_lines(axes: Axes, document: Mapping[str, Any], score: str) -> None:
    if not document.get("full"):
        return
    full = document["full"][score]
    for share, style in ((1.0, "-"), (0.9, "--")):
        axes.axhline(share * full, color="0.4", linestyle=style, linewidth=1)
        axes.annotate(
            f"{share:.0%} of full supervision",
            (1, share * full),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="0.3",
        )


def _penalty(document: Mapping[str, Any]) -> Figure:
    scores = [score for score in _scores(document) if document.get(f"penalty_matrix{_SUFFIX[score]}")]
    names = list(document["penalty_matrix"])
    side = 2.2 + 0.55 * len(names)
    figure = Figure(figsize=(side * len(scores) + 0.6, side), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, score in zip(all_axes, scores, strict=True):
        wins, loses = document[f"penalty_matrix{_SUFFIX[score]}"], document[f"loses{_SUFFIX[score]}"]
        shares = np.array([[wins[a][b] for b in names] for a in names] + [[loses[b] for b in names]])
        picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (i, j), share in np.ndenumerate(shares):
            text = "" if i == j else f"{share:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize="small", color="white" if share > 0.6 else "black")
        axes.axhline(len(names) - 0.5, color="black", linewidth=1.5)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names) + 1), [*names, "loses (mean)"])
        axes.set_title(f"{_SCORE_WORDS[score]}:\nshare of budgets at which the row beats the column", fontsize="medium")
    figure.colorbar(picture, ax=list(all_axes), shrink=0.7)
    return figure


def _table(document: Mapping[str, Any], score: str) -> str:
    suffix = _SUFFIX[score]
    full = document["full"][score] if document.get("full") else None
    title = f"**{_SCORE_WORDS[score]}**" + (f" (full supervision {full:.3f})" if full is not None else "")
    header = (
        "strategy", "seeds", "AuBC, cells", "AuBC, images", "AuBC, hours", "final", "cells to 90 %", "cells to 95 %",
        "FG-Eff", "AuBC against foreground_random", "p (t; flips)", "loses",
    )  # fmt: skip
    by_area = sorted(
        document["strategies"].items(), key=lambda item: -(item[1][f"aubc_cells{suffix}"] or float("-inf"))
    )
    rows = [_row(name, entry, score, document.get(f"loses{suffix}") or {}) for name, entry in by_area]
    lines = [header, tuple(["---"] * len(header)), *rows]
    return title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(name: str, entry: Mapping[str, Any], score: str, loses: Mapping[str, float]) -> tuple[str, ...]:
    suffix = _SUFFIX[score]
    goals = []
    for share in (90, 95):
        cells, ratio = entry[f"cells_to_{share}{suffix}"], entry[f"cells_to_{share}{suffix}_ratio"]
        goals.append("not reached" if cells is None else f"{cells:.0f}" + ("" if ratio is None else f" ({ratio:.2f})"))
    rate = entry[f"foreground_efficiency{suffix}"]
    beside = entry["versus"].get("foreground_random", {}).get("aubc_cells_pair", {}).get(score, {})
    p = [beside.get("p_t"), beside.get("p_permutation")]
    return (
        name,
        str(len(entry["seeds"])),
        *(_mean_sd(entry["aubc"][axis][score]) for axis in AXES),
        _mean_sd(entry["final"][score]),
        *goals,
        _number(None if rate is None else 1000 * rate, ".2f"),
        _number(beside.get("difference"), "+.3f"),
        "; ".join("<0.001" if value is not None and value < 0.001 else _number(value, ".3f") for value in p),
        _number(loses.get(name), ".2f"),
    )


def _mean_sd(values: Mapping[str, Any]) -> str:
    if values["mean"] is None:
        return "-"
    return f"{values['mean']:.3f}" + ("" if values["sd"] is None else f" ± {values['sd']:.3f}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
