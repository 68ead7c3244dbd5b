"""From a map of uncertainty to one number an image.

Every function takes a map (H, W) float32 >= 0 and the predicted cells of the same image, 0 included, and raises
ShapeError where the map is not of the image's size and NonFiniteError, naming the image, where it holds NaN or
infinity.
"""

import numpy as np

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array
from loop.types import BoolArray, FloatArray, Instances

TOP_SHARE = 0.05

LEAST_FOREGROUND = 0.05
"""Share of the frame that counts as foreground at the least, however little was found."""


def mean_over_frame(uncertainty: FloatArray, instances: Instances) -> float:
    """Mean over all pixels. It grows with the share of the frame that is cells, whose outlines are uncertain."""
    _check(uncertainty, instances)
    return float(uncertainty.mean(dtype=np.float64))


def sum_over_frame(uncertainty: FloatArray, instances: Instances) -> float:
    """Sum over all pixels; larger images have more of it."""
    _check(uncertainty, instances)
    return float(uncertainty.sum(dtype=np.float64))


def mean_of_top(uncertainty: FloatArray, instances: Instances, *, share: float = TOP_SHARE) -> float:
    """Mean over the most uncertain pixels alone.

    Args:
        uncertainty: (H, W) float32 >= 0.
        instances: its `image_id` is named in errors.
        share: of the frame's pixels, in (0, 1]; at least one pixel counts.

    Raises:
        InputError: the share is out of its range.
    """
    _check(uncertainty, instances)
    if not 0 < share <= 1:
        raise InputError(f"share={share} of the pixels; give a number above 0 and at most 1")
    values = uncertainty.reshape(-1)
    count = max(1, round(share * values.size))
    top = np.partition(values, values.size - count)[values.size - count :]
    return float(top.mean(dtype=np.float64))


def sum_per_foreground(uncertainty: FloatArray, instances: Instances) -> float:
    """Sum over all pixels divided by the number of pixels in predicted cells.

    Fuller images are not favoured: what counts is the uncertainty for each pixel of cells. The sum is divided by 5 % of
    the frame at least: otherwise images in which next to nothing was found would come before all others, however sure
    the model is that they are empty.
    """
    total = sum_over_frame(uncertainty, instances)
    return total / max(LEAST_FOREGROUND * uncertainty.size, int(np.count_nonzero(covered(instances))))


def mean_over_cells(uncertainty: FloatArray, instances: Instances) -> float:
    """Mean over the cells of each cell's mean uncertainty; of the whole frame where there are no cells.

    Every cell counts alike, however large. An image in which nothing was found is as uncertain as its pixels are on
    average: near 0 where the model is sure that it is empty, high where it almost saw something everywhere.

    Args:
        uncertainty: (H, W) float32 >= 0, finite.
        instances: the predicted cells of the same image, 0 included; `image_id` is named in errors.

    Returns:
        Within the range of `uncertainty`: higher = ask a person sooner.

    Raises:
        ShapeError: the map is not of the image's size.
        NonFiniteError: the map holds NaN or infinity.
    """
    means = cell_means(uncertainty, instances)
    return float(means.mean()) if len(means) else mean_over_frame(uncertainty, instances)


def cell_means(uncertainty: FloatArray, instances: Instances) -> Float64Array:
    """The mean uncertainty in each cell: (N,) float64; 0 for a cell without a pixel."""
    _check(uncertainty, instances)
    means = np.zeros(len(instances))
    for i, ((x0, y0, x1, y1), mask) in enumerate(zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True)):
        inside = uncertainty[y0:y1, x0:x1][mask]
        if inside.size:
            means[i] = inside.mean(dtype=np.float64)
    return means


def covered(instances: Instances) -> BoolArray:
    """Where at least one cell lies: (H, W) bool."""
    covered = np.zeros(instances.shape, np.bool_)
    for (x0, y0, x1, y1), mask in zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True):
        covered[y0:y1, x0:x1] |= mask
    return covered


def _check(uncertainty: FloatArray, instances: Instances) -> None:
    if uncertainty.shape != instances.shape:
        raise ShapeError(
            f"the uncertainty map of {instances.image_id!r} is {uncertainty.shape}; its image is {instances.shape}"
        )
    if not np.isfinite(uncertainty).all():
        raise NonFiniteError(
            f"the uncertainty of image {instances.image_id!r} holds NaN or infinity; train the model again"
        )
