"""Overlap maps of 100 cells at 1024 x 1024, beside the same with one full-frame transform a cell, in the same run.

    python benchmarks/bench_overlap_maps.py

The plain way takes the distance of every pixel to every cell's border (v4) or nucleus (v1), once with scipy's exact
transform, as one writes it first, and once with OpenCV's exact transform, which the product uses on its crops.
`difference` is the largest difference of a map from the plain way's. Prints one JSON line.
"""

from collections.abc import Callable
from typing import Any, get_args

import cv2
import numpy as np
from harness import peak_mb, report, time_ms
from scipy import ndimage

from loop.data.overlap_maps import FLOOR, OverlapMap, overlap_map
from loop.masks import from_label_image, to_dense
from loop.types import BoolArray, FloatArray, Instances

SIDE = 1024
CELLS = 100
REPEATS = 9
PLAIN_REPEATS = 5


def draw(rng: np.random.Generator) -> tuple[Instances, Instances]:
    """100 wavy ellipses of 30 to 52 px radius on a jittered grid, so that many overlap, and a nucleus in each."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    per_row = int(np.ceil(np.sqrt(CELLS)))
    pitch = SIDE / per_row
    drawn: tuple[list[Instances], list[Instances]] = ([], [])
    for i in range(CELLS):
        cy, cx = (np.array(divmod(i, per_row)) + 0.5) * pitch + rng.uniform(-15, 15, 2)
        dy, dx = (rows - cy) / rng.uniform(30, 52), (columns - cx) / rng.uniform(30, 52)
        wave = 1 + 0.1 * np.sin(rng.integers(2, 6) * np.arctan2(dy, dx) + rng.uniform(0, 6))
        for group, part in zip(drawn, (1.0, 0.35), strict=True):
            group.append(from_label_image((np.hypot(dy, dx) <= part * wave).astype(np.int32)))
    cells, nuclei = (_joined(group) for group in drawn)
    return cells, nuclei


def _joined(parts: list[Instances]) -> Instances:
    boxes = np.concatenate([part.boxes_xyxy for part in parts])
    return Instances.build((SIDE, SIDE), boxes, [mask for part in parts for mask in part.masks])


def scipy_distance(mask: BoolArray) -> FloatArray:
    """The distance of every pixel to the mask."""
    return ndimage.distance_transform_edt(~mask).astype(np.float32)


def cv2_distance(mask: BoolArray) -> FloatArray:
    """The same with OpenCV."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def plain(kind: str, cells: Instances, nuclei: Instances, distance: Callable[[BoolArray], FloatArray]) -> FloatArray:
    """v1 or v4 from one full-frame transform a cell."""
    masks = to_dense(cells)
    radius = float(np.median([np.sqrt(mask.sum() / np.pi) for mask in masks]))
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    first = np.full(cells.shape, np.inf, np.float32)
    second = first.copy()
    for seed in to_dense(nuclei) if kind == "v1" else masks:
        d = distance(seed if kind == "v1" else seed & (cv2.erode(seed.astype(np.uint8), cross) == 0))
        np.minimum(second, np.maximum(first, d), out=second)
        np.minimum(first, d, out=first)
    if kind == "v1":
        share = np.maximum(0, 1 - second / (2 * radius))
    else:
        count = masks.sum(axis=0)
        second[count > 1] = 0
        share = np.where(count > 0, np.maximum(0, 1 - np.log1p(second) / np.log1p(radius)), 0)
    return FLOOR + (1 - FLOOR) * share


def main() -> None:
    """Measure and print one line."""
    cells, nuclei = draw(np.random.default_rng(0))
    figures: dict[str, Any] = {}
    for kind in get_args(OverlapMap):
        figures[kind] = time_ms(lambda kind=kind: overlap_map(kind, cells, nuclei), REPEATS)
        figures[kind]["peak_mb"] = peak_mb(lambda kind=kind: overlap_map(kind, cells, nuclei))
    for kind in ("v1", "v4"):
        ours = figures[kind]
        for name, distance in (("scipy", scipy_distance), ("cv2", cv2_distance)):
            way = time_ms(lambda kind=kind, distance=distance: plain(kind, cells, nuclei, distance), PLAIN_REPEATS)
            ours[f"plain_{name}_ms_p50"] = way["ms_p50"]
            ours[f"times_faster_than_{name}"] = round(way["ms_p50"] / ours["ms_p50"], 1)
        apart = np.abs(overlap_map(kind, cells, nuclei) - plain(kind, cells, nuclei, scipy_distance))
        ours["difference"] = float(f"{apart.max():.2g}")
    report("overlap_maps", cells=len(cells), image=[SIDE, SIDE], **figures)


if __name__ == "__main__":
    main()
