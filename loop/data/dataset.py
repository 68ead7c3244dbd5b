"""Training crops from labelled images that are kept in memory as uint8."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from loop.config import ModelConfig, TrainConfig
from loop.data.augment import LabelImage, random_intensity, random_map
from loop.data.intensity import is_ambiguous, stretch
from loop.data.store import read_image
from loop.errors import InputError, LabelError, ShapeError
from loop.types import FloatArray, Instances, Sample, UInt8Array


class Batch(NamedTuple):
    """Crops to learn from, float32.

    `image` (B, C, S, S) roughly in [0, 1]; `target` (B, 2, S, S) interior and border in {0, 1}; `weight` (B, 1, S, S)
    how much each pixel counts, >= 0.
    """

    image: FloatArray
    target: FloatArray
    weight: FloatArray


class _Teacher(NamedTuple):
    pixels: UInt8Array
    labels: LabelImage
    weights: FloatArray
    centres_xy: FloatArray
    invert: float


class CropStream:
    """An endless stream of batches; batch i is a function of the seed and i alone, whoever asks for it and when.

    Images are drawn so that frequent modalities (or groups, where no modality is known) do not crowd out rare ones:
    an image's chance is 1 / sqrt(images of its kind). Four crops in five are centred near a cell. Images of which it
    is not plain whether their background is dark are inverted in half of their crops.
    """

    def __init__(self, samples: Sequence[Sample], model: ModelConfig, config: TrainConfig) -> None:
        """Reads all images.

        Args:
            samples: at least one; images without cells teach background.
            model: says how many channels a network takes and whether bright backgrounds are inverted.
            config: crop size, batch size, augmentation and seed.

        Raises:
            InputError: no samples.
            ImageError: an image cannot be read.
            ShapeError: the cells of an image are of another size than its pixels.
        """
        if not samples:
            raise InputError("0 labelled images given; training needs at least one")
        self._config = config
        self._teachers = [_teacher(sample, model, config) for sample in samples]
        self._chances = _chances(samples)

    def batch(self, index: int, size: int | None = None) -> Batch:
        """Batch number `index` (>= 0) of `size` crops (the configured number by default)."""
        crops = [self._crop(index, i) for i in range(size or self._config.batch)]
        return Batch(*(np.stack(arrays) for arrays in zip(*crops, strict=True)))

    def _crop(self, index: int, place: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        config = self._config
        rng = np.random.default_rng([config.seed, index, place])
        teacher = self._teachers[int(rng.choice(len(self._teachers), p=self._chances))]
        warp = random_map(rng, config.crop, _centre(rng, teacher, config.crop), config)
        image = random_intensity(rng, warp.image(teacher.pixels), config.intensity, teacher.invert)
        labels = warp.labels(teacher.labels)
        return image.transpose(2, 0, 1), targets(labels), pixel_weights(labels, teacher.weights)[None]


def label_map(instances: Instances) -> LabelImage:
    """(H, W) uint16, 0 = background, i-th cell = i + 1; where cells overlap the smaller one is drawn on top.

    Raises:
        LabelError: more than 65,535 cells.
    """
    if len(instances) > np.iinfo(np.uint16).max:
        raise LabelError(f"{instances.image_id}: {len(instances)} cells; at most 65535 an image, so cut it into pieces")
    labels = np.zeros(instances.shape, np.uint16)
    areas = [int(mask.sum()) for mask in instances.masks]
    for i in np.argsort([-a for a in areas], kind="stable"):
        x0, y0, x1, y1 = (int(v) for v in instances.boxes_xyxy[i])
        labels[y0:y1, x0:x1][instances.masks[i]] = i + 1
    return labels


def targets(labels: LabelImage) -> FloatArray:
    """What the two heads learn: interior (the whole cell) and border, (2, H, W) float32 in {0, 1}.

    The border is a band around each cell: its outermost pixels and the background pixels next to them.
    """
    kernel = np.ones((3, 3), np.uint8)
    highest, lowest = cv2.dilate(labels, kernel), cv2.erode(labels, kernel)
    return np.stack([labels > 0, highest != lowest]).astype(np.float32)


def pixel_weights(labels: LabelImage, weights: FloatArray) -> FloatArray:
    """How much each pixel counts, (H, W) float32: its cell's weight, 1 on the background.

    Each pixel takes the lowest weight of itself and its eight neighbours, so the border of a cell of weight 0 is
    ignored with it.

    Args:
        labels: (H, W) uint16, i + 1 = cell i.
        weights: (N,) float32 >= 0.
    """
    if bool(np.all(weights == 1)):
        return np.ones(labels.shape, np.float32)
    table = np.concatenate([np.ones(1, np.float32), weights])
    lowest: FloatArray = cv2.erode(table[labels], np.ones((3, 3), np.uint8))
    return lowest


def _teacher(sample: Sample, model: ModelConfig, config: TrainConfig) -> _Teacher:
    stored = read_image(sample.image.path)
    if stored.pixels.shape[:2] != sample.instances.shape:
        raise ShapeError(
            f"{sample.image.image_id}: the image is {stored.pixels.shape[:2]} px, its cells are drawn on "
            f"{sample.instances.shape}; give labels of the image's size"
        )
    stretched = stretch(stored.pixels, model.in_channels, dark_background=model.dark_background)
    boxes = sample.instances.boxes_xyxy.astype(np.float32)
    return _Teacher(
        pixels=stretched,
        labels=label_map(sample.instances),
        weights=sample.instances.weights,
        centres_xy=((boxes[:, :2] + boxes[:, 2:] - 1) / 2).astype(np.float32),
        invert=0.5 if model.dark_background and is_ambiguous(stretched) else config.invert,
    )


def _chances(samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
    kinds = [s.image.modality for s in samples]
    if not any(kinds):
        kinds = [s.image.group for s in samples]
    counts = Counter(kinds)
    chances = np.array([1 / np.sqrt(counts[kind]) if kind else 1.0 for kind in kinds], dtype=np.float64)
    return np.asarray(chances / chances.sum())


def _centre(rng: np.random.Generator, teacher: _Teacher, crop: int) -> tuple[float, float]:
    height, width = teacher.labels.shape
    if len(teacher.centres_xy) and rng.random() < 0.8:
        x, y = teacher.centres_xy[int(rng.integers(len(teacher.centres_xy)))]
        shift = rng.uniform(-crop / 3, crop / 3, 2)
        return float(np.clip(x + shift[0], 0, width - 1)), float(np.clip(y + shift[1], 0, height - 1))
    return float(rng.uniform(0, width - 1)), float(rng.uniform(0, height - 1))
