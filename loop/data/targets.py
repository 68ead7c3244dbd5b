"""What a network is taught, from the label layers of a crop."""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from loop.errors import LabelError
from loop.types import BoolArray, FloatArray

LabelLayers = npt.NDArray[np.uint16]
"""(L, H, W) as `loop.masks.to_layers` gives them: 0 = background, i + 1 = cell i."""

MIN_VISIBLE = 4


def targets(layers: LabelLayers, heads: Sequence[str], nuclei: LabelLayers | None = None) -> FloatArray:
    """What the heads learn, (K, H, W) float32 in {0, 1}, the head `distance` in [0, 1].

    `interior`: the whole cell. `border`: a band around each cell, its outermost pixels and those next to them.
    `background`: what is in no cell. `overlap`: what is in two cells or more. `nuclei`: what is in a nucleus.
    `distance`: how far inside its cell a pixel lies, see `distance_map`.

    Args:
        layers: (L, H, W) of the cells.
        heads: K names of `loop.config.Head`, in the order of the result.
        nuclei: (M, H, W) of the nuclei; needed for the head `nuclei` alone.

    Raises:
        LabelError: the head `nuclei` without nuclei.
    """
    inside: BoolArray = layers > 0
    covered = np.asarray(inside.any(axis=0))
    made: list[BoolArray | FloatArray] = []
    for head in heads:
        if head == "interior":
            made.append(covered)
        elif head == "background":
            made.append(~covered)
        elif head == "overlap":
            made.append(np.asarray(inside.sum(axis=0) >= 2))
        elif head == "border":
            made.append(np.asarray(np.any([_band(layer) for layer in layers], axis=0)))
        elif head == "distance":
            made.append(distance_map(layers))
        elif nuclei is None:
            raise LabelError("the head nuclei needs labelled nuclei; leave it out of model.heads")
        else:
            made.append(np.asarray((nuclei > 0).any(axis=0)))
    if not made:
        return np.zeros((0, *layers.shape[1:]), np.float32)
    return np.stack(made).astype(np.float32)


def distance_map(layers: LabelLayers) -> FloatArray:
    """How far inside its cell each pixel lies: (H, W) float32 in [0, 1], 1 in the middle of each cell, 0 outside.

    The Euclidean distance to the nearest pixel that is not of the cell, divided by the largest such distance of the
    cell, so that small cells count as large ones do; of several layers the highest value. What lies beyond the edge of
    the layers is not known and counts as no edge of a cell; a cell that fills its layer is 1 everywhere.

    Args:
        layers: (L, H, W), 0 = background.
    """
    found = np.zeros(layers.shape[1:], np.float32)
    height, width = found.shape
    for layer in layers:
        for i, box in enumerate(ndimage.find_objects(layer)):
            if box is None:
                continue
            rows, columns = (
                slice(max(side.start - 1, 0), min(side.stop + 1, most))
                for side, most in zip(box, (height, width), strict=True)
            )
            inside = (layer[rows, columns] == i + 1).astype(np.uint8)
            if inside.all():
                depth = np.ones(inside.shape, np.float32)
            else:
                depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
                depth = np.sqrt(np.rint(depth * depth))  # squares are whole; cv2's last bits differ from call to call
            part = found[rows, columns]
            np.maximum(part, depth / depth.max(), out=part)
    return found


def pixel_weights(layers: LabelLayers, weights: FloatArray) -> FloatArray:
    """How much each pixel counts, (H, W) float32: its cell's weight, 1 on the background.

    Each pixel takes the lowest weight of itself and its eight neighbours in all layers, so the border of a cell of
    weight 0 is ignored with it.

    Args:
        layers: (L, H, W), i + 1 = cell i.
        weights: (N,) float32 >= 0.
    """
    if bool(np.all(weights == 1)):
        return np.ones(layers.shape[1:], np.float32)
    table = np.concatenate([np.ones(1, np.float32), weights])
    lowest: FloatArray = np.min([cv2.erode(table[layer], np.ones((3, 3), np.uint8)) for layer in layers], axis=0)
    return lowest


def visible_cells(layers: LabelLayers) -> list[int]:
    """The values of the cells of which at least 4 px are in the layers, ascending."""
    counts = np.bincount(layers.ravel())
    counts[0] = 0
    return [int(value) for value in np.flatnonzero(counts >= MIN_VISIBLE)]


def cell_masks(layers: LabelLayers) -> BoolArray:
    """(n, H, W) bool, one mask for each of `visible_cells`, whole also where cells overlap."""
    values = visible_cells(layers)
    if not values:
        return np.zeros((0, *layers.shape[1:]), np.bool_)
    return np.stack([(layers == value).any(axis=0) for value in values])


def _band(layer: npt.NDArray[np.uint16]) -> BoolArray:
    kernel = np.ones((3, 3), np.uint8)
    return np.asarray(cv2.dilate(layer, kernel) != cv2.erode(layer, kernel), dtype=np.bool_)
