"""Masks whose colour is not that of cells are dropped: what SAM finds in stained tissue is mostly not cells.

Source: seed 000 section 3.1 (k-means on the HSV of mask means). Differs: hue is an angle, so a colour is a point of the
HSV cone (saturation times cosine and sine of the hue, value) and not three numbers; which clusters are wanted is learnt
from the colours of known cells.
"""

import cv2
import numpy as np
from sklearn.cluster import KMeans

from loop.errors import NonFiniteError, ShapeError
from loop.types import BoolArray, FloatArray, Instances, UInt8Array

CLUSTERS = 2
REACH = 90.0
"""Clusters no farther from the usual known colour than this percent of the known colours are wanted."""
APART = 0.3
"""Without known colours: how much more stained one cluster is than the other where one of them is no cells."""


def cell_colours(image: UInt8Array, instances: Instances) -> FloatArray:
    """The mean colour of every mask as a point of the HSV cone.

    Args:
        image: (H, W, C) uint8, C in {1, 3}.
        instances: N >= 0 cells of the image.

    Returns:
        (N, 3) float32: saturation x cos(hue) and saturation x sin(hue), both in [-1, 1], and value in [0, 1], of the
        mean RGB in the mask. An empty mask is black.

    Raises:
        ShapeError: the image is no such array, or of another size than the instances.
    """
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.shape[:2] != instances.shape:
        raise ShapeError(f"the image is {image.shape}; expected {(*instances.shape, 3)} or {(*instances.shape, 1)}")
    means = np.zeros((len(instances), 3), np.float32)
    for i, ((x0, y0, x1, y1), mask) in enumerate(zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True)):
        if mask.any():
            means[i] = image[y0:y1, x0:x1][mask].mean(axis=0) / 255
    if not len(means):
        return means
    hue, saturation, value = cv2.cvtColor(means[None], cv2.COLOR_RGB2HSV)[0].T
    angle = np.deg2rad(hue)
    return np.stack([saturation * np.cos(angle), saturation * np.sin(angle), value], axis=1).astype(np.float32)


def hsv_filter(
    image: UInt8Array,
    instances: Instances,
    *,
    known_colours: FloatArray | None = None,
    seed: int = 0,
) -> Instances:
    """The masks of a colour image whose colour is that of cells, in their order.

    The masks' mean colours fall into two clusters. With known colours the clusters stay whose centre lies among them,
    no farther from their median than 90 percent of them do, and always the nearest. Without, the one stays that is
    more saturated and darker, as stain is; both stay where saturation minus value differs by less than 0.3.

    Args:
        image: (H, W, C) uint8, C in {1, 3}; a grey image, also one of three equal channels, drops nothing.
        instances: N >= 0 masks.
        known_colours: (K, 3) `cell_colours` of labelled cells, of this image or of others of the same stain.
        seed: of k-means.

    Raises:
        ShapeError: the image is of another size than the instances, or the known colours are not (K, 3).
        NonFiniteError: a known colour is NaN or infinite.
    """
    colours = cell_colours(image, instances)
    if known_colours is not None and (known_colours.ndim != 2 or known_colours.shape[1] != 3):
        raise ShapeError(f"known colours are {known_colours.shape}; expected (K, 3) from cell_colours")
    if known_colours is not None and not np.isfinite(known_colours).all():
        raise NonFiniteError("known colours hold NaN or infinity; give those of cell_colours")
    if image.shape[2] == 1 or (image == image[:, :, :1]).all() or len(instances) < 2:
        return instances
    known = known_colours if known_colours is not None and len(known_colours) else None
    count = min(CLUSTERS, len(np.unique(colours, axis=0)))
    kmeans = KMeans(n_clusters=count, n_init=4, random_state=seed).fit(colours)
    centres = kmeans.cluster_centers_
    wanted = _stained(centres) if known is None else _among(centres, known)
    return instances.take(np.flatnonzero(wanted[kmeans.labels_]))


def _among(centres: FloatArray, known: FloatArray) -> BoolArray:
    usual = np.median(known, axis=0)
    reach = np.percentile(np.linalg.norm(known - usual, axis=1), REACH)
    away = np.linalg.norm(centres - usual, axis=1)
    return np.asarray(away <= max(reach, float(away.min())))


def _stained(centres: FloatArray) -> BoolArray:
    stain = np.hypot(centres[:, 0], centres[:, 1]) - centres[:, 2]
    return np.asarray(stain > stain.max() - APART)
