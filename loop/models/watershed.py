"""From interior and border probabilities to separate cells."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.morphology import reconstruction
from skimage.segmentation import watershed

from loop.config import InstanceConfig
from loop.errors import NonFiniteError, ShapeError
from loop.masks import from_label_image
from loop.types import BoolArray, FloatArray, Instances, IntArray, Source


def instances_from_maps(
    probs: FloatArray,
    config: InstanceConfig,
    *,
    nuclei: FloatArray | None = None,
    distance: FloatArray | None = None,
    image_id: str = "",
    source: Source = "model",
    model_version: str = "",
) -> Instances:
    """The cells of an image, by a watershed from seeds where the interior is sure and the border is not.

    Where nuclei are known each of them is a seed, and only pieces of the interior without a nucleus are seeded by
    their shape.

    Args:
        probs: (2, H, W) float32 in [0, 1], interior (the whole cell) and border.
        config: thresholds.
        nuclei: (H, W) float32 in [0, 1], where nuclei are; None where the model does not say.
        distance: (H, W) float32 in [0, 1], 1 in the middle of each cell and 0 outside; None likewise. See
            `smoothed_energy`.
        image_id: goes into the instances.
        source: goes into the instances.
        model_version: goes into the instances.

    Returns:
        N >= 0 cells that do not overlap, each of one part and without holes smaller than itself, of at least
        `min_area` px and `min_score`; score = mean interior probability in the mask.

    Raises:
        ShapeError: `probs` is not (2, H, W).
        NonFiniteError: a probability is NaN or infinite; the text names the image.
    """
    labels, scores = segment(probs, config, nuclei=nuclei, distance=distance, image_id=image_id)
    kept = np.flatnonzero(scores >= config.min_score)
    table = np.zeros(len(scores) + 1, np.int32)
    table[kept + 1] = np.arange(1, len(kept) + 1)
    return from_label_image(
        table[labels], image_id=image_id, source=source, scores=scores[kept], model_version=model_version
    )


def segment(
    probs: FloatArray,
    config: InstanceConfig,
    *,
    nuclei: FloatArray | None = None,
    distance: FloatArray | None = None,
    image_id: str = "",
) -> tuple[IntArray, FloatArray]:
    """The label image of all cells of at least `min_area` px, whatever their score, and their scores.

    Returns:
        (H, W) int32, 0 = background, 1 .. N without gaps; (N,) float32 scores in [0, 1].

    Raises:
        ShapeError, NonFiniteError: as `instances_from_maps`.
    """
    check_maps(probs, image_id)
    for name, found in (("nuclei", nuclei), ("distances", distance)):
        if found is not None and not np.isfinite(found).all():
            raise NonFiniteError(f"the {name} of image {image_id!r} hold NaN or infinity; train the model again")
    interior = probs[0]
    energy = smoothed_energy(probs, config, distance)
    mask = interior > config.foreground
    seeds = _seeds(energy, mask, config)
    if nuclei is not None:
        seeds = _nuclear_seeds(nuclei, mask, seeds, config)
    labels = watershed(-energy, seeds, mask=mask).astype(np.int32)
    labels = fill_holes(labels)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    kept = np.flatnonzero(areas >= config.min_area)
    table = np.zeros(len(areas), np.int32)
    table[kept] = np.arange(1, len(kept) + 1)
    labels = table[labels]
    sums = np.bincount(labels.ravel(), weights=interior.ravel(), minlength=len(kept) + 1)[1:]
    return labels, np.clip(sums / areas[kept], 0, 1).astype(np.float32)


def smoothed_energy(probs: FloatArray, config: InstanceConfig, distance: FloatArray | None = None) -> FloatArray:
    """Interior minus border, lightly smoothed: (H, W) float32 in [-1, 1], high in the middle of cells.

    Where a distance map is there, the mean of both. On 14 validation images of DSB2018 and a pix2pix of 500 steps that
    gave AP 0.307, interior minus border alone 0.272, the distance alone 0.282, their product 0.277, each with the best
    of four `seed` and two `split`.
    """
    energy = np.ascontiguousarray(probs[0] - probs[1], dtype=np.float32)
    if distance is not None:
        energy = np.ascontiguousarray((energy + distance) / 2, dtype=np.float32)
    if config.smooth_px > 0:
        energy = cv2.GaussianBlur(energy, (0, 0), config.smooth_px)
    return energy


def fill_holes(labels: IntArray) -> IntArray:
    """A copy in which background that one label encloses becomes that label, unless it is larger than its cell.

    A hole is a 4-connected piece of background with one label only around it and no pixel at the image's edge.

    Args:
        labels: (H, W) int32, 0 = background.
    """
    background = (labels == 0).astype(np.uint8)
    n, pieces, stats, _ = cv2.connectedComponentsWithStats(background, connectivity=4)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    values = labels.astype(np.float32)
    highest = cv2.dilate(values, cross)
    lowest = cv2.erode(np.where(labels == 0, np.float32(np.inf), values), cross)
    rim = (labels == 0) & (highest > 0)
    above = np.zeros(n)
    below = np.full(n, np.inf)
    np.maximum.at(above, pieces[rim], highest[rim])
    np.minimum.at(below, pieces[rim], lowest[rim])
    at_edge = np.zeros(n, np.bool_)
    for line in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        at_edge[line] = True
    areas = np.bincount(labels.ravel())
    owner = np.where((above == below) & ~at_edge, above, 0).astype(np.int64)
    owner[0] = 0
    owner[stats[:, cv2.CC_STAT_AREA] > areas[owner]] = 0
    return np.where(labels == 0, owner[pieces], labels).astype(np.int32)


def check_maps(probs: npt.NDArray[Any], image_id: str) -> None:
    """Refuses maps of another shape than (2, H, W) (ShapeError) or with NaN or infinity (NonFiniteError)."""
    if probs.ndim != 3 or probs.shape[0] != 2 or probs.size == 0:
        raise ShapeError(f"probability maps of {image_id!r} are {probs.shape}; expected (2, H, W)")
    bad = int(np.count_nonzero(~np.isfinite(probs)))
    if bad:
        raise NonFiniteError(
            f"{bad} of {probs.size} probabilities of image {image_id!r} are NaN or infinite; "
            "the model is damaged: train it again or go back to the one before"
        )


def _seeds(energy: FloatArray, mask: BoolArray, config: InstanceConfig) -> IntArray:
    """(H, W) int32 markers: the middles of pieces of high energy, and the whole of each piece of the mask without one.

    A middle is a maximum of ln(1 + d), d being the smoothed distance to the edge of the high energy in px, that is
    higher by `split` than the saddle towards any higher maximum: cells that touch part at their necks.
    """
    high = (energy > config.seed) & mask
    distance = cv2.distanceTransform(np.pad(high.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    height = np.log1p(cv2.GaussianBlur(distance, (0, 0), 1.0)) * high
    flooded = reconstruction(np.maximum(height - config.split, 0), height, method="dilation")
    seeds, n_seeds = ndimage.label((height - flooded >= 0.999 * np.minimum(config.split, height)) & high)
    pieces, n_pieces = ndimage.label(mask)
    has_seed = np.zeros(n_pieces + 1, np.bool_)
    has_seed[pieces[seeds > 0]] = True
    has_seed[0] = True
    return np.where(has_seed[pieces], seeds, pieces + n_seeds).astype(np.int32)


def _nuclear_seeds(nuclei: FloatArray, mask: BoolArray, seeds: IntArray, config: InstanceConfig) -> IntArray:
    """(H, W) int32 markers: the nuclei inside the mask, and the shape's seeds in pieces of the mask without a nucleus.

    A nucleus is a connected piece above the foreground threshold that, smoothed away, is no speck: a quarter of the
    smallest cell's area or more.
    """
    found, n = ndimage.label((nuclei > config.foreground) & mask)
    areas = np.bincount(found.ravel(), minlength=n + 1)
    found[areas[found] < max(config.min_area / 4, 1)] = 0
    pieces, n_pieces = ndimage.label(mask)
    has_nucleus = np.zeros(n_pieces + 1, np.bool_)
    has_nucleus[pieces[found > 0]] = True
    return np.where(has_nucleus[pieces], found, np.where(seeds > 0, seeds + n, 0)).astype(np.int32)
