"""Intensities as the networks see them: stretched to the full range, on a dark background."""

import numpy as np

from loop.data.preprocess import percentiles_of_counts
from loop.errors import InputError, ShapeError
from loop.types import UInt8Array

LOWER, UPPER = 0.5, 99.8
MIN_RANGE = 4.0
AMBIGUOUS = 0.1


def stretch(pixels: UInt8Array, in_channels: int = 3, *, dark_background: bool = True) -> UInt8Array:
    """The image with its 0.5th percentile at 0 and its 99.8th at 255, inverted where its background is bright.

    All channels are stretched alike, so that colours keep their meaning, and at least 4 grey levels become the full
    range, so that the noise of an empty image stays small. The background is taken to be bright where the median is
    above the middle of the range: right wherever cells cover less than half of the image. So a network that has seen
    fluorescence only finds stained nuclei too.

    Args:
        pixels: (H, W, C) uint8, C in {1, 3}; not changed.
        in_channels: 1 or 3; a grey image is repeated for 3, a colour image averaged over its channels for 1.
        dark_background: False leaves bright backgrounds as they are.

    Returns:
        (H, W, in_channels) uint8.

    Raises:
        ShapeError: `pixels` is not (H, W, 1) or (H, W, 3), or empty.
        InputError: `in_channels` is neither 1 nor 3.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.size == 0:
        raise ShapeError(f"the image is {pixels.shape}; expected (H, W, 1) or (H, W, 3) with at least one pixel")
    if in_channels not in (1, 3):
        raise InputError(f"in_channels={in_channels}; a network takes 1 or 3")
    counts = np.bincount(pixels.reshape(-1), minlength=256)
    low, median, high = percentiles_of_counts(counts, (LOWER, 50.0, UPPER))
    scale = max(high - low, MIN_RANGE)
    table = np.clip((np.arange(256) - low) / scale, 0, 1)
    if dark_background and (median - low) / scale > 0.5:
        table = 1 - table
    stretched: UInt8Array = np.round(table * 255).astype(np.uint8)[pixels]
    if stretched.shape[2] == in_channels:
        return stretched
    if in_channels == 3:
        return np.repeat(stretched, 3, axis=2)
    grey: UInt8Array = np.round(stretched.mean(axis=2, keepdims=True, dtype=np.float32)).astype(np.uint8)
    return grey


def is_ambiguous(stretched: UInt8Array) -> bool:
    """Whether the median of a stretched image is so near the middle that its like may come out either way."""
    counts = np.bincount(stretched.reshape(-1), minlength=256)
    return abs(percentiles_of_counts(counts, (50.0,))[0] / 255 - 0.5) < AMBIGUOUS
