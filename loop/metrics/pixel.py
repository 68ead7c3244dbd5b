"""How well a mask agrees with the true one, pixel by pixel, over many images: what a semantic head is judged by."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from loop.errors import ShapeError
from loop.types import BoolArray


class PixelCounts(NamedTuple):
    """Pixels of one or of many images: rightly found, wrongly found, missed, rightly left out."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int


def pixel_counts(predicted: BoolArray, true: BoolArray) -> PixelCounts:
    """The four counts of one image.

    Args:
        predicted: (H, W) bool, H and W may be 0.
        true: (H, W) bool.

    Raises:
        ShapeError: the two differ in shape.
    """
    if predicted.shape != true.shape:
        raise ShapeError(f"the predicted mask is {predicted.shape}, the true one {true.shape}; compare one image")
    both = int(np.count_nonzero(predicted & true))
    found, there = int(np.count_nonzero(predicted)), int(np.count_nonzero(true))
    return PixelCounts(both, found - both, there - both, true.size - found - there + both)


def pixel_scores(counts: Iterable[PixelCounts]) -> dict[str, float]:
    """accuracy, precision, recall, f1 and iou of the pixels of all images together, each in [0, 1].

    A share of nothing is 1 where nothing was to be found and nothing was found, otherwise 0: without a predicted pixel
    precision is 0 if there are true ones, without a true pixel recall is 0 if there are predicted ones. So is every
    figure 1 without any pixel.

    Args:
        counts: of each image; none at all is allowed.

    Source: Prytula 2023, tables 5.1 to 5.3.
    """
    tp, fp, fn, tn = (sum(column) for column in zip(PixelCounts(0, 0, 0, 0), *counts, strict=True))
    perfect = 1.0 if fp + fn == 0 else 0.0

    def share(part: int, whole: int) -> float:
        return part / whole if whole else perfect

    return {
        "accuracy": share(tp + tn, tp + fp + fn + tn),
        "precision": share(tp, tp + fp),
        "recall": share(tp, tp + fn),
        "f1": share(2 * tp, 2 * tp + fp + fn),
        "iou": share(tp, tp + fp + fn),
    }
