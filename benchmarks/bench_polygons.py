"""300 cells at 1080 x 1080 to polygons and back, beside the same done naively on full frames, in the same run.

The naive way is what one writes first: for each cell a full-size mask, skimage's find_contours and
approximate_polygon, then grid_points_in_poly; and the same with OpenCV's findContours, approxPolyDP and fillPoly.
scikit-image takes so long that it gets 10 of the cells, and its time is scaled. Mean IoUs stand in the line, so that
speed is not bought with shape.

A second line is of the budget of corners (publish.max_points): corners and IoU before and after, for 100, 300 and 1000
such cells, at the default and with no corner more than the least IoU asks for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from harness import peak_mb, report, time_ms
from skimage import measure

from loop import masks
from loop.config import PublishConfig
from loop.rings import Outline, fewer_corners, outlines
from loop.types import BoolArray, Instances

SIDE = 1080
CELLS = 300
TOLERANCE_PX = 0.5
REPEATS = 9
NAIVE_REPEATS = 5
SKIMAGE_CELLS = 10


def draw(rng: np.random.Generator, n: int = CELLS, side: int = SIDE) -> Instances:
    """Wavy ellipses of 8 to 22 px radius on a jittered grid, some touching, some cut by the border."""
    labels = np.zeros((side, side), np.int32)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    per_row = int(np.ceil(np.sqrt(n)))
    pitch = side / per_row
    for i in range(n):
        cy, cx = (np.array(divmod(i, per_row)) + 0.5) * pitch + rng.uniform(-12, 12, 2)
        ry, rx = rng.uniform(8, 22, 2)
        y0, y1 = max(int(cy) - 30, 0), min(int(cy) + 31, side)
        x0, x1 = max(int(cx) - 30, 0), min(int(cx) + 31, side)
        dy, dx = (rows[y0:y1, x0:x1] - cy) / ry, (columns[y0:y1, x0:x1] - cx) / rx
        wave = 1 + 0.1 * np.sin(rng.integers(2, 6) * np.arctan2(dy, dx) + rng.uniform(0, 6))
        labels[y0:y1, x0:x1][np.hypot(dy, dx) <= wave] = i + 1
    return masks.from_label_image(labels)


def ours(cells: Instances) -> Instances:
    """The product's way: crops only."""
    return masks.from_polygons(masks.to_polygons(cells, TOLERANCE_PX), cells.shape)


def naive_skimage(cells: Instances) -> list[BoolArray]:
    """Full frames through scikit-image."""
    back = []
    for i in range(len(cells)):
        contours = measure.find_contours(_frame(cells, i, 1), 0.5)
        ring = measure.approximate_polygon(max(contours, key=len), TOLERANCE_PX) - 1
        back.append(measure.grid_points_in_poly(cells.shape, ring))
    return back


def naive_cv2(cells: Instances) -> list[npt.NDArray[np.uint8]]:
    """Full frames through OpenCV."""
    back = []
    for i in range(len(cells)):
        contours, _ = cv2.findContours(_frame(cells, i, 0), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        ring = cv2.approxPolyDP(max(contours, key=cv2.contourArea), TOLERANCE_PX, True)
        back.append(cv2.fillPoly(np.zeros(cells.shape, np.uint8), [ring], 1))
    return back


def _frame(cells: Instances, i: int, pad: int) -> npt.NDArray[np.uint8]:
    full = np.zeros(cells.shape, np.uint8)
    x0, y0, x1, y1 = cells.boxes_xyxy[i]
    full[y0:y1, x0:x1] = cells.masks[i]
    return np.pad(full, pad) if pad else full


def mean_iou(cells: Instances, back: Sequence[npt.NDArray[Any]]) -> float:
    """Mean IoU of full frames with the cells they came from."""
    values = []
    for i, full in enumerate(back):
        before = _frame(cells, i, 0) > 0
        values.append((before & (full > 0)).sum() / (before | (full > 0)).sum())
    return round(float(np.mean(values)), 4)


def _shown(rings: Sequence[Outline]) -> dict[str, float]:
    ious = [ring.iou for ring in rings]
    figures = {"mean_iou": round(float(np.mean(ious)), 4), "least_iou": round(min(ious), 4)}
    return {"corners": sum(len(ring.points_xy) for ring in rings), **figures}


def budgets(n: int) -> dict[str, Any]:
    """Corners and IoU of n cells, as dense as 300 at 1080 px, under several budgets, and the time that they take."""
    cells = draw(np.random.default_rng(0), n, round(SIDE * (n / CELLS) ** 0.5))
    rings = outlines(cells.masks, TOLERANCE_PX)
    found: dict[str, Any] = {"cells": len(cells), "image": list(cells.shape), "no_budget": _shown(rings)}
    found["outlines_ms_p50"] = time_ms(lambda: outlines(cells.masks, TOLERANCE_PX), REPEATS)["ms_p50"]
    for name, budget in (("default", PublishConfig().max_points), ("least", 0)):

        def thin(budget: int = budget) -> list[Outline]:
            return fewer_corners(rings, cells.masks, TOLERANCE_PX, budget)

        found[name] = {"budget": budget, **_shown(thin()), "more_ms_p50": time_ms(thin, NAIVE_REPEATS)["ms_p50"]}
    return found


def main() -> None:
    """Measure and print two lines."""
    cells = draw(np.random.default_rng(0))
    few = cells.take(range(SKIMAGE_CELLS))
    rings = masks.to_polygons(cells, TOLERANCE_PX)
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "ours": (lambda: ours(cells), REPEATS),
        "to_polygons": (lambda: masks.to_polygons(cells, TOLERANCE_PX), REPEATS),
        "from_polygons": (lambda: masks.from_polygons(rings, cells.shape), REPEATS),
        "naive_cv2": (lambda: naive_cv2(cells), NAIVE_REPEATS),
        "naive_skimage": (lambda: naive_skimage(few), NAIVE_REPEATS),
    }
    timed = {name: time_ms(fn, repeats) for name, (fn, repeats) in ways.items()}
    skimage_ms = timed["naive_skimage"]["ms_p50"] * CELLS / SKIMAGE_CELLS
    report(
        "polygons_round_trip",
        cells=len(cells),
        image=[SIDE, SIDE],
        tolerance_px=TOLERANCE_PX,
        points_mean=round(float(np.mean([len(ring) for ring in rings])), 1),
        **timed["ours"],
        peak_mb=peak_mb(lambda: ours(cells)),
        mean_iou=mean_iou(cells, list(masks.to_dense(ours(cells)))),
        to_polygons=timed["to_polygons"],
        from_polygons=timed["from_polygons"],
        naive_cv2={
            **timed["naive_cv2"],
            "peak_mb": peak_mb(lambda: naive_cv2(cells)),
            "mean_iou": mean_iou(cells, naive_cv2(cells)),
        },
        naive_skimage={"ms_p50": round(skimage_ms, 1), "mean_iou": mean_iou(few, naive_skimage(few))},
        times_faster_than_cv2=round(timed["naive_cv2"]["ms_p50"] / timed["ours"]["ms_p50"], 2),
        times_faster_than_skimage=round(skimage_ms / timed["ours"]["ms_p50"], 1),
    )
    report("corner_budget", tolerance_px=TOLERANCE_PX, by_cells=[budgets(n) for n in (100, 300, 1000)])


if __name__ == "__main__":
    main()
