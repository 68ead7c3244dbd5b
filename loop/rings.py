"""The outline of a mask as one ring of points, and a ring's pixels: the geometry under every polygon.

Frame of every ring: pixel (row r, column c) is the square [c, c+1] x [r, r+1], so an image reaches from 0 to W and from
0 to H, as in Label Studio, and the centre of a pixel lies at (c + 0.5, r + 0.5).
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from loop.errors import ConfigError, NonFiniteError, ShapeError
from loop.types import BoolArray

PointArray = npt.NDArray[np.float64]

MIN_POLYGON_IOU = 0.97
_BATCH_PX = 2_000_000  # so many pixels of rings are filled at once: 16 MB of winding numbers


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
    exact = [_trace(mask) for mask in masks]
    found = [Outline(np.empty((0, 2)), 0.0)] * len(masks)
    left = list(range(len(masks)))
    for tolerance in dict.fromkeys((tolerance_px, tolerance_px / 2, tolerance_px / 4, 0.0)):
        tried = {i: cv2.approxPolyDP(exact[i], 2 * tolerance, True).reshape(-1, 2) / 2 for i in left}
        tried = {i: ring for i, ring in tried.items() if len(ring) >= 3}
        extent = np.max([masks[i].shape for i in tried], axis=0, initial=0)
        for (i, ring), crop in zip(tried.items(), fill_rings(list(tried.values()), extent), strict=True):
            found[i] = Outline(ring, _iou(masks[i], crop))
        left = [i for i in left if found[i].iou < MIN_POLYGON_IOU]
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
    winding = np.cumsum(np.bincount(place, weights=np.sign(yb - ya)[edge], minlength=int(size.sum())))
    inside = winding != 0
    crops: list[Crop | None] = []
    for (left, up, right, down), begin, length in zip(boxes.tolist(), offset, size, strict=True):
        mask = inside[begin : begin + length].reshape(down - up, right - left + 1)[:, :-1]
        crops.append(Crop((left, up, right, down), mask.copy()) if mask.any() else None)
    return crops


def _trace(mask: BoolArray) -> npt.NDArray[np.int32]:
    """(K, 2) x, y of the exact ring of the largest part, in half pixels."""
    # Half-pixel lattice: pixel centres at odd places, corners at even ones, edge midpoints where one of both is odd.
    lattice = np.zeros((2 * mask.shape[0] + 1, 2 * mask.shape[1] + 1), np.uint8)
    lattice[1::2, 1::2] = mask
    lattice = cv2.dilate(lattice, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(lattice, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        raise ShapeError(f"an empty mask {mask.shape} has no outline; drop it")
    ring = max(contours, key=cv2.contourArea).reshape(-1, 2)
    midpoints: npt.NDArray[np.int32] = ring[((ring[:, 0] ^ ring[:, 1]) & 1) == 1]
    return midpoints


def _iou(mask: BoolArray, crop: Crop | None) -> float:
    if crop is None:
        return 0.0
    x0, y0, x1, y1 = crop.box_xyxy
    shared = int(np.count_nonzero(mask[y0:y1, x0:x1] & crop.mask))
    return shared / (int(np.count_nonzero(mask)) + int(np.count_nonzero(crop.mask)) - shared)
