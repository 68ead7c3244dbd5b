"""What speaks for each fused cell, in numbers that a calibrator learns from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from loop.errors import ShapeError
from loop.metrics.matching import Float64Array
from loop.metrics.typical import shape_of, touches_edge
from loop.pseudo.fusion import Fused
from loop.types import BoolArray, FloatArray, Instances, IntArray, UInt8Array

EVIDENCE: tuple[str, ...] = (
    "found_by",
    "agreement",
    "stability",
    "score",
    "area",
    "odd_area",
    "hull_share",
    "eccentricity",
    "at_edge",
    "contrast",
    "sharpness",
    "touching",
    "image_stability",
    "image_score",
)
"""Names of the columns of `evidence`, in order; a stored calibrator names its own."""

RING_PX = 3
_SURE = 1e-3


def evidence(fused: Fused, image: UInt8Array, trust: Mapping[str, float]) -> FloatArray:
    """One row of numbers a cell; none of them uses a label.

    - found_by: share of the labellers, by trust, that found the cell; agreement: their mean IoU with it, by trust.
    - stability, score: logits of those of the fused cell.
    - area: ln px; odd_area: |ln(area / median area in the image)|.
    - hull_share: the solidity of loop/metrics/typical.py; eccentricity: of the ellipse of equal second moments, 0 =
      circle. (Calibrators that learnt from the "solidity" of another hull rule are told apart by the name.)
    - at_edge: 1 where the cell touches the image's edge, else 0.
    - contrast: |mean inside - mean in a ring of 3 px outside, other cells left out| / standard deviation of the image;
      0 where the ring lies in other cells or beyond the image's edge.
    - sharpness: mean gradient on the outline / mean gradient of the image.
    - touching: share of the ring that other cells fill.
    - image_stability, image_score: means of the two logits over the image's cells.

    Args:
        fused: as `fuse_proposals` gives it.
        image: (H, W, C) uint8, C in {1, 3}.
        trust: as it was given to `fuse_proposals`.

    Returns:
        (N, F) float32, finite, F = len(EVIDENCE); (0, F) for no cells.

    Raises:
        ShapeError: the image is not of the cells' shape.

    Cost: about 0.2 ms a cell, and a few passes over the image.
    """
    cells = fused.instances
    if not len(cells):
        return np.zeros((0, len(EVIDENCE)), np.float32)
    if image.ndim != 3 or image.shape[:2] != cells.shape:
        raise ShapeError(f"the image is {image.shape}, its cells lie in {cells.shape}; expected (H, W, C) of that H, W")
    found_by, agreement = _agreement(fused, trust)
    stability, score = _logit(fused.stability), _logit(cells.scores)
    size, solidity, elongation = np.array([shape_of(mask) for mask in cells.masks]).T
    surroundings = _surroundings(cells, image)
    columns = [
        found_by,
        agreement,
        stability,
        score,
        size,
        np.abs(size - np.median(size)),
        solidity,
        np.sqrt(1 - np.exp(-2 * elongation)),
        touches_edge(cells),
        *surroundings.T,
        np.full(len(cells), stability.mean()),
        np.full(len(cells), score.mean()),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _agreement(fused: Fused, trust: Mapping[str, float]) -> tuple[Float64Array, Float64Array]:
    """(N,) trusted share of the labellers that found each cell, and the trusted mean of their IoU with it."""
    weight = np.array([trust.get(name, 1.0) for name in fused.names], np.float64)
    found = (fused.support > 0) * weight
    by = found.sum(axis=1)
    return by / max(weight.sum(), _SURE), (fused.support * found).sum(axis=1) / np.maximum(by, _SURE)


def _logit(share: FloatArray) -> Float64Array:
    """ln(p / (1 - p)) of (N,) in [0, 1], kept within about 7 of 0."""
    p = np.clip(share.astype(np.float64), _SURE, 1 - _SURE)
    return np.asarray(np.log(p / (1 - p)))


class _Scene(NamedTuple):
    """The image as floats with a frame of RING_PX around it.

    `pixels` (h, w, C), `gradient` (h, w), `cells` (h, w): how many lie there, -1 in the frame.
    """

    pixels: FloatArray
    gradient: FloatArray
    cells: IntArray


def _surroundings(cells: Instances, image: UInt8Array) -> Float64Array:
    """(N, 3): contrast with the ring outside, sharpness of the outline, and how far other cells fill the ring."""
    scene = _scene(cells, image)
    spread = max(float(np.linalg.norm(cv2.meanStdDev(np.ascontiguousarray(image))[1])), 1.0)
    steepness = max(float(scene.gradient[RING_PX:-RING_PX, RING_PX:-RING_PX].mean()), _SURE)
    ring = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RING_PX + 1, 2 * RING_PX + 1))
    rows = [_around(box, mask, scene, ring) for box, mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True)]
    scaled: Float64Array = np.array(rows) / np.array([spread, steepness, 1.0])
    return scaled


def _scene(cells: Instances, image: UInt8Array) -> _Scene:
    count = np.zeros(cells.shape, np.int32)
    for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True):
        count[y0:y1, x0:x1] += mask
    frame = ((RING_PX, RING_PX), (RING_PX, RING_PX))
    pixels = np.pad(image.astype(np.float32), (*frame, (0, 0)), mode="edge")
    smooth = cv2.GaussianBlur(pixels.mean(axis=2), (0, 0), 1.0)
    gradient = cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    return _Scene(pixels, gradient, np.pad(count, frame, constant_values=-1))


def _around(box: Sequence[int], mask: BoolArray, scene: _Scene, element: UInt8Array) -> tuple[float, float, float]:
    """Contrast in grey levels, gradient on the outline, and the share of the ring that other cells fill."""
    x0, y0, x1, y1 = box
    place = np.s_[y0 : y1 + 2 * RING_PX, x0 : x1 + 2 * RING_PX]
    own = np.pad(mask, RING_PX).astype(np.uint8)
    ring = (cv2.dilate(own, element) > own) & (scene.cells[place] >= 0)
    others = scene.cells[place] - own > 0
    free = ring & ~others
    pixels = scene.pixels[place]
    apart = pixels[own > 0].mean(axis=0) - pixels[free].mean(axis=0) if free.any() else np.zeros(1)
    small = np.ones((3, 3), np.uint8)
    outline = cv2.dilate(own, small) > cv2.erode(own, small)
    return (
        float(np.linalg.norm(apart)),
        float(scene.gradient[place][outline].mean()),
        float(np.count_nonzero(ring & others) / max(np.count_nonzero(ring), 1)),
    )
