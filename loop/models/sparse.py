"""From a sparse network's windows to the cells of a whole image, and to maps that a click can be answered from."""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypedDict

import cv2
import numpy as np

from loop.config import InstanceConfig
from loop.data.preprocess import Window, blend, tiles, unpad
from loop.models.dense import padded_windows
from loop.models.dihedral import TRANSFORMS, apply, invert, invert_instances
from loop.models.queries import instances_from_queries
from loop.models.stitch import fuse, merge_windows
from loop.types import FloatArray, Instances, UInt8Array

logger = logging.getLogger(__name__)

LOOSE = 0.05
FULL = 0.9


class QueryBatch(NamedTuple):
    """Probabilities of B windows: `masks` (B, N, h, w), `confidences` (B, N), `dense` (B, K, H, W); all float32."""

    masks: FloatArray
    confidences: FloatArray
    dense: FloatArray


class _Names(TypedDict):
    image_id: str
    model_version: str


Forward = Callable[[FloatArray], QueryBatch]


class Seen(NamedTuple):
    """What a sparse network sees in an image: cells, (H, W) interior, (K, H, W) of its dense heads (K may be 0)."""

    instances: Instances
    interior: FloatArray
    dense: FloatArray


def look(
    forward: Forward,
    stretched: UInt8Array,
    config: InstanceConfig,
    *,
    at_once: int = 1,
    image_id: str = "",
    model_version: str = "",
) -> Seen:
    """Cells and maps of an image of any size.

    The image is cut into windows of `tile`, which must be the side of the training crops: a query answers for places
    of a frame of that size; smaller images are filled up with black, as the crops were. Cells of overlapping windows
    are joined. With `tta` above 1 the cells of several flips and turns are fused: one found in few of them loses score.
    Windows overlap by a third of their side at most. A window with nearly as many cells as the network has queries is
    named in the log: some may have been missed.

    All cells of a score of `LOOSE` or more are given; what to believe of them is decided once, at the end.

    Args:
        forward: the network.
        stretched: (H, W, C) uint8 as `stretch` gives it.
        config: `tile`, `overlap`, `tta`, `min_area`, and `floor` for the interior.
        at_once: windows a pass.
        image_id: goes into the instances.
        model_version: goes into the instances.
    """
    names = _Names(image_id=image_id, model_version=model_version)
    found: list[Instances] = []
    maps: list[FloatArray] = []
    for view in TRANSFORMS[: config.tta]:
        turned = np.ascontiguousarray(apply(view, stretched.transpose(2, 0, 1)).transpose(1, 2, 0))
        seen = _one_view(forward, turned, config, at_once, names)
        found.append(invert_instances(view, seen[0]))
        maps.append(invert(view, seen[1]))
    together = np.asarray(sum(maps[1:], maps[0]) / np.float32(len(maps)))
    return Seen(fuse(found) if len(found) > 1 else found[0], together[0], together[1:])


def _one_view(
    forward: Forward, stretched: UInt8Array, config: InstanceConfig, at_once: int, names: _Names
) -> tuple[Instances, FloatArray]:
    """The cells and the (1 + K, H, W) maps of one view of the image."""
    shape = (stretched.shape[0], stretched.shape[1])
    overlap = min(config.overlap, config.tile // 3)
    windows = tiles(shape, config.tile, overlap)
    cells: list[tuple[Window, Instances]] = []

    def parts() -> Iterator[tuple[Window, FloatArray]]:
        for start in range(0, len(windows), at_once):
            together = windows[start : start + at_once]
            batch = forward(padded_windows(stretched, together, config.tile, mirror=False))
            for i, window in enumerate(together):
                part = QueryBatch(batch.masks[i], batch.confidences[i], batch.dense[i])
                found, maps = _read(part, window, config, names)
                _warn_if_full(window, found, len(part.confidences), config.floor)
                cells.append((window, found))
                yield window, maps

    maps = blend(shape, parts(), overlap)
    return merge_windows(shape, cells), maps


def _warn_if_full(window: Window, found: Instances, queries: int, floor: float) -> None:
    believed = int(np.count_nonzero(found.scores >= floor))
    if believed >= FULL * queries:
        logger.warning(
            "%s: %d cells in the window at row %d, column %d, and the network can give %d: some may be missing; train "
            "with smaller crops (train.crop) or more queries (model.queries)",
            *(found.image_id or "an image", believed, window.y0, window.x0, queries),
        )


def _read(part: QueryBatch, window: Window, config: InstanceConfig, names: _Names) -> tuple[Instances, FloatArray]:
    """The cells of one window and its (1 + K, h, w) maps; `part` holds (N, ., .), (N,) and (K, ., .)."""
    size = (window.y1 - window.y0, window.x1 - window.x0)
    wide = config.tile // part.masks.shape[1]
    found = instances_from_queries(
        part.masks, part.confidences, size, config, floor=min(LOOSE, config.floor), stride=wide, **names
    )
    interior = interior_of(part.masks, part.confidences, config.floor)
    large = cv2.resize(interior, (config.tile, config.tile), interpolation=cv2.INTER_LINEAR)[None]
    return found, unpad(np.concatenate([large, part.dense]), size)


def interior_of(masks: FloatArray, confidences: FloatArray, floor: float) -> FloatArray:
    """How likely each pixel is inside a cell: the highest probability of the queries that are believed.

    Args:
        masks: (N, h, w) in [0, 1].
        confidences: (N,) in [0, 1]; queries below `floor` count by their confidence, the others wholly.
        floor: as `InstanceConfig.floor`.

    Returns:
        (h, w) float32 in [0, 1].
    """
    belief = np.where(confidences >= floor, 1, confidences).astype(np.float32)
    highest: FloatArray = (masks * belief[:, None, None]).max(axis=0)
    return highest


def border_of(cells: Instances) -> FloatArray:
    """A band around each cell, (H, W) float32 in {0, 1}: its outermost pixels and those next to them."""
    border = np.zeros(cells.shape, np.float32)
    kernel = np.ones((3, 3), np.uint8)
    for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True):
        padded = np.pad(mask.astype(np.uint8), 2)
        band = (cv2.dilate(padded, kernel) - cv2.erode(padded, kernel))[1:-1, 1:-1]
        top, left = max(y0 - 1, 0), max(x0 - 1, 0)
        view = border[top : y1 + 1, left : x1 + 1]
        np.maximum(view, band[top - y0 + 1 :, left - x0 + 1 :][: view.shape[0], : view.shape[1]], out=view)
    return border
