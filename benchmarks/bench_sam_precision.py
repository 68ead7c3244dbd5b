"""What half precision does to Segment Anything's masks: each against those of fp32, on labelled images.

    python benchmarks/bench_sam_precision.py --checkpoint FILE [--data examples/dsb2018-mini] [--images 12]

Each labelled cell is asked for by one point, its pixel farthest from its edge. Of the three masks the one counts whose
score is best in fp32. `half_embedding`: the embedding goes through float16, as it is stored; `bf16_encoder`,
`bf16_decoder`, `bf16`: that half of the network, or both, in bfloat16. Of each: the IoU with the mask of fp32 (mean,
5th percentile, share of cells with 0.98 or more; two empty masks agree), and `truth`, the mean IoU with the labelled
cell. Prints one JSON line.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import ROOT, report

from loop.data.folder import open_folder, read_labels
from loop.data.intensity import stretch
from loop.data.store import read_image
from loop.masks import to_dense
from loop.models.sam import Answers, Embedding, Sam
from loop.models.sam_weights import load_sam
from loop.pseudo.sam import peaks
from loop.rings import Crop
from loop.types import BoolArray, ImageRef


def full(crop: Crop | None, shape: tuple[int, int]) -> BoolArray:
    """The mask in its image."""
    mask = np.zeros(shape, np.bool_)
    if crop is not None:
        x0, y0, x1, y1 = crop.box_xyxy
        mask[y0:y1, x0:x1] = crop.mask
    return mask


def iou(one: BoolArray, other: BoolArray) -> float:
    """1 where both are empty."""
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else 1.0


def measure(sams: dict[str, Sam], ref: ImageRef, figures: dict[str, list[tuple[float, float]]]) -> None:
    """Adds to `figures` the IoU with fp32 and with the truth, for each cell of an image."""
    exact, half = sams["fp32"], sams["bf16"]
    cells = read_labels(ref)
    if not len(cells):
        return
    image = stretch(read_image(ref.path).pixels, 3, dark_background=False)
    points: npt.NDArray[np.float64] = peaks(cells)[:, None]
    plain, rough = exact.encode(image), half.encode(image)
    ways: dict[str, tuple[Sam, Embedding]] = {
        "fp32": (exact, plain),
        "half_embedding": (exact, exact.embedding(plain.to_arrays())),
        "bf16_encoder": (exact, rough),
        "bf16_decoder": (half, plain),
        "bf16": (half, rough),
    }
    answers: dict[str, Answers] = {name: sam.decode(seen, points=points) for name, (sam, seen) in ways.items()}
    best = answers["fp32"].scores.argmax(axis=1)
    for i, truth in enumerate(to_dense(cells)):
        masks = {name: full(answer.crops[i][best[i]], cells.shape) for name, answer in answers.items()}
        for name, mask in masks.items():
            figures.setdefault(name, []).append((iou(mask, masks["fp32"]), iou(mask, truth)))


def summary(figures: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Figures of one way."""
    with_exact, with_truth = np.array(figures).T
    return {
        "iou": round(float(with_exact.mean()), 4),
        "iou_p5": round(float(np.percentile(with_exact, 5)), 4),
        "share_0.98": round(float((with_exact >= 0.98).mean()), 3),
        "truth": round(float(with_truth.mean()), 4),
    }


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="trained weights; random ones would compare noise")
    parser.add_argument("--kind", choices=("vit_b", "vit_l", "vit_h"), default="vit_b")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "dsb2018-mini")
    parser.add_argument("--images", type=int, default=12)
    arguments = parser.parse_args()
    sams = {p: load_sam(arguments.kind, arguments.checkpoint, precision=p) for p in ("fp32", "bf16")}
    images = [ref for ref in open_folder(arguments.data).images if ref.label_path is not None]
    chosen = np.random.default_rng(0).permutation(len(images))[: arguments.images]
    figures: dict[str, list[tuple[float, float]]] = {}
    for i in chosen.tolist():
        measure(sams, images[i], figures)
    report(
        "sam_precision",
        weights=sams["fp32"].version,
        images=len(chosen),
        cells=len(figures["fp32"]),
        **{name: summary(pairs) for name, pairs in figures.items()},
    )


if __name__ == "__main__":
    main()
