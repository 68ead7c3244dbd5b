"""Draws small pictures of cells with their true masks, for tests and the smoke run."""

from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from loop.errors import InputError
from loop.masks import from_masks
from loop.types import BoolArray, Instances, UInt8Array

MIN_AREA = 12

_TRIES = 400


class Drawn(NamedTuple):
    """A picture (H, W, 3) uint8 and the cells in it, in the order in which they were drawn."""

    pixels: UInt8Array
    instances: Instances


def draw_cells(
    rng: np.random.Generator,
    shape: tuple[int, int] = (64, 64),
    n: int = 4,
    touching: bool = False,
    *,
    image_id: str = "",
) -> Drawn:
    """Bright ellipses with a soft rim on a dark noisy ground, as fluorescence shows nuclei.

    Args:
        rng: draws places, sizes, brightness and noise; the same state gives the same picture.
        shape: (H, W) px, both at least 16.
        n: number of cells, 0 or more; no two share a pixel.
        touching: each cell but the first shares pixel edges with an earlier one; otherwise at least one dark pixel
            parts any two.
        image_id: goes into the instances.

    Returns:
        The picture (grey in three equal channels) and exactly n cells, each of one part and of at least 12 px; those at
        the border are cut.

    Raises:
        InputError: the shape is too small, n is negative, or so many cells find no place.
    """
    if min(shape) < 16 or n < 0:
        raise InputError(f"shape={shape}, n={n}; expected at least 16 px a side and n >= 0")
    radius = min(min(shape) / 7, 0.4 * (shape[0] * shape[1] / max(n, 1)) ** 0.5)
    masks: list[BoolArray] = []
    taken = np.zeros(shape, dtype=np.bool_)
    for _ in range(n):
        mask = _place(rng, taken, radius, against=touching and bool(masks))
        if mask is None:
            raise InputError(f"only {len(masks)} of {n} cells fit into {shape}; draw fewer or a larger picture")
        masks.append(mask)
        taken |= mask
    return Drawn(_paint(rng, shape, masks), from_masks(masks, shape, image_id=image_id))


def _place(rng: np.random.Generator, taken: BoolArray, radius: float, *, against: bool) -> BoolArray | None:
    """A cell beside (or away from) what is taken, smaller the longer no place is found; None where there is none."""
    for attempt in range(_TRIES):
        full = _ellipse(rng, taken.shape, max(radius * (1 - 0.6 * attempt / _TRIES), 2.2))
        mask = full & ~taken
        area = np.count_nonzero(mask)
        if area < max(MIN_AREA, 0.6 * np.count_nonzero(full)) or ndimage.label(mask)[1] != 1:
            continue
        around = ndimage.binary_dilation(mask, np.ones((3, 3)) if not against else None)
        if bool((around & taken).any()) == against:
            return mask
    return None


def _ellipse(rng: np.random.Generator, shape: tuple[int, ...], radius: float) -> BoolArray:
    a, b = radius * rng.uniform(0.75, 1.25, size=2)
    angle = rng.uniform(0, np.pi)
    y = np.arange(shape[0])[:, None] - rng.uniform(0, shape[0] - 1)
    x = np.arange(shape[1])[None, :] - rng.uniform(0, shape[1] - 1)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    inside: BoolArray = (along / a) ** 2 + (across / b) ** 2 <= 1
    return inside


def _paint(rng: np.random.Generator, shape: tuple[int, int], masks: list[BoolArray]) -> UInt8Array:
    light = np.full(shape, rng.uniform(12, 30), dtype=np.float32)
    for mask in masks:
        dome = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        light[mask] = rng.uniform(110, 210) * (0.8 + 0.2 * dome[mask] / dome.max())
    light = cv2.GaussianBlur(light, (0, 0), 0.6) + rng.normal(0, 4, shape)
    grey = np.clip(light + 0.5, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
