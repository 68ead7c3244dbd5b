"""Random changes to training crops: where each pixel is taken from, and what becomes of its intensity.

All functions are pure and draw from the generator given. Positions are warped once, by one map for image and labels.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from loop.config import TrainConfig
from loop.data.targets import LabelLayers
from loop.types import BoolArray, FloatArray, UInt8Array


@dataclass(frozen=True, eq=False)
class SamplingMap:
    """Where each pixel of a crop is taken from: `x` and `y`, (S, S) float32, px in the source image."""

    x: FloatArray
    y: FloatArray

    def image(self, pixels: UInt8Array) -> FloatArray:
        """(H, W, C) in 0 .. 255 sampled linearly to (S, S, C) in 0 .. 1; mirrored beyond the image's edge."""
        sampled = cv2.remap(pixels, self.x, self.y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        crop: FloatArray = sampled.reshape(*self.x.shape, pixels.shape[2]).astype(np.float32) / np.float32(255)
        return crop

    def map(self, values: FloatArray) -> FloatArray:
        """(H, W) float32 sampled linearly to (S, S); mirrored beyond the image's edge."""
        crop: FloatArray = cv2.remap(values, self.x, self.y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        return crop

    def layers(self, layers: LabelLayers) -> LabelLayers:
        """(L, H, W) uint16 sampled from the nearest pixel to (L, S, S); mirrored beyond the image's edge."""
        border = cv2.BORDER_REFLECT_101
        return np.stack([cv2.remap(layer, self.x, self.y, cv2.INTER_NEAREST, borderMode=border) for layer in layers])

    def inside(self, shape: tuple[int, int]) -> BoolArray:
        """(S, S) bool: whether a pixel is taken from inside an image of (H, W)."""
        rows = (self.y >= -0.5) & (self.y < shape[0] - 0.5)
        return np.asarray(rows & (self.x >= -0.5) & (self.x < shape[1] - 0.5), dtype=np.bool_)

    def zoomed(self, factor: float) -> "SamplingMap":
        """The map of a field that is `factor` times smaller around the same middle, so that cells appear larger."""
        middle_x, middle_y = np.float32(self.x.mean()), np.float32(self.y.mean())
        scale = np.float32(1 / factor)
        return SamplingMap(middle_x + (self.x - middle_x) * scale, middle_y + (self.y - middle_y) * scale)


def plain_map(size: int, centre_xy: tuple[float, float]) -> SamplingMap:
    """The map of an unchanged crop of `size` px around a centre in px (no randomness)."""
    x, y = _offsets(size)
    return SamplingMap(x + np.float32(centre_xy[0]), y + np.float32(centre_xy[1]))


def random_map(rng: np.random.Generator, size: int, centre_xy: tuple[float, float], config: TrainConfig) -> SamplingMap:
    """A flipped, turned, scaled and lightly bent crop around a centre.

    One of the eight flips and quarter turns, a further turn of up to `config.rotate` degrees, a scale drawn
    log-uniformly up to `config.scale_jitter` either way, and a smooth displacement with a standard deviation of
    `config.elastic` px, drawn on a coarse 4 x 4 grid and interpolated.
    """
    x, y = _offsets(size)
    scale = float(np.exp(rng.uniform(-1, 1) * np.log(config.scale_jitter)))
    angle = float(np.deg2rad(90 * rng.integers(4) + rng.uniform(-1, 1) * config.rotate))
    flip = -1.0 if rng.random() < 0.5 else 1.0
    cos, sin = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    source_x = flip * (cos * x - sin * y) + np.float32(centre_xy[0])
    source_y = sin * x + cos * y + np.float32(centre_xy[1])
    if config.elastic > 0:
        grid = rng.normal(0.0, config.elastic, (4, 4, 2)).astype(np.float32)
        bend = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        source_x = source_x + bend[..., 0]
        source_y = source_y + bend[..., 1]
    return SamplingMap(source_x.astype(np.float32), source_y.astype(np.float32))


def random_intensity(rng: np.random.Generator, crop: FloatArray, strength: float, invert: float) -> FloatArray:
    """A crop with its brightness, contrast, gamma, colours, sharpness and noise changed, perhaps inverted.

    Half of the crops get a smooth field of brightness, so that dim cells stand beside bright ones.

    Args:
        rng: what is drawn from.
        crop: (S, S, C) float32 in [0, 1], C = 1 or 3; not changed.
        strength: scales every change, 0 = none.
        invert: the probability of 1 - crop.

    Returns:
        (S, S, C) float32, roughly in [-0.5, 1.5].
    """
    out = crop
    if rng.random() < invert:
        out = 1 - out
    if out.shape[2] == 3 and rng.random() < 0.5 * min(strength, 1):
        out = _recolour(rng, out, strength)
    gamma = float(np.exp(rng.normal(0, 0.25 * strength)))
    out = np.power(np.clip(out, 0, 1), gamma, dtype=np.float32)
    if rng.random() < 0.5 * min(strength, 1):
        out = np.multiply(out, _shade(rng, out.shape[0], 0.5 * strength), dtype=np.float32)
    gain = float(np.exp(rng.uniform(-0.3, 0.3) * strength))
    shift = float(rng.uniform(-0.1, 0.1) * strength)
    out = out * np.float32(gain) + np.float32(shift)
    if rng.random() < 0.2 * strength:
        blurred = cv2.GaussianBlur(out, (0, 0), float(rng.uniform(0.3, 1.2)))
        out = blurred.reshape(out.shape)
    if rng.random() < 0.3 * strength:
        noise = rng.standard_normal(out.shape[:2], dtype=np.float32)[..., None]
        out = out + noise * np.float32(rng.uniform(0.0, 0.05))
    return np.ascontiguousarray(out, dtype=np.float32)


def blank_out(rng: np.random.Generator, crop: FloatArray) -> FloatArray:
    """A copy of a crop (S, S, C) in which one to four rectangles take the crop's mean, so that cells must be completed.

    Source: Prytula 2023, section 5.2 (coarse dropout). Each side is drawn from S / 16 to S / 5.
    """
    out = crop.copy()
    size = crop.shape[0]
    for _ in range(int(rng.integers(1, 5))):
        height, width = rng.integers(max(size // 16, 1), max(size // 5, 2), 2)
        top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
        out[top : top + height, left : left + width] = crop.mean(axis=(0, 1))
    return out


def veil(rng: np.random.Generator, crop: FloatArray) -> FloatArray:
    """A copy of a crop (S, S, C) with dim blobs behind its cells, as cytoplasm lies around nuclei, that are no cells.

    Where a smooth random field is high a veil of one to five tenths of full brightness shines through the image, its
    edge sharp or soft, its surface finely grained; a cell in it stays brighter than its surroundings. So what is dim
    and large is learnt as background also where no image shows it: rare kinds of images have too few labels for that.
    """
    size = crop.shape[0]
    coarse = int(rng.integers(3, 7))
    field = cv2.resize(
        rng.standard_normal((coarse, coarse)).astype(np.float32), (size, size), None, 0, 0, cv2.INTER_CUBIC
    )
    steepness = float(np.exp(rng.uniform(np.log(2), np.log(40))))
    shape = 1 / (1 + np.exp(np.clip(-steepness * (field - rng.uniform(0.0, 0.8)), -30, 30)))
    grain = cv2.GaussianBlur(rng.standard_normal((size, size)).astype(np.float32), (0, 0), float(rng.uniform(0.7, 2.5)))
    surface = float(rng.uniform(0.1, 0.5)) * (1 + float(rng.uniform(0, 0.5)) * grain)
    dim = np.clip(shape * surface, 0, 1)[..., None]
    tint = rng.uniform(0.6, 1.0, crop.shape[2]).astype(np.float32) if crop.shape[2] > 1 else np.ones(1, np.float32)
    return np.asarray(1 - (1 - crop) * (1 - dim * tint), dtype=np.float32)


def _shade(rng: np.random.Generator, size: int, spread: float) -> FloatArray:
    """A smooth field (size, size, 1) of factors around 1 and at most 1.3, drawn on a coarse 6 x 6 grid."""
    grid = np.exp(rng.normal(-0.5 * spread, spread, (6, 6))).astype(np.float32)
    field: FloatArray = cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR)
    return np.minimum(field, np.float32(1.3))[..., None]


def _recolour(rng: np.random.Generator, crop: FloatArray, strength: float) -> FloatArray:
    """Mixes the channels a little, or turns the crop grey (one time in four)."""
    if rng.random() < 0.25:
        return np.repeat(crop.mean(axis=2, keepdims=True, dtype=np.float32), 3, axis=2)
    mix = np.eye(3) + rng.normal(0, 0.12 * strength, (3, 3))
    mix /= mix.sum(axis=0, keepdims=True)
    return np.asarray(crop @ mix.astype(np.float32), dtype=np.float32)


def _offsets(size: int) -> tuple[FloatArray, FloatArray]:
    line = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    return np.broadcast_to(line[None, :], (size, size)), np.broadcast_to(line[:, None], (size, size))
