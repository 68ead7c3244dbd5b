"""Merging the cells of overlapping windows: 5,000 cells of a 4096 x 4096 image from windows of 512, overlap 128."""

from functools import partial

import cv2
import numpy as np
from harness import peak_mb, report, time_ms

from loop.data.preprocess import Window, tiles
from loop.metrics.matching import iou_matrix
from loop.models.dihedral import TRANSFORMS, apply_instances, invert_instances
from loop.models.stitch import fuse, merge_windows
from loop.rings import crop_mask
from loop.types import BoolArray, Instances

SIDE, CELLS, TILE, OVERLAP = 4096, 5000, 512, 128


def ellipses(rng: np.random.Generator, side: int, n: int) -> Instances:
    """Cells of 10 to 25 px half axes anywhere in a square image; one in fifty is 200 px long. They may overlap."""
    boxes: list[tuple[int, int, int, int]] = []
    masks: list[BoolArray] = []
    while len(masks) < n:
        axes = (100, 8) if len(masks) % 50 == 0 else tuple(rng.integers(10, 26, 2).tolist())
        reach = max(axes) + 1
        x, y = rng.integers(0, side, 2).tolist()
        stamp = np.zeros((2 * reach + 1, 2 * reach + 1), np.uint8)
        cv2.ellipse(stamp, (reach, reach), axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        left, top = max(reach - x, 0), max(reach - y, 0)
        crop = crop_mask(stamp[top : reach + side - y, left : reach + side - x].astype(bool))
        if crop is not None:
            dx, dy = x - reach + left, y - reach + top
            x0, y0, x1, y1 = crop.box_xyxy
            boxes.append((x0 + dx, y0 + dy, x1 + dx, y1 + dy))
            masks.append(crop.mask)
    return Instances.build((side, side), boxes, masks, scores=rng.random(n, np.float32))


def cut(cells: Instances, window: Window) -> Instances:
    """The cells as far as they lie in a window, in its coordinates."""
    frame = np.array([window.x0, window.y0, window.x1, window.y1], np.int32)
    low = np.maximum(cells.boxes_xyxy[:, :2], frame[:2])
    high = np.minimum(cells.boxes_xyxy[:, 2:], frame[2:])
    boxes, masks, kept = [], [], []
    for i in np.flatnonzero((low < high).all(axis=1)).tolist():
        x, y = cells.boxes_xyxy[i, :2].tolist()
        (x0, y0), (x1, y1) = low[i].tolist(), high[i].tolist()
        part = cells.masks[i][y0 - y : y1 - y, x0 - x : x1 - x]
        if part.any():
            boxes.append((x0 - window.x0, y0 - window.y0, x1 - window.x0, y1 - window.y0))
            masks.append(part)
            kept.append(i)
    shape = (window.y1 - window.y0, window.x1 - window.x0)
    return Instances.build(shape, boxes, masks, scores=cells.scores[kept])


def main() -> None:
    """Measure and print one JSON line each."""
    rng = np.random.default_rng(0)
    truth = ellipses(rng, SIDE, CELLS)
    parts = [(window, cut(truth, window)) for window in tiles((SIDE, SIDE), TILE, OVERLAP)]

    def merge() -> Instances:
        return merge_windows((SIDE, SIDE), parts)

    merged = merge()
    report(
        f"merge_windows, {CELLS} cells of a {SIDE} x {SIDE} image from windows of {TILE}, overlap {OVERLAP}",
        **time_ms(merge, 10),
        windows=len(parts),
        pieces=sum(len(part) for _, part in parts),
        cells=len(merged),
        cells_as_the_true_ones=int(np.count_nonzero(iou_matrix(merged, truth).max(axis=1) == 1)),
        peak_mb=peak_mb(merge),
    )
    for what, cells, repeats in (("a window of 512", cut(truth, parts[0][0]), 20), ("the whole image", truth, 2)):
        passes = [invert_instances(k, apply_instances(k, cells)) for k in TRANSFORMS]
        times = time_ms(partial(fuse, passes), repeats)
        report(f"fuse, {len(passes)} passes over {what}", **times, cells=len(cells))


if __name__ == "__main__":
    main()
