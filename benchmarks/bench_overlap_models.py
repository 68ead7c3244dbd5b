"""Table C: overlapping cells, found one by one or parted by watershed (thesis tables 5.7, 5.9 and 5.10).

Each row trains one network from scratch for --minutes on the same synthetic brightfield images, whose labels overlap.
SEU-Net with four decoupled heads and watershed cannot give a pixel to two cells; SparseSEU-Net can. All figures of
`celloop evaluate` against the overlapping truth, one JSON line a row. Thresholds are fitted on the validation images.

    python benchmarks/bench_overlap_models.py --minutes 10
    python benchmarks/bench_overlap_models.py --minutes 10 --rows sparse_single,sparse_multi --seed 1
"""

import argparse
from typing import Any

from harness import report
from training_runs import (
    SYNTHETIC,
    Draw,
    add_arguments,
    add_synthetic_arguments,
    chosen_rows,
    measure_cells,
    settings,
    synthetic_draw,
    train_row,
)

SINGLE = {"model.levels": "single"}
MULTI = {"model.levels": "multi"}
HEAD = {"model.overlap": True}
MAP = {"model.overlap": True, "train.overlap_map": "v4"}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "seu_net_watershed": (
        "seu_net",
        {"model.heads": ["interior", "nuclei", "border", "background"], "model.decoders": "decoupled"},
    ),
    "sparse_single": ("sparse_seu_net", SINGLE),
    "sparse_single_overlap": ("sparse_seu_net", {**SINGLE, **HEAD}),
    "sparse_single_overlap_map": ("sparse_seu_net", {**SINGLE, **MAP}),
    "sparse_multi": ("sparse_seu_net", MULTI),
    "sparse_multi_overlap": ("sparse_seu_net", {**MULTI, **HEAD}),
    "sparse_multi_overlap_map": ("sparse_seu_net", {**MULTI, **MAP}),
    "sparse_multi_objectness": ("sparse_seu_net", {**MULTI, "model.objectness": True}),
}


def measure(row: str, draw: Draw, given: argparse.Namespace) -> None:
    """One JSON line of a row; a seed, a budget and images like those of the others."""
    name, changes = ROWS[row]
    run = train_row(row, settings(name, given, {**SYNTHETIC, **changes}), draw, given)
    report("overlap_models", **run.facts, **measure_cells(run.segmenter, draw.test))


def main() -> None:
    """Prints one JSON line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"comma between; all without it: {', '.join(ROWS)}")
    add_synthetic_arguments(parser)
    add_arguments(parser, minutes=10.0)
    given = parser.parse_args()
    rows = chosen_rows(given.rows, list(ROWS), parser)
    with synthetic_draw(given) as draw:
        for row in rows:
            measure(row, draw, given)


if __name__ == "__main__":
    main()
