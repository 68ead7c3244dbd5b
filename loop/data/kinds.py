"""Which images look alike, where nobody says what modality they are of."""

from collections.abc import Sequence

import cv2
import numpy as np
from sklearn.cluster import KMeans

from loop.types import FloatArray, UInt8Array

MOST_KINDS = 8
THUMBNAIL = 128


def appearance(pixels: UInt8Array) -> FloatArray:
    """What an image looks like at a glance, (9,) float32: how its brightness is spread, its colour, its grain.

    Args:
        pixels: (H, W, C) uint8, C in {1, 3}, at least one pixel.
    """
    longer = max(pixels.shape[:2])
    if longer > THUMBNAIL:
        size = tuple(max(1, round(side * THUMBNAIL / longer)) for side in pixels.shape[1::-1])
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)
    colours = pixels.astype(np.float32) / 255
    grey = colours.mean(axis=2)
    spread = np.percentile(grey, (10, 50, 90, 99))
    tint = colours.mean(axis=(0, 1)) - grey.mean() if colours.shape[2] == 3 else np.zeros(3)
    saturation = (colours.max(axis=2) - colours.min(axis=2)).mean()
    grain = np.abs(cv2.Laplacian(grey, cv2.CV_32F)).mean()
    return np.asarray(np.concatenate([spread, tint, [saturation, 4 * grain]]), dtype=np.float32)


def kinds(pixels: Sequence[UInt8Array], seed: int = 0) -> list[int]:
    """A number for each image, equal for images that look alike: k-means on `appearance`, at most eight kinds.

    As many kinds as there are images by fours, and one for fewer than eight. Numbers carry no order.
    """
    most = min(len(pixels) // 4, MOST_KINDS)
    if most < 2:
        return [0] * len(pixels)
    looks = np.stack([appearance(image) for image in pixels])
    most = min(most, len(np.unique(looks, axis=0)))
    found = KMeans(most, n_init=4, random_state=seed).fit_predict(looks)
    return [int(kind) for kind in found]
