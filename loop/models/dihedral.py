"""The eight ways to lay a picture on a square grid: flips and quarter turns, each with its exact inverse.

A transform is a number from 0 to 7, read as three steps done in this order: 1 mirrors left and right, 2 mirrors top and
bottom, 4 swaps rows and columns. 0 changes nothing, 3 is the half turn, 5 and 6 are the quarter turns. 0 to 3 keep
height and width, so the first 1, 2, 4 or 8 of `TRANSFORMS` are what test-time augmentation takes.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from loop.errors import InputError, ShapeError
from loop.types import Instances

TRANSFORMS = (0, 1, 2, 3, 4, 5, 6, 7)

_COLUMNS, _ROWS, _SWAP = 1, 2, 4

Scalar = TypeVar("Scalar", bound=np.generic)


def apply(k: int, array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """The array laid as transform `k` says: (..., H, W), or (..., W, H) from 4 on.

    Args:
        k: one of `TRANSFORMS`.
        array: (..., H, W) of any type; pixels move, no value changes.

    Returns:
        Contiguous; the array itself where nothing changes, else a copy.

    Raises:
        InputError: there is no transform `k`.
        ShapeError: the array has fewer than two axes.
    """
    _check(k, array.ndim)
    if k & _COLUMNS:
        array = array[..., ::-1]
    if k & _ROWS:
        array = array[..., ::-1, :]
    if k & _SWAP:
        array = array.swapaxes(-1, -2)
    return np.ascontiguousarray(array)


def invert(k: int, array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """What was before `apply(k, ...)`, bit for bit: (..., H, W) from what `apply` gave.

    Args:
        k: one of `TRANSFORMS`.
        array: (..., H, W), or (..., W, H) from 4 on.

    Returns:
        Contiguous; the array itself where nothing changes, else a copy.

    Raises:
        InputError: there is no transform `k`.
        ShapeError: the array has fewer than two axes.
    """
    _check(k, array.ndim)
    if k & _SWAP:
        array = array.swapaxes(-1, -2)
    if k & _ROWS:
        array = array[..., ::-1, :]
    if k & _COLUMNS:
        array = array[..., ::-1]
    return np.ascontiguousarray(array)


def apply_instances(k: int, instances: Instances) -> Instances:
    """The cells of an image as they lie in `apply(k, image)`; scores, labels, weights and origin are kept.

    Raises:
        InputError: there is no transform `k`.
    """
    _check(k)
    (height, width), boxes = instances.shape, instances.boxes_xyxy
    boxes = _mirror(boxes, width if k & _COLUMNS else None, height if k & _ROWS else None)
    if k & _SWAP:
        boxes, (height, width) = boxes[:, [1, 0, 3, 2]], (width, height)
    masks = [apply(k, mask) for mask in instances.masks]
    return _moved(instances, (height, width), boxes, masks)


def invert_instances(k: int, instances: Instances) -> Instances:
    """The cells of an image from those found in `apply(k, image)`: the exact inverse of `apply_instances`.

    Raises:
        InputError: there is no transform `k`.
    """
    _check(k)
    (height, width), boxes = instances.shape, instances.boxes_xyxy
    if k & _SWAP:
        boxes, (height, width) = boxes[:, [1, 0, 3, 2]], (width, height)
    boxes = _mirror(boxes, width if k & _COLUMNS else None, height if k & _ROWS else None)
    masks = [invert(k, mask) for mask in instances.masks]
    return _moved(instances, (height, width), boxes, masks)


def _check(k: int, axes: int = 2) -> None:
    if k not in TRANSFORMS:
        raise InputError(f"there is no transform {k}; give one of {TRANSFORMS}")
    if axes < 2:
        raise ShapeError(f"an array of {axes} axes has no rows and columns; give (..., H, W)")


def _mirror(boxes: npt.NDArray[np.int32], width: int | None, height: int | None) -> npt.NDArray[np.int32]:
    """Boxes (N, 4) x0, y0, x1, y1 in the picture mirrored in the given width, height or both."""
    x0, y0, x1, y1 = boxes.T
    if width is not None:
        x0, x1 = width - x1, width - x0
    if height is not None:
        y0, y1 = height - y1, height - y0
    return np.stack([x0, y0, x1, y1], axis=1)


def _moved(
    instances: Instances, shape: tuple[int, int], boxes: npt.NDArray[np.int32], masks: list[npt.NDArray[np.bool_]]
) -> Instances:
    return Instances.build(
        shape,
        boxes,
        masks,
        scores=instances.scores,
        labels=instances.labels,
        weights=instances.weights,
        image_id=instances.image_id,
        source=instances.source,
        model_version=instances.model_version,
        origins=instances.origins,
    )
