"""From a network's set of masks to cells, which may overlap."""

import cv2
import numpy as np
import numpy.typing as npt

from loop.config import InstanceConfig
from loop.errors import NonFiniteError, ShapeError
from loop.metrics.matching import iou_matrix
from loop.rings import Crop, crop_mask, largest_part
from loop.types import FloatArray, Instances, Source

SAME = 0.5


def instances_from_queries(
    masks: FloatArray,
    confidences: FloatArray,
    shape: tuple[int, int],
    config: InstanceConfig,
    *,
    floor: float | None = None,
    stride: int | None = None,
    image_id: str = "",
    source: Source = "model",
    model_version: str = "",
) -> Instances:
    """The cells of a frame, best first; they may overlap.

    A mask is where its probability, enlarged bilinearly, is above 0.5; of several parts the largest stays. Its maskness
    is the mean probability in it, its score confidence x maskness. Of two masks with an IoU above 0.5 the better stays.

    Args:
        masks: (N, h, w) float32 probabilities.
        confidences: (N,) float32 in [0, 1], see `confidences_of`.
        shape: (H, W) of the frame, px; what the masks cover beyond it (padding at the lower and right edge) is cut.
        config: `min_area` and `floor`.
        floor: cells of a lower score are dropped, in [0, 1); None = `config.floor`.
        stride: px of the frame a mask's pixel is wide; None = H / h, rounded up.
        image_id: goes into the instances.
        source: goes into the instances.
        model_version: goes into the instances.

    Returns:
        0 to N cells of one part each, of at least `min_area` px.

    Raises:
        ShapeError: `masks` is not (N, h, w), there is not one confidence a mask, or the masks do not cover the frame.
        NonFiniteError: a probability is NaN or infinite; the text names the image.

    Source: Prytula 2023, section 4.5.3 (maskness, score = class x maskness, threshold 0.5). Differs: duplicates are
    removed, since nothing but the training keeps two queries from the same cell.
    """
    stride = _check(masks, confidences, shape, stride, image_id)
    floor = config.floor if floor is None else floor
    found: list[Crop] = []
    scores: list[float] = []
    for i in np.flatnonzero(confidences >= floor).tolist():
        cell = _cell(masks[i], stride, shape)
        if cell is None:
            continue
        crop, maskness = cell
        score = float(confidences[i]) * maskness
        if score >= floor and int(np.count_nonzero(crop.mask)) >= config.min_area:
            found.append(crop)
            scores.append(score)
    order = sorted(range(len(found)), key=lambda k: -scores[k])
    instances = Instances.build(
        shape,
        [found[k].box_xyxy for k in order],
        [found[k].mask for k in order],
        scores=np.clip(np.array([scores[k] for k in order], np.float32), 0, 1),
        image_id=image_id,
        source=source,
        model_version=model_version,
    )
    return instances.take(_distinct(instances))


def confidences_of(classes: FloatArray, objectness: FloatArray | None) -> FloatArray:
    """How sure each query is of its cell, (N,) float32: the class probability, or its geometric mean with the IoU.

    Args:
        classes: (N,) float32 class probabilities.
        objectness: (N,) float32 expected IoU in [0, 1], or None.

    Source: Prytula 2023, section 5.7.3, which leaves open how the two are joined; the geometric mean as in SparseInst.
    """
    if objectness is None:
        return np.asarray(classes, np.float32)
    return np.asarray(np.sqrt(classes * objectness), np.float32)


def _check(
    masks: FloatArray, confidences: FloatArray, shape: tuple[int, int], stride: int | None, image_id: str
) -> int:
    """How wide a mask's pixel is, px."""
    if masks.ndim != 3 or 0 in masks.shape[1:] or confidences.shape != masks.shape[:1]:
        raise ShapeError(
            f"masks of {image_id!r} are {masks.shape}, confidences {confidences.shape}; expected (N, h, w) and (N,)"
        )
    wide = stride or max(-(-shape[0] // masks.shape[1]), -(-shape[1] // masks.shape[2]))
    if masks.shape[1] * wide < shape[0] or masks.shape[2] * wide < shape[1]:
        raise ShapeError(
            f"masks of {image_id!r} are {masks.shape[1:]} pixels of {wide} px; they do not cover the frame {shape}"
        )
    bad = int(np.count_nonzero(~np.isfinite(masks))) + int(np.count_nonzero(~np.isfinite(confidences)))
    if bad:
        raise NonFiniteError(
            f"{bad} probabilities of image {image_id!r} are NaN or infinite; "
            "the model is damaged: train it again or go back to the one before"
        )
    return wide


def _cell(probs: FloatArray, stride: int, shape: tuple[int, int]) -> tuple[Crop, float] | None:
    """The largest part of a mask in the frame and its mean probability; None where nothing is above 0.5.

    Only the box of the small mask is enlarged, with one pixel around it: no enlarged pixel is above 0.5 where none of
    the pixels that it lies between is.
    """
    rough = crop_mask(probs > 0.5)
    if rough is None:
        return None
    x0, y0, x1, y1 = rough.box_xyxy
    x0, y0 = max(x0 - 1, 0), max(y0 - 1, 0)
    part = probs[y0 : y1 + 1, x0 : x1 + 1]
    large = _enlarge(part, stride)[: max(shape[0] - y0 * stride, 0), : max(shape[1] - x0 * stride, 0)]
    if large.size == 0:
        return None
    crop = crop_mask(largest_part(large > 0.5), x0=x0 * stride)
    if crop is None:
        return None
    left, top, right, bottom = crop.box_xyxy
    maskness = float(large[top:bottom, left - x0 * stride : right - x0 * stride][crop.mask].mean())
    return Crop((left, top + y0 * stride, right, bottom + y0 * stride), crop.mask), maskness


def _enlarge(probs: FloatArray, stride: int) -> FloatArray:
    if stride == 1:
        return probs
    height, width = probs.shape
    large: FloatArray = cv2.resize(
        np.ascontiguousarray(probs, np.float32), (width * stride, height * stride), interpolation=cv2.INTER_LINEAR
    )
    return large


def _distinct(instances: Instances) -> npt.NDArray[np.int64]:
    """Indices of the cells that share no IoU above 0.5 with a better one that stays; best first is their order."""
    twins = iou_matrix(instances, instances) > SAME
    kept = np.zeros(len(instances), np.bool_)
    for i in range(len(instances)):
        kept[i] = not (twins[i] & kept).any()
    return np.flatnonzero(kept)
