"""What of the fused cells teaches, what is left open, and what a person is shown."""

import cv2
import numpy as np

from loop.config import PseudoConfig
from loop.errors import NonFiniteError, ShapeError
from loop.types import BoolArray, FloatArray, Instances, UInt8Array


def teach(instances: Instances, confidence: FloatArray, config: PseudoConfig) -> Instances:
    """The cells of a lesson: score = confidence; weight = confidence from `keep` on, 0 from `doubt` to `keep`.

    A cell of weight 0 is neither cell nor background. Those below `doubt` are left out: no cell, but what a labeller
    took for one; `known_ground` keeps them from being taught as background. An image teaches as a whole or not at all:
    where the sure cells are less than `sure_share` of the cells to be expected (the sum of all confidences), all
    weights are 0, since with its cells left open such an image would teach background alone.

    Args:
        instances: N >= 0 cells of one image; not changed.
        confidence: (N,) float32 in [0, 1].
        config: `keep`, `doubt`, `sure_share`.

    Returns:
        0 to N cells in the same order, source "pseudo", origins kept.

    Raises:
        ShapeError: not one confidence a cell.
        NonFiniteError: a confidence is NaN or infinite; the text names the image.
    """
    _check(instances, confidence)
    sure = confidence >= config.keep
    enough = confidence[sure].sum() >= config.sure_share * confidence.sum()
    weights = np.where(sure & enough, confidence, 0).astype(np.float32)
    return _rebuilt(instances, confidence, weights, confidence >= config.doubt)


def known_ground(
    instances: Instances, confidence: FloatArray, config: PseudoConfig, *, margin_px: int = 2
) -> BoolArray:
    """(H, W) bool for `Sample.known`: where a lesson says what is there.

    True on the cells that teach and within `ground_px` of them; False farther away, where cells may lie that no
    labeller saw, and on the cells below `keep` with `margin_px` around them: those that are left out may be badly
    outlined cells, and so may the outlines of the doubtful be.

    Args:
        instances: as given to `teach`.
        confidence: likewise.
        config: `keep`, `ground_px`.
        margin_px: >= 0.

    Raises:
        ShapeError, NonFiniteError: as `teach`.
    """
    _check(instances, confidence)
    open_ground, taught = np.zeros(instances.shape, np.uint8), np.zeros(instances.shape, np.uint8)
    boxes = instances.boxes_xyxy.tolist()
    for sure, (x0, y0, x1, y1), mask in zip((confidence >= config.keep).tolist(), boxes, instances.masks, strict=True):
        (taught if sure else open_ground)[y0:y1, x0:x1] |= mask
    around = _grown(taught, config.ground_px) & ~_grown(open_ground, margin_px)
    return np.asarray(around | (taught > 0))


def shown(instances: Instances, confidence: FloatArray, config: PseudoConfig) -> Instances:
    """The cells that a person is shown: those of `doubt` or more, in the same order, score = confidence, weight 1.

    Raises:
        ShapeError, NonFiniteError: as `teach`.
    """
    _check(instances, confidence)
    return _rebuilt(instances, confidence, np.ones(len(instances), np.float32), confidence >= config.doubt)


def _rebuilt(instances: Instances, scores: FloatArray, weights: FloatArray, kept: BoolArray) -> Instances:
    return Instances.build(
        instances.shape,
        instances.boxes_xyxy,
        instances.masks,
        scores=np.clip(scores, 0, 1),
        labels=instances.labels,
        weights=weights,
        image_id=instances.image_id,
        source="pseudo",
        model_version=instances.model_version,
        origins=instances.origins,
    ).take(np.flatnonzero(kept))


def _check(instances: Instances, confidence: FloatArray) -> None:
    if confidence.shape != (len(instances),):
        raise ShapeError(f"{len(instances)} cells but confidences {confidence.shape}; give one for each cell")
    if not np.isfinite(confidence).all():
        raise NonFiniteError(f"a confidence in image {instances.image_id!r} is NaN or infinite; calibrate again")


def _grown(mask: UInt8Array, px: int) -> BoolArray:
    """(H, W) bool: a mask of 0 and 1 and all within `px` of it."""
    if px <= 0 or not mask.any():
        return np.asarray(mask > 0)
    return np.asarray(cv2.distanceTransform(1 - mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= px)
