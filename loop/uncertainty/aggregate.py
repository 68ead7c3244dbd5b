"""From a map of uncertainty to one number an image."""

import numpy as np

from loop.errors import NonFiniteError, ShapeError
from loop.types import FloatArray, Instances


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
    if uncertainty.shape != instances.shape:
        raise ShapeError(
            f"the uncertainty map of {instances.image_id!r} is {uncertainty.shape}; its image is {instances.shape}"
        )
    if not np.isfinite(uncertainty).all():
        raise NonFiniteError(
            f"the uncertainty of image {instances.image_id!r} holds NaN or infinity; train the model again"
        )
    if len(instances) == 0:
        return float(uncertainty.mean(dtype=np.float64))
    means = []
    for (x0, y0, x1, y1), mask in zip(instances.boxes_xyxy, instances.masks, strict=True):
        inside = uncertainty[y0:y1, x0:x1][mask]
        means.append(float(inside.mean(dtype=np.float64)) if inside.size else 0.0)
    return float(np.mean(means))
