"""The outline of a mask as one ring of points, and a ring's pixels: the geometry under every polygon.

Frame of every ring: pixel (row r, column c) is the square [c, c+1] x [r, r+1], so an image reaches from 0 to W and from
0 to H, as in Label Studio, and the centre of a pixel lies at (c + 0.5, r + 0.5).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from loop.errors import ConfigError, NonFiniteError, ShapeError
from loop.types import BoolArray

PointArray = npt.NDArray[np.float64]

MIN_POLYGON_IOU = 0.97
_BATCH_PX = 2_000_000  # so many pixels of rings are filled at once: 16 MB of turns
_LEAST_TOLERANCE_PX, _STEP = 0.25, 2**0.5  # where thinning out corners begins, and how it goes on


class Crop(NamedTuple):
    """A mask cut to its box: x0, y0, x1, y1 px in the image (ends exclusive) and (y1 - y0, x1 - x0) bool, not empty."""

    box_xyxy: tuple[int, int, int, int]
    mask: BoolArray


class Outline(NamedTuple):
    """A cell as one ring: (K, 2) float64 x, y px, K >= 3, and the IoU of its filled ring with the cell's mask."""

    points_xy: PointArray
    iou: float


def outlines(masks: Sequence[BoolArray], tolerance_px: float) -> list[Outline]:
    """The outer ring of each mask's largest part, in the mask's own frame.

    The ring runs through the midpoints of the pixel edges that part the cell from the rest, which is the border at
    half coverage, and is then simplified. Where the filled ring would fall below IoU 0.97 with the mask it is
    simplified less, at last not at all; then it holds exactly the pixels of the largest part (8-connected) and its
    holes. What one ring cannot say is lost: holes are filled, other parts left out, and `iou` says how much that is.

    Args:
        masks: N arrays (h, w) bool, each with at least one pixel.
        tolerance_px: >= 0, how far the simplified ring may leave the exact one.

    Raises:
        ConfigError: the tolerance is negative.
        ShapeError: a mask is empty.
    """
    if not tolerance_px >= 0:
        raise ConfigError(f"tolerance_px={tolerance_px}; expected a number of pixels >= 0")
    exact = _trace(masks)
    found = [Outline(np.empty((0, 2)), 0.0)] * len(masks)
    left = list(range(len(masks)))
    for tolerance in dict.fromkeys((tolerance_px, tolerance_px / 2, tolerance_px / 4, 0.0)):
        tried = {i: cv2.approxPolyDP(exact[i], 2 * tolerance, True).reshape(-1, 2) / 2 for i in left}
        for i, outline in _measured(masks, tried).items():
            found[i] = outline
        left = [i for i in left if found[i].iou < MIN_POLYGON_IOU]
        if not left:
            break
    return found


def fewer_corners(
    rings: Sequence[Outline], masks: Sequence[BoolArray], tolerance_px: float, max_points: int
) -> list[Outline]:
    """The rings with at most so many corners in all, where the shapes allow it.

    The tolerance grows by half an octave a step until the corners are few enough; of a step's simpler rings those that
    lose least IoU for a corner saved are taken first, and no more than needed. A ring that would fall below IoU 0.97
    with its mask keeps the form that it had, as does one that lies below from the start; so there may remain more
    corners than asked for.

    Args:
        rings: of `outlines`.
        masks: their masks.
        tolerance_px: the one that they were made with.
        max_points: number of corners, >= 0.
    """
    found = list(rings)
    left = [i for i, ring in enumerate(rings) if ring.iou >= MIN_POLYGON_IOU]
    corners = sum(len(ring.points_xy) for ring in rings)
    tolerance = max(tolerance_px, _LEAST_TOLERANCE_PX)
    while left and corners > max_points:
        tolerance *= _STEP
        halves = {i: (2 * found[i].points_xy).astype(np.int32) for i in left}
        tried = {i: cv2.approxPolyDP(ring, 2 * tolerance, True).reshape(-1, 2) / 2 for i, ring in halves.items()}
        good = {i: ring for i, ring in _measured(masks, tried).items() if ring.iou >= MIN_POLYGON_IOU}
        saved = {i: len(found[i].points_xy) - len(ring.points_xy) for i, ring in good.items()}
        for i in sorted((i for i in good if saved[i]), key=lambda i: (found[i].iou - good[i].iou) / saved[i]):
            if corners <= max_points:
                break
            corners -= saved[i]
            found[i] = good[i]
        left = list(good)
    return found


def fill_rings(rings: Sequence[PointArray], shape: Sequence[int]) -> list[Crop | None]:
    """The pixels whose centres each ring encloses, None where it encloses none; see `from_polygons`.

    Args:
        rings: N arrays (K, 2) of x, y px, K >= 3.
        shape: (H, W) to clip to, px.

    Raises:
        ShapeError: a ring is not (K, 2) with K >= 3.
        NonFiniteError: a coordinate is NaN or infinite.
    """
    for i, ring in enumerate(rings):
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3:
            raise ShapeError(f"ring {i} has shape {ring.shape}; expected (K, 2) with at least 3 points")
    if not rings:
        return []
    counts = np.array([len(ring) for ring in rings])
    points = np.concatenate(rings, dtype=np.float64)
    owner = np.repeat(np.arange(len(rings)), counts)
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        raise NonFiniteError(f"ring {owner[~finite][0]} has the point {points[~finite][0]}; expected numbers")
    first = np.cumsum(counts) - counts
    following = np.roll(points, -1, axis=0)
    following[first + counts - 1] = points[first]
    # Columns and rows whose centres lie in [min, max): a centre on the ring itself counts on its top and left only.
    corners = np.hstack([np.minimum.reduceat(points, first), np.maximum.reduceat(points, first)])
    boxes = np.clip(np.ceil(corners - 0.5), 0, (shape[1], shape[0]) * 2).astype(np.int64)
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1])
    batch = (np.cumsum(areas) - areas) // _BATCH_PX
    crops: list[Crop | None] = []
    for k in np.unique(batch):
        edges = batch[owner] == k
        crops += _fill(points[edges], following[edges], owner[edges] - len(crops), boxes[batch == k])
    return crops


def crop_mask(mask: BoolArray, *, x0: int = 0) -> Crop | None:
    """The mask (h, w) bool cut to its pixels, None where it has none; its first column is column `x0` of the image."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return Crop((x0 + left, top, x0 + right, bottom), mask[top:bottom, left:right].copy())


def largest_part(mask: BoolArray) -> BoolArray:
    """The largest 8-connected part of a mask (h, w), the first of equals; an empty mask as it is."""
    n, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if n <= 2:
        return mask
    return np.asarray(parts == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def _fill(
    start: PointArray, end: PointArray, owner: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64]
) -> list[Crop | None]:
    """Fill rings given as edges (E, 2) to (E, 2), each of ring `owner` (E,), inside their `boxes` (N, 4)."""
    x0, y0, x1, y1 = boxes.T
    stride = x1 - x0 + 1
    size = stride * (y1 - y0)
    offset = np.cumsum(size) - size
    (xa, ya), (xb, yb) = start.T, end.T
    top = np.clip(np.ceil(np.minimum(ya, yb) - 0.5), y0[owner], y1[owner]).astype(np.int64)
    bottom = np.clip(np.ceil(np.maximum(ya, yb) - 0.5), y0[owner], y1[owner]).astype(np.int64)
    crossed = bottom - top
    edge = np.repeat(np.arange(len(xa)), crossed)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(crossed) - crossed - top, crossed)
    x = xa[edge] + (row + 0.5 - ya[edge]) * ((xb - xa)[edge] / (yb - ya)[edge])
    ring = owner[edge]
    column = np.clip(np.ceil(x - 0.5), x0[ring], x1[ring]).astype(np.int64) - x0[ring]
    # Every crossing changes the winding number of all centres to its right; its sign is the edge's direction. A row's
    # changes add up to nothing, so one running sum serves all rows of all rings.
    place = offset[ring] + (row - y0[ring]) * stride[ring] + column
    turns = np.bincount(place, weights=np.sign(yb - ya)[edge], minlength=int(size.sum())).astype(np.int32)
    winding = np.cumsum(turns, dtype=np.int32)  # ten times as fast as in float64
    inside = winding != 0
    crops: list[Crop | None] = []
    for (left, up, right, down), begin, length in zip(boxes.tolist(), offset, size, strict=True):
        mask = inside[begin : begin + length].reshape(down - up, right - left + 1)[:, :-1]
        crops.append(Crop((left, up, right, down), mask.copy()) if mask.any() else None)
    return crops


def _trace(masks: Sequence[BoolArray]) -> list[npt.NDArray[np.int32]]:
    """(K, 2) x, y of the exact ring of each mask's largest part, in half pixels."""
    found: list[npt.NDArray[np.int32]] = [np.empty((0, 2), np.int32)] * len(masks)
    for group in _of_like_width(masks):
        for i, ring in zip(group, _trace_together([masks[i] for i in group]), strict=True):
            found[i] = ring
    return found


def _of_like_width(masks: Sequence[BoolArray]) -> list[list[int]]:
    """The masks' indices in groups that fill one lattice well, at most twice as wide as the narrowest, and no more."""
    groups: list[list[int]] = []
    narrowest = rows = 0
    for i in sorted(range(len(masks)), key=lambda i: masks[i].shape[1]):
        height, width = masks[i].shape
        rows += height
        if not groups or width > 2 * narrowest or 4 * width * rows > _BATCH_PX:
            groups.append([])
            narrowest, rows = width, height
        groups[-1].append(i)
    return groups


def _trace_together(masks: Sequence[BoolArray]) -> list[npt.NDArray[np.int32]]:
    """`_trace` of masks that lie below one another in one lattice, a free row between them."""
    # Half-pixel lattice: pixel centres at odd places, corners at even ones, edge midpoints where one of both is odd.
    tops = np.cumsum([0] + [2 * len(mask) + 2 for mask in masks])
    lattice = np.zeros((tops[-1], 2 * max(mask.shape[1] for mask in masks) + 1), np.uint8)
    for mask, top in zip(masks, tops.tolist(), strict=False):
        lattice[top + 1 : top + 2 * mask.shape[0] : 2, 1 : 2 * mask.shape[1] : 2] = mask
    lattice = cv2.dilate(lattice, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(lattice, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    owners = np.searchsorted(tops, [contour[0, 0, 1] for contour in contours], side="right") - 1
    largest: dict[int, npt.NDArray[np.int32]] = {}
    for owner, contour in zip(owners.tolist(), contours, strict=True):
        other = largest.get(owner)
        if other is None or cv2.contourArea(contour) > cv2.contourArea(other):
            largest[owner] = contour
    for i, mask in enumerate(masks):
        if i not in largest:
            raise ShapeError(f"an empty mask {mask.shape} has no outline; drop it")
    rings = [largest[i] for i in range(len(masks))]
    points = np.concatenate(rings).reshape(-1, 2)
    between = ((points[:, 0] ^ points[:, 1]) & 1).astype(np.bool_)
    ends = np.cumsum(between)[np.cumsum([len(ring) for ring in rings]) - 1]
    midpoints = points[between]
    midpoints[:, 1] -= np.repeat(tops[:-1], np.diff(ends, prepend=0)).astype(np.int32)
    return [midpoints[begin:end] for begin, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)]


def _measured(masks: Sequence[BoolArray], rings: Mapping[int, PointArray]) -> dict[int, Outline]:
    """Those of the rings that have three points, by the index of their mask, with their IoU."""
    closed = {i: ring for i, ring in rings.items() if len(ring) >= 3}
    extent = np.max([masks[i].shape for i in closed], axis=0, initial=0)
    crops = fill_rings(list(closed.values()), extent)
    return {i: Outline(ring, _iou(masks[i], crop)) for (i, ring), crop in zip(closed.items(), crops, strict=True)}


def _iou(mask: BoolArray, crop: Crop | None) -> float:
    if crop is None:
        return 0.0
    x0, y0, x1, y1 = crop.box_xyxy
    shared = int(np.count_nonzero(mask[y0:y1, x0:x1] & crop.mask))
    return shared / (int(np.count_nonzero(mask)) + int(np.count_nonzero(crop.mask)) - shared)
