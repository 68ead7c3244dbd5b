"""What an image looks like in numbers, without any model: brightness, colour, and detail from fine to coarse."""

import cv2
import numpy as np
import numpy.typing as npt

from loop.data.intensity import stretch
from loop.errors import ShapeError
from loop.types import FloatArray, UInt8Array

LONGEST = 512
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
PERCENTILES = (5, 25, 50, 75, 95, 99)
SIZE = len(PERCENTILES) + 4 + 2 * len(SCALES) + 4


def describe(pixels: UInt8Array) -> FloatArray:
    """Statistics of an image; like images get like numbers, so that the first batch can be spread over their kinds.

    In order: six percentiles of the grey image; mean red, green and blue minus their mean, and the mean saturation;
    at each of five scales of a difference of Gaussians (sigma 1 to 16 px) the mean absolute response and its
    spread over the image relative to that (even texture against lone objects), both as logarithms; what Otsu's
    threshold says: how far its two classes lie apart, the share of the frame above it, the number of pieces and their
    typical diameter, the last two as logarithms. Images with a bright background are not inverted for the first parts,
    and are for the last. Sides over 512 px are shrunk to that.

    Args:
        pixels: (H, W, C) uint8, C in {1, 3}, at least one pixel.

    Returns:
        (24,) float32, finite.

    Raises:
        ShapeError: `pixels` is of another shape.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.size == 0:
        raise ShapeError(f"the image is {pixels.shape}; expected (H, W, 1) or (H, W, 3) with at least one pixel")
    longer = max(pixels.shape[:2])
    if longer > LONGEST:
        size = tuple(max(1, round(side * LONGEST / longer)) for side in pixels.shape[1::-1])
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)
    colours = stretch(pixels, 3, dark_background=False).astype(np.float32) / 255
    grey = colours.mean(axis=2)
    tint = colours.mean(axis=(0, 1)) - grey.mean()
    saturation = (colours.max(axis=2) - colours.min(axis=2)).mean()
    parts = [np.percentile(grey, PERCENTILES), tint, [saturation], _detail(grey), _objects(pixels)]
    return np.asarray(np.concatenate(parts), dtype=np.float32)


def _detail(grey: npt.NDArray[np.float32]) -> list[float]:
    """Mean absolute difference of Gaussians and its relative spread, a pair a scale, as logarithms."""
    found = []
    finer = grey
    for sigma in SCALES:
        coarser = cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
        band = np.abs(finer - coarser)
        mean = float(band.mean())
        found += [np.log(mean + 1e-3), np.log(float(band.std()) / (mean + 1e-3) + 1e-2)]
        finer = coarser
    return found


def _objects(pixels: UInt8Array) -> list[float]:
    """Separation of Otsu's classes, share of the brighter one, number and typical diameter of its pieces."""
    grey = np.ascontiguousarray(stretch(pixels, 1)[:, :, 0])
    _, mask = cv2.threshold(cv2.GaussianBlur(grey, (0, 0), 1.0), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    above, below = grey[mask > 0], grey[mask == 0]
    apart = (above.mean() - below.mean()) / 255 if above.size and below.size else 0.0
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    areas = stats[1:, cv2.CC_STAT_AREA]
    areas = areas[areas >= 10]
    diameter = float(np.sqrt(np.median(areas))) if areas.size else 0.0
    return [float(apart), float(mask.mean()), float(np.log1p(len(areas))), float(np.log1p(diameter))]
