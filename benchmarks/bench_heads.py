"""Table B: what SEU-Net's heads find pixel by pixel on synthetic brightfield images (thesis tables 5.1 to 5.3).

Each row trains one network from scratch for --minutes on the same images of loop/data/microscope.py. Pixels of all
test images are pooled: accuracy, precision, recall, F1 and IoU of cytoplasm (head `interior`) and nuclei above a
probability of 0.5, and of overlap above 0.3. One JSON line a row.

The rows *_head(s) have a decoder for each head, 4_heads_shared one for all. The rows overlap_* have the heads interior
and overlap; the map of the row scales the overlap's target (eq. 4.5), or with --overlap-use loss the loss (eq. 5.1).

    python benchmarks/bench_heads.py --minutes 5
    python benchmarks/bench_heads.py --minutes 5 --rows overlap_v4 --overlap-use loss
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import report
from training_runs import (
    SYNTHETIC,
    Draw,
    add_arguments,
    add_synthetic_arguments,
    chosen_rows,
    rounded,
    settings,
    synthetic_draw,
    train_row,
)

from loop.data.folder import read_sample
from loop.data.store import read_image
from loop.data.targets import targets
from loop.masks import to_layers
from loop.metrics.pixel import PixelCounts, pixel_counts, pixel_scores
from loop.models.segmenter import Segmenter
from loop.types import ImageRef

THRESHOLDS = {"interior": 0.5, "nuclei": 0.5, "overlap": 0.3}
THESIS_NAMES = {"interior": "cytoplasm", "nuclei": "nuclei", "overlap": "overlap"}
MAPS = ("none", "v0", "v1", "v2", "v3", "v4")


def _heads(*heads: str, decoders: str = "decoupled") -> dict[str, Any]:
    return {"model.heads": list(heads), "model.decoders": decoders}


ROWS: dict[str, dict[str, Any]] = {
    "1_head": _heads("interior"),
    "2_heads": _heads("interior", "nuclei"),
    "3_heads": _heads("interior", "border", "background"),
    "4_heads": _heads("interior", "nuclei", "border", "background"),
    "4_heads_shared": _heads("interior", "nuclei", "border", "background", decoders="shared"),
    **{f"overlap_{kind}": {**_heads("interior", "overlap"), "train.overlap_map": kind} for kind in MAPS},
}


def measure_pixels(segmenter: Segmenter, test: Sequence[ImageRef]) -> dict[str, dict[str, float]]:
    """The five figures of each head that the table asks for, over the pixels of all test images."""
    heads = [head for head in segmenter.heads if head in THRESHOLDS]
    counts: dict[str, list[PixelCounts]] = {head: [] for head in heads}
    for ref in test:
        sample = read_sample(ref)
        nuclei = to_layers(sample.nuclei) if sample.nuclei is not None else None
        true = targets(to_layers(sample.instances), heads, nuclei)
        found = segmenter.head_maps(read_image(ref.path).pixels)
        for head, mask in zip(heads, true, strict=True):
            counts[head].append(pixel_counts(found[head] > THRESHOLDS[head], np.asarray(mask > 0)))
    return {THESIS_NAMES[head]: pixel_scores(found) for head, found in counts.items()}


def measure(row: str, draw: Draw, given: argparse.Namespace) -> None:
    """One JSON line of a row; a seed, a budget and images like those of the others."""
    changes = {**SYNTHETIC, **ROWS[row], "train.overlap_use": given.overlap_use}
    run = train_row(row, settings("seu_net", given, changes), draw, given, choose=False)
    figures = measure_pixels(run.segmenter, draw.test)
    report("heads", **run.facts, overlap_use=given.overlap_use, n_images=len(draw.test), **rounded(figures))


def main() -> None:
    """Prints one JSON line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"comma between; all without it: {', '.join(ROWS)}")
    parser.add_argument("--overlap-use", choices=("target", "loss"), default="target", help="eq. 4.5 or eq. 5.1")
    add_synthetic_arguments(parser)
    add_arguments(parser, minutes=5.0)
    given = parser.parse_args()
    rows = chosen_rows(given.rows, list(ROWS), parser)
    with synthetic_draw(given) as draw:
        for row in rows:
            measure(row, draw, given)


if __name__ == "__main__":
    main()
