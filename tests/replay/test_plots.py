import numpy as np
import pytest
from PIL import Image

from loop.replay.plots import _curves, table, write_plots
from loop.replay.summary import summarise


def made_up(strategies=("random", "foreground_random", "entropy", "celloop"), seeds=5):
    def run(i, seed):
        rng = np.random.default_rng([i, seed])
        first = np.random.default_rng(seed)
        cells = np.cumsum([40 + seed, *rng.integers(40 + 12 * i, 90 + 12 * i, 5)])
        noise = np.array([first.normal(0, 0.03), *rng.normal(0, 0.02, 5)])
        ap = 0.7 - 0.45 * np.exp(-(0.004 + 0.002 * i) * (cells - 40)) + noise
        return {
            "seed": seed,
            "images": list(range(6, 36, 5))[:6],
            "cells": [int(c) for c in cells],
            "seconds": (cells * 6.0 + 100).tolist(),
            "ap": ap.tolist(),
            "macro_ap": (0.8 * ap).tolist(),
        }

    runs = {name: {"seeds": [run(i, seed) for seed in range(seeds)]} for i, name in enumerate(strategies)}
    return summarise({"full": {"ap": 0.7, "macro_ap": 0.56}, "strategies": runs})


def test_pictures_are_written_and_can_be_opened(tmp_path):
    paths = write_plots(made_up(), tmp_path / "new" / "folder")
    assert {path.name for path in paths} == {
        f"{name}.{kind}"
        for name in ("curves_cells", "curves_images", "curves_seconds", "penalty")
        for kind in ("png", "svg")
    }
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.width > 400
        else:
            assert "<svg" in path.read_text(encoding="utf-8")


def test_the_same_document_gives_the_same_files(tmp_path):
    document = made_up(("random", "foreground_random"))
    one, two = write_plots(document, tmp_path / "1"), write_plots(document, tmp_path / "2")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_one_seed_without_full_supervision_still_draws(tmp_path):
    document = made_up(seeds=1)
    document = summarise({"full": None, "strategies": document["strategies"]})
    assert not any("penalty" in path.name for path in write_plots(document, tmp_path))
    assert "not reached" in table(document)
    assert "Note: full supervision was not measured" in table(document)


def test_the_table_holds_the_figures_best_first():
    document = made_up()
    text = table(document)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    columns = rows[0].count("|")
    assert all(row.count("|") == columns for row in rows)
    best = max(document["strategies"], key=lambda name: document["strategies"][name]["aubc_cells"])
    assert rows[2].startswith(f"| {best} |")
    entry = document["strategies"]["celloop"]
    assert f"{entry['aubc_cells']:.3f} ± " in text
    assert f"{entry['versus']['foreground_random']['aubc_cells_pair']['ap']['difference']:+.3f}" in text
    assert text.count("full supervision 0.") == 2


def test_a_strategy_without_an_area_goes_last():
    document = made_up()
    document["strategies"]["random"]["aubc_cells"] = None
    document["strategies"]["random"]["aubc"]["cells"]["ap"]["mean"] = None
    rows = [line for line in table(document).splitlines() if line.startswith("| ")]
    assert rows[5].startswith("| random | 5 | - |")


@pytest.mark.parametrize("seeds", [2, 5])
def test_seeds_are_counted(seeds):
    assert f"| celloop | {seeds} |" in table(made_up(seeds=seeds))


def test_the_legend_counts_seeds_upwards_and_tells_nine_strategies_apart(tmp_path):
    document = made_up([f"s{i}" for i in range(9)], seeds=10)
    document["strategies"]["s8"]["seeds"] = document["strategies"]["s8"]["seeds"][:6]
    axes = _curves(summarise(document), "cells").axes[0]
    legend = axes.get_legend()
    assert legend.get_title().get_text() == "mean ± sd, 6 to 10 seeds"
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()[:9]}
    assert len(looks) == 9
    alike = _curves(made_up(("random", "celloop"), seeds=3), "cells").axes[0].get_legend()
    assert alike.get_title().get_text() == "mean ± sd, 3 seeds"
