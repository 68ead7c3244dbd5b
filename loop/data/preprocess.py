"""Arrays on their way to a network and back: padding and windows, each with its inverse; percentiles of counts."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loop.errors import InputError, ShapeError
from loop.types import FloatArray


class Window(NamedTuple):
    """A rectangle of an image in px: rows y0 to y1, columns x0 to x1, ends exclusive."""

    y0: int
    x0: int
    y1: int
    x1: int


def percentiles_of_counts(counts: npt.NDArray[np.int64], percents: Sequence[float]) -> list[float]:
    """Percentiles of whole numbers of which only a histogram is known.

    Args:
        counts: (K,) how often each of the values 0 .. K - 1 occurs; at least one value occurs.
        percents: in [0, 100].

    Returns:
        One number a percent, equal to `numpy.percentile` (linear) of the values themselves.
    """
    upto = np.cumsum(counts)
    found = []
    for percent in percents:
        place = (int(upto[-1]) - 1) * percent / 100
        below = math.floor(place)
        first, second = np.searchsorted(upto, [below, min(below + 1, int(upto[-1]) - 1)], side="right")
        found.append(float(first + (second - first) * (place - below)))
    return found


def pad_to_multiple(image: FloatArray, multiple: int, *, mirror: bool = True) -> FloatArray:
    """The image continued beyond its lower and right edge until height and width are multiples of `multiple`.

    Args:
        image: (..., H, W), H and W at least 1; its top left corner stays where it is.
        multiple: at least 1, px.
        mirror: continued by its mirror image; otherwise by zeros.

    Returns:
        (..., H', W') of the same dtype; a copy, or the image itself where nothing is missing. `unpad` is the inverse.

    Raises:
        ShapeError: the image has no pixels.
        InputError: `multiple` is below 1.
    """
    if multiple < 1:
        raise InputError(f"multiple={multiple}; expected at least 1")
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise ShapeError(f"the image is {image.shape}; expected (..., H, W) with at least one pixel")
    height, width = image.shape[-2:]
    down, right = -height % multiple, -width % multiple
    if down == right == 0:
        return image
    margins = [(0, 0)] * (image.ndim - 2) + [(0, down), (0, right)]
    return np.pad(image, margins, mode="reflect") if mirror else np.pad(image, margins)


def unpad(image: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """The part of a padded image that was there before `pad_to_multiple`: a view (..., H, W).

    Args:
        image: (..., H', W').
        shape: (H, W) before padding.

    Raises:
        ShapeError: the padded image is smaller than `shape`.
    """
    height, width = shape
    if image.shape[-2] < height or image.shape[-1] < width:
        raise ShapeError(f"the padded image is {image.shape[-2:]}, smaller than the {shape} to cut out of it")
    return image[..., :height, :width]


def tiles(shape: tuple[int, int], tile: int, overlap: int) -> list[Window]:
    """Windows of one size that together cover an image, evenly spread, neighbours overlapping by `overlap` or more.

    Args:
        shape: (H, W) px, both at least 1.
        tile: side of a window, px; an image smaller than this gets windows of its own height or width.
        overlap: px, from 0 to less than `tile`.

    Returns:
        At least one window, row by row; all of size (min(tile, H), min(tile, W)), all inside the image.

    Raises:
        InputError: tile, overlap or shape is out of range.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise InputError(f"tile={tile}, overlap={overlap}; expected tile >= 1 and 0 <= overlap < tile")
    if min(shape) < 1:
        raise InputError(f"an image of {shape} has no pixels to cover")
    rows, columns = (_starts(size, tile, overlap) for size in shape)
    height, width = (min(tile, size) for size in shape)
    return [Window(y, x, y + height, x + width) for y in rows for x in columns]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [(size - tile) * i // (count - 1) for i in range(count)]


def blend(shape: tuple[int, int], parts: Iterable[tuple[Window, FloatArray]], overlap: int) -> FloatArray:
    """One map from the maps of overlapping windows: their average, each weighted less towards its own edges.

    The parts are taken one by one, so they may come from a generator.

    Args:
        shape: (H, W) of the whole, px.
        parts: each a window and its (C, h, w) float32 map.
        overlap: px over which the weight rises from an edge to 1; as given to `tiles`.

    Returns:
        (C, H, W) float32. Windows cut from one map blend to that map again, but for rounding.

    Raises:
        ShapeError: a map has not its window's size or leaves the image, or a pixel is covered by none.
    """
    total: FloatArray | None = None
    weight = np.zeros(shape, dtype=np.float32)
    for window, part in parts:
        y0, x0, y1, x1 = window
        if part.shape[1:] != (y1 - y0, x1 - x0) or y0 < 0 or x0 < 0 or y1 > shape[0] or x1 > shape[1]:
            raise ShapeError(f"a map of {part.shape} for {window} of an image of {shape}; expected (C, h, w) inside it")
        if total is None:
            total = np.zeros((part.shape[0], *shape), dtype=np.float32)
        ramp = np.outer(_ramp(y1 - y0, overlap), _ramp(x1 - x0, overlap))
        total[:, y0:y1, x0:x1] += part * ramp
        weight[y0:y1, x0:x1] += ramp
    if total is None or not weight.all():
        bare = int(np.count_nonzero(weight == 0))
        raise ShapeError(f"{bare} pixels of the {shape} image are covered by no window; use the windows of `tiles`")
    total /= weight
    return total


def _ramp(size: int, overlap: int) -> FloatArray:
    steps = np.arange(1, size + 1, dtype=np.float32)
    return np.minimum(np.minimum(steps, steps[::-1]) / (overlap + 1), 1).astype(np.float32)
