"""Where cells are likely to lie on each other: probability maps that guide an overlap head while it learns.

Every map is 0.1 + 0.9 g with g in [0, 1]. r is the median over the cells of sqrt(area / pi); all distances are
Euclidean, between pixel centres.

v0: inside a cell g is the distance to its nucleus over the largest such distance in the cell, at several cells the
    largest; 0 at all nuclei and outside of cells. A nucleus belongs to the cell that holds most of it; a cell
    without one is measured from its deepest pixel.
v1: g = max(0, 1 - d / 2r) with d the distance to the second nearest nucleus, in and outside of cells.
v2: g = max(0, 1 - d / r) with d the distance to the nearest pixel that two cells hold.
v3: the larger of v1 and v2.
v4: inside cells g = max(0, 1 - log(1 + d) / log(1 + r)) with d the distance to the second nearest cell border, and
    d = 0 where two cells hold the pixel; a border is the outermost pixels of a cell, the image's edge is none.
    Outside of cells g = 0.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import cv2
import numpy as np

from loop.errors import ConfigError, LabelError, ShapeError
from loop.types import BoolArray, FloatArray, Instances

OverlapMap = Literal["v0", "v1", "v2", "v3", "v4"]

FLOOR = 0.1  # the thesis's value of the background; here the lowest value of every map

_Place = tuple[slice, slice]


def overlap_map(kind: OverlapMap, instances: Instances, nuclei: Instances | None = None) -> FloatArray:
    """How likely each pixel belongs to two cells at once, from 0.1 (nothing speaks for it) to 1.

    The formulas of the five maps stand at the top of this file.

    Without instances every map is 0.1 everywhere. One cell alone gives 0.1 everywhere but for v0. Cost: one distance
    transform a cell, on its box widened by what its influence reaches, and one full-frame transform for v2 and v3.

    Args:
        kind: which map.
        instances: the cells; they may overlap.
        nuclei: the nuclei of the same image, in any order; only v0, v1 and v3 look at them.

    Returns:
        (H, W) float32 in [0.1, 1].

    Raises:
        ConfigError: no such map.
        LabelError: the map needs nuclei and there are none given.
        ShapeError: the nuclei are of another image size.

    Source: Prytula 2023, sections 4.3 and 5.4, eq. 4.3 and 4.4, figure 5.2. Differs: the text maximises over cells
    without saying how a distance becomes a probability; a maximum over each cell's own probability alone would be
    high around a cell that lies alone. Here a cell's probability at a pixel is the smaller of its own influence
    (falling with the distance) and the strongest influence of any other cell, and its maximum over the cells is the
    influence of the second nearest: highest where cells are near each other. Distances are from a nucleus's outline,
    not from its centre. 0.1 is the floor everywhere, so that eq. 5.1 leaves no pixel without a loss.
    """
    if kind not in get_args(OverlapMap):
        raise ConfigError(f"overlap map {kind!r}; expected one of {', '.join(get_args(OverlapMap))}")
    if kind in ("v0", "v1", "v3"):
        nuclei = _checked(kind, instances, nuclei)
    places = list(_places(instances))
    share: FloatArray = np.zeros(instances.shape, np.float32)
    if places:
        radius = float(np.median([np.sqrt(np.count_nonzero(mask) / np.pi) for _, mask in places]))
        if nuclei is not None and kind == "v0":
            _from_own_nucleus(share, instances, nuclei)
        if nuclei is not None and kind in ("v1", "v3"):
            share = np.maximum(0, 1 - _second_nearest(nuclei, 2 * radius, borders=False) / np.float32(2 * radius))
        if kind in ("v2", "v3"):
            relaxed = 1 - _distance(overlap_mask(instances)) / np.float32(radius)
            share = np.maximum(share, relaxed)
        if kind == "v4":
            share = _from_borders(instances, places, radius)
    return (FLOOR + (1 - FLOOR) * share).astype(np.float32)


def overlap_mask(instances: Instances) -> BoolArray:
    """(H, W) bool: the pixels that two cells or more hold."""
    once = np.zeros(instances.shape, np.bool_)
    twice = np.zeros(instances.shape, np.bool_)
    for place, mask in _places(instances):
        twice[place] |= once[place] & mask
        once[place] |= mask
    return twice


def _checked(kind: str, instances: Instances, nuclei: Instances | None) -> Instances:
    if nuclei is None:
        raise LabelError(
            f"overlap map {kind} of image {instances.image_id!r} is made from nuclei and none are given; "
            "label the nuclei or choose v2 or v4"
        )
    if nuclei.shape != instances.shape:
        raise ShapeError(f"nuclei of {nuclei.shape} for cells of {instances.shape}; both must be of the same image")
    return nuclei


def _places(instances: Instances) -> Iterator[tuple[_Place, BoolArray]]:
    """The box of each instance that has a pixel, as slices, and its mask."""
    for (x0, y0, x1, y1), mask in zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True):
        if mask.any():
            yield (slice(y0, y1), slice(x0, x1)), mask


def _distance(mask: BoolArray) -> FloatArray:
    """The distance of each pixel to the nearest of the mask, px; infinite where it has none."""
    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(distance, np.float32)


def _border(mask: BoolArray) -> BoolArray:
    """The pixels of a box's mask with a 4-neighbour outside; `mask` has a rim wherever the image goes on."""
    kernel = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    border: BoolArray = mask & (cv2.erode(mask.astype(np.uint8), kernel) == 0)
    return border


def _second_nearest(instances: Instances, reach: float, *, borders: bool) -> FloatArray:
    """The distance of each pixel to the second nearest instance (or border of one), px; infinite beyond `reach`.

    Within `reach` of the second nearest both are nearer than `reach`, so the boxes widened by it hold all that counts.
    """
    first = np.full(instances.shape, np.inf, np.float32)
    second = np.full(instances.shape, np.inf, np.float32)
    margin = int(np.ceil(reach)) + 1
    height, width = instances.shape
    for (rows, columns), mask in _places(instances):
        top, left = max(rows.start - margin, 0), max(columns.start - margin, 0)
        window = np.s_[top : min(rows.stop + margin, height), left : min(columns.stop + margin, width)]
        nearest, next_one = first[window], second[window]
        wide = np.zeros(nearest.shape, np.bool_)
        wide[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = mask
        distance = _distance(_border(wide) if borders else wide)
        np.minimum(next_one, np.maximum(nearest, distance), out=next_one)
        np.minimum(nearest, distance, out=nearest)
    return second


def _from_borders(instances: Instances, places: list[tuple[_Place, BoolArray]], radius: float) -> FloatArray:
    distance = _second_nearest(instances, radius, borders=True)
    distance[overlap_mask(instances)] = 0
    share = np.maximum(0, 1 - np.log1p(distance) / np.float32(np.log1p(radius)))
    inside = np.zeros(instances.shape, np.bool_)
    for place, mask in places:
        inside[place] |= mask
    return np.where(inside, share, np.float32(0))


def _from_own_nucleus(share: FloatArray, instances: Instances, nuclei: Instances) -> None:
    """Raises `share` (H, W), in place, to each cell's distance from its nucleus; 0 at all nuclei."""
    owned = _owned(instances, nuclei)
    for i, (box, mask) in enumerate(zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True)):
        if not mask.any():
            continue
        x0, y0, x1, y1 = box
        seed = np.zeros((y1 - y0, x1 - x0), np.bool_)
        for k in owned.get(i, []):
            seed |= _cut(nuclei, k, box)
        seed &= mask
        if not seed.any():
            depth = np.asarray(
                cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            )[1:-1, 1:-1]
            seed.flat[np.argmax(depth)] = True
        distance = np.where(mask, _distance(seed), np.float32(0))
        window = share[y0:y1, x0:x1]
        np.maximum(window, distance / max(float(distance.max()), 1.0), out=window)
    for place, mask in _places(nuclei):
        share[place][mask] = 0


def _owned(instances: Instances, nuclei: Instances) -> dict[int, list[int]]:
    """The nuclei of each cell: a nucleus belongs to the cell that holds most of it, and to none if no cell does.

    Of cells that hold as much it is the one at its own place in the order, else the first.
    """
    owned: dict[int, list[int]] = {}
    boxes = instances.boxes_xyxy
    for k, (box, mask) in enumerate(zip(nuclei.boxes_xyxy.tolist(), nuclei.masks, strict=True)):
        x0, y0, x1, y1 = box
        near = np.flatnonzero((boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0))
        held = {int(i): int(np.count_nonzero(_cut(instances, int(i), box) & mask)) for i in near}
        most = max(held.values(), default=0)
        if most:
            best = k if held.get(k) == most else next(i for i, count in held.items() if count == most)
            owned.setdefault(best, []).append(k)
    return owned


def _cut(instances: Instances, index: int, box_xyxy: list[int]) -> BoolArray:
    """The part of one instance inside a box, as a mask of the box's size."""
    x0, y0, x1, y1 = box_xyxy
    a0, b0, a1, b1 = (int(v) for v in instances.boxes_xyxy[index])
    cut = np.zeros((y1 - y0, x1 - x0), np.bool_)
    left, right, top, bottom = max(x0, a0), min(x1, a1), max(y0, b0), min(y1, b1)
    if left < right and top < bottom:
        cut[top - y0 : bottom - y0, left - x0 : right - x0] = instances.masks[index][
            top - b0 : bottom - b0, left - a0 : right - a0
        ]
    return cut
