"""What train_small_sam.py learns from: crops of labelled images as SAM would see them, and simulated prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from loop.data.embeddings import to_encode
from loop.data.folder import read_labels
from loop.data.store import read_image
from loop.types import BoolArray, FloatArray, ImageRef, IntArray, UInt8Array

SIDE, PATCH = 512, 8
"""The longer side at which SAM sees an image, and that of its patches, px."""
ZOOM = (0.7, 1.4)
JITTER = 0.08
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Frame(NamedTuple):
    """A labelled image: pixels (H, W, 3) uint8 stretched, cells (H, W) int32, and for each cell its clump's number."""

    pixels: UInt8Array
    cells: IntArray
    clump_of: IntArray
    modality: str


class View(NamedTuple):
    """A square crop as SAM would see it: image (3, S, S) float32, cells (S, S) int32, and its corner (x, y) px."""

    image: FloatArray
    cells: IntArray
    clump_of: IntArray
    corner: FloatArray


class Asked(NamedTuple):
    """P prompts: points (P, K, 2) x, y px of the crop with labels (P, K), boxes (P, 4) or none."""

    points: FloatArray
    labels: FloatArray
    boxes: FloatArray | None


def read_frame(ref: ImageRef) -> Frame:
    """An image with its cells; cells within 1 px of each other are of one clump."""
    label_map = np.zeros((ref.height, ref.width), np.int32)
    cells = read_labels(ref)
    for i, (box, mask) in enumerate(zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True)):
        x0, y0, x1, y1 = box
        label_map[y0:y1, x0:x1][mask] = i + 1
    closed = cv2.dilate((label_map > 0).astype(np.uint8), np.ones((3, 3), np.uint8))
    pieces = cv2.connectedComponents(closed, connectivity=4)[1]
    clump_of = np.zeros(len(cells) + 1, np.int32)
    clump_of[label_map.ravel()] = pieces.ravel()
    clump_of[0] = 0
    return Frame(to_encode(read_image(ref.path).pixels), label_map, clump_of, ref.modality)


def draw_view(frame: Frame, crop: int, rng: np.random.Generator) -> View:
    """A random crop of `crop` px around a random cell, scaled as SAM scales, zoomed, turned and mirrored."""
    height, width = frame.cells.shape
    scale = SIDE / max(height, width) * float(np.exp(rng.uniform(*np.log(ZOOM))))
    side = crop / scale
    rows, columns = np.nonzero(frame.cells)
    middle = (height / 2, width / 2)
    if len(rows):
        k = int(rng.integers(len(rows)))
        middle = (rows[k], columns[k])
    top, left = (
        int(np.clip(m - rng.uniform(0.2, 0.8) * side, 0, max(0.0, n - side)))
        for m, n in zip(middle, (height, width), strict=True)
    )
    own = np.s_[top : min(height, round(top + side)), left : min(width, round(left + side))]
    size = tuple(min(crop, max(1, round(n * scale))) for n in frame.cells[own].shape)
    pixels = cv2.resize(frame.pixels[own], size[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    cells = cv2.resize(frame.cells[own], size[::-1], interpolation=cv2.INTER_NEAREST)
    image = pixels.astype(np.float32) * rng.uniform(0.8, 1.2) + rng.uniform(-20, 20)
    image = np.clip(image + rng.normal(0, rng.uniform(0, 6), image.shape), 0, 255)
    image = (image - MEAN) / DEVIATION
    whole: FloatArray = np.zeros((crop, crop, 3), np.float32)
    labels: IntArray = np.zeros((crop, crop), np.int32)
    whole[: size[0], : size[1]], labels[: size[0], : size[1]] = image, cells
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    whole, labels = np.rot90(whole, turns), np.rot90(labels, turns)
    if mirrored:
        whole, labels = whole[:, ::-1], labels[:, ::-1]
    corner = PATCH * rng.integers(0, SIDE // PATCH - crop // PATCH + 1, 2)
    planes: FloatArray = np.ascontiguousarray(whole.transpose(2, 0, 1))
    return View(planes, np.ascontiguousarray(labels), frame.clump_of, corner.astype(np.float32))


def draw_order(frames: Sequence[Frame]) -> npt.NDArray[np.float64]:
    """How likely each frame is drawn: half by image, half by modality."""
    kinds = [frame.modality for frame in frames]
    share = np.array([1 / kinds.count(kind) for kind in kinds]) / len(set(kinds))
    return 0.5 / len(frames) + 0.5 * share


def draw_point(mask: BoolArray, rng: np.random.Generator, depth: float) -> tuple[float, float]:
    """x, y of a random pixel's middle in a mask that is not empty, at least `depth` of the greatest depth inside."""
    inside = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    rows, columns = np.nonzero(inside >= max(depth * float(inside.max()), 1e-6))
    k = int(rng.integers(len(rows)))
    return columns[k] + 0.5, rows[k] + 0.5


def draw_box(mask: BoolArray, rng: np.random.Generator) -> list[float]:
    """x0, y0, x1, y1 of the mask's box, each side moved by up to some share of its length, 1 px at least."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
    sides = np.tile([box[2] - box[0], box[3] - box[1]], 2)
    return list(box + np.clip(rng.normal(0, np.maximum(JITTER * sides, 1.0)), -20, 20))


def corrections(
    masks: BoolArray, truth: BoolArray, count: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """`count` points (P, count, 2) and labels where P masks are wrong, or in the truth where one is right."""
    points, labels = [], []
    for mask, true in zip(masks, truth, strict=True):
        wrong = mask ^ true
        region = wrong if wrong.any() else true
        chosen = [draw_point(region, rng, 0.5) for _ in range(count)]
        points.append(chosen)
        labels.append([float(true[int(y), int(x)]) for x, y in chosen])
    return np.array(points, np.float32), np.array(labels, np.float32)
