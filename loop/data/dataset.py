"""Training crops from labelled images that are kept in memory as uint8."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loop.config import ModelConfig, TrainConfig
from loop.data.augment import SamplingMap, blank_out, random_intensity, random_map, veil
from loop.data.intensity import is_ambiguous, stretch
from loop.data.kinds import kinds
from loop.data.overlap_maps import overlap_map
from loop.data.store import read_image
from loop.data.targets import LabelLayers, cell_masks, pixel_weights, targets, visible_cells
from loop.errors import ConfigError, InputError, LabelError, ShapeError
from loop.masks import to_layers
from loop.types import BoolArray, FloatArray, Sample, UInt8Array

ZOOM_STEP = 1.2
ZOOM_TRIES = 24


class Batch(NamedTuple):
    """Crops to learn from.

    `image` (B, C, S, S) float32 roughly in [0, 1]; `target` (B, K, S, S) float32 in [0, 1], one map a head; `weight`
    (B, 1, S, S) float32 >= 0, how much each pixel counts; `overlap_map` (B, 1, S, S) float32 in [0, 1], or None where
    none is used; `masks` B arrays (n, S, S) bool, the cells of each crop, and `mask_weights` B arrays (n,) float32,
    >= 0; both empty where a network does not learn from masks. `pseudo` (B,) bool, which crops are of pseudo-labelled
    images, or None where there are none; `weak` (B, C, S, S) as `image`, moved and turned but otherwise unchanged, or
    None where nothing is compared with it.
    """

    image: FloatArray
    target: FloatArray
    weight: FloatArray
    overlap_map: FloatArray | None = None
    masks: tuple[BoolArray, ...] = ()
    mask_weights: tuple[FloatArray, ...] = ()
    pseudo: BoolArray | None = None
    weak: FloatArray | None = None

    def part(self, start: int, stop: int) -> "Batch":
        """The crops from `start` to `stop`, ends exclusive."""
        likely = None if self.overlap_map is None else self.overlap_map[start:stop]
        return Batch(
            self.image[start:stop],
            self.target[start:stop],
            self.weight[start:stop],
            likely,
            self.masks[start:stop],
            self.mask_weights[start:stop],
            None if self.pseudo is None else self.pseudo[start:stop],
            None if self.weak is None else self.weak[start:stop],
        )


@dataclass(frozen=True)
class Lesson:
    """What a network wants to be taught: its dense heads, and whether masks of single cells, at most so many a crop."""

    heads: tuple[str, ...] = ("interior", "border")
    most_cells: int | None = None


class _Teacher(NamedTuple):
    image_id: str
    pixels: UInt8Array
    layers: LabelLayers
    nuclei: LabelLayers | None
    known: LabelLayers | None
    likely: FloatArray | None
    weights: FloatArray
    centres_xy: FloatArray
    invert: float


class CropStream:
    """An endless stream of batches; batch i is a function of the seed and i alone, whoever asks for it and when.

    Images are drawn so that frequent modalities (or looks, where no modality is known) do not crowd out rare ones: an
    image's chance is (images of its kind) ** -`balance`. Four crops in five are centred near a cell. Images of which
    it is not plain whether their background is dark are inverted in half of their crops. Where there are
    pseudo-labelled images, `pseudo_share` of the crops are of them, as evenly spread over the batches as can be.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        model: ModelConfig,
        config: TrainConfig,
        lesson: Lesson | None = None,
        pseudo: Sequence[Sample] = (),
    ) -> None:
        """Reads all images.

        Args:
            samples: at least one; images without cells teach background.
            model: says how many channels a network takes and whether bright backgrounds are inverted.
            config: crop size, batch size, augmentation and seed.
            lesson: what is taught; interior and border by default. A crop with more than `most_cells` cells is taken
                larger, step by step, until it holds no more.
            pseudo: images whose cells are proposed by models: weight 0 = neither cell nor background.

        Raises:
            InputError: no samples.
            ConfigError: an overlap map without an overlap head.
            LabelError: a head whose labels are not there: nuclei that are not labelled in every image, or overlaps
                where no two cells overlap.
            ImageError: an image cannot be read.
            ShapeError: the cells of an image are of another size than its pixels.
        """
        if not samples:
            raise InputError("0 labelled images given; training needs at least one")
        self._lesson = lesson or Lesson()
        if config.overlap_map != "none" and "overlap" not in self._lesson.heads:
            raise ConfigError(
                f"train.overlap_map={config.overlap_map}, but the network has no overlap head; add overlap to "
                "model.heads (sparse_seu_net: model.overlap: true), or set train.overlap_map: none"
            )
        if "nuclei" in self._lesson.heads:
            _check_nuclei([*samples, *pseudo])
        self._config = config
        self._labelled = _Source([_teacher(sample, model, config, self._lesson) for sample in samples], samples, config)
        if "overlap" in self._lesson.heads:
            _check_overlaps(self._labelled.teachers)
        self._pseudo: _Source | None = None
        if pseudo and config.pseudo_share:
            self._pseudo = _Source([_teacher(sample, model, config, self._lesson) for sample in pseudo], pseudo, config)

    def batch(self, index: int, size: int | None = None) -> Batch:
        """Batch number `index` (>= 0) of `size` crops (the configured number by default).

        Raises:
            InputError: a crop holds too many cells however large it is taken; the text names the image.
        """
        n = size or self._config.batch
        crops = [self._crop(index, i, is_pseudo=self._is_pseudo(index * n + i)) for i in range(n)]
        likely = [crop.overlap_map for crop in crops if crop.overlap_map is not None]
        weak = [crop.weak for crop in crops if crop.weak is not None]
        return Batch(
            image=np.concatenate([crop.image for crop in crops]),
            target=np.concatenate([crop.target for crop in crops]),
            weight=np.concatenate([crop.weight for crop in crops]),
            overlap_map=np.concatenate(likely) if likely else None,
            masks=tuple(mask for crop in crops for mask in crop.masks),
            mask_weights=tuple(weights for crop in crops for weights in crop.mask_weights),
            pseudo=np.array([self._is_pseudo(index * n + i) for i in range(n)]) if self._pseudo else None,
            weak=np.concatenate(weak) if weak else None,
        )

    def _is_pseudo(self, number: int) -> bool:
        """Whether crop `number` of the whole stream is of a pseudo-labelled image."""
        share = self._config.pseudo_share
        return self._pseudo is not None and int((number + 1) * share) > int(number * share)

    def _crop(self, index: int, place: int, *, is_pseudo: bool) -> Batch:
        """A batch of one crop."""
        config, lesson = self._config, self._lesson
        rng = np.random.default_rng([config.seed, index, place])
        source = self._pseudo if is_pseudo and self._pseudo else self._labelled
        teacher = source.teachers[int(rng.choice(len(source.teachers), p=source.chances))]
        warp = random_map(rng, config.crop, _centre(rng, teacher, config.crop), config)
        warp, layers = _zoomed(warp, teacher, lesson.most_cells)
        image = weak = warp.image(teacher.pixels)
        if config.veil and rng.random() < config.veil:
            image = veil(rng, image)
        image = random_intensity(rng, image, config.intensity, teacher.invert)
        if config.dropout and rng.random() < config.dropout:
            image = blank_out(rng, image)
        nuclei = None if teacher.nuclei is None else warp.layers(teacher.nuclei)
        if lesson.most_cells is not None:  # a cell and its mirror image are not one cell
            height, width = teacher.pixels.shape[:2]
            outside = ~warp.inside((height, width))
            image[outside] = 0
            weak[outside] = 0
            layers[:, outside] = 0
        weights = pixel_weights(layers, teacher.weights)
        if teacher.known is not None:
            weights = weights * (warp.layers(teacher.known)[0] > 0)
        return Batch(
            image=image.transpose(2, 0, 1)[None],
            target=targets(layers, lesson.heads, nuclei)[None],
            weight=weights[None, None],
            overlap_map=None if teacher.likely is None else warp.map(teacher.likely)[None, None],
            masks=(cell_masks(layers),) if lesson.most_cells is not None else (),
            mask_weights=(_weights_of(layers, teacher.weights),) if lesson.most_cells is not None else (),
            weak=weak.transpose(2, 0, 1)[None] if self._pseudo and config.consistency else None,
        )


class _Source:
    """Images with the chance of each to give a crop."""

    def __init__(self, teachers: list[_Teacher], samples: Sequence[Sample], config: TrainConfig) -> None:
        self.teachers = teachers
        self.chances = _chances(samples, teachers, config.balance)


def _weights_of(layers: LabelLayers, weights: FloatArray) -> FloatArray:
    return weights[np.array(visible_cells(layers), np.int64) - 1]


def _zoomed(warp: SamplingMap, teacher: _Teacher, most: int | None) -> tuple[SamplingMap, LabelLayers]:
    """The map, its field made smaller around its middle until at most `most` cells are seen, and the cells in it."""
    for _ in range(ZOOM_TRIES):
        layers = warp.layers(teacher.layers)
        if most is None or len(visible_cells(layers)) <= most:
            return warp, layers
        warp = warp.zoomed(ZOOM_STEP)
    raise InputError(
        f"{teacher.image_id}: more than {most} cells lie in a crop however small its field; set model.queries higher "
        f"(1.2 times the cells of a crop), or check whether the labels lie on top of each other"
    )


def _check_nuclei(samples: Sequence[Sample]) -> None:
    without = [sample.image.image_id for sample in samples if sample.nuclei is None]
    if without:
        raise LabelError(
            f"the head nuclei is asked for, but {len(without)} of {len(samples)} images have no labelled nuclei, "
            f"first {without[0]}; add nuclei/STEM.png, or leave nuclei out of model.heads"
        )


def _check_overlaps(teachers: Sequence[_Teacher]) -> None:
    if all(len(teacher.layers) == 1 for teacher in teachers):
        raise LabelError(
            f"the overlap head is asked for, but no two cells overlap in any of the {len(teachers)} images; give "
            "labels in which cells overlap (several layers in labels/STEM.tif), or leave the overlap head out"
        )


def _teacher(sample: Sample, model: ModelConfig, config: TrainConfig, lesson: Lesson) -> _Teacher:
    stored = read_image(sample.image.path)
    for name, cells in (("cells", sample.instances), ("nuclei", sample.nuclei)):
        if cells is not None and stored.pixels.shape[:2] != cells.shape:
            raise ShapeError(
                f"{sample.image.image_id}: the image is {stored.pixels.shape[:2]} px, its {name} are drawn on "
                f"{cells.shape}; give labels of the image's size"
            )
    if sample.known is not None and sample.known.shape != sample.instances.shape:
        raise ShapeError(
            f"{sample.image.image_id}: the cells are drawn on {sample.instances.shape}, the done area on "
            f"{sample.known.shape}; give both in the image's size"
        )
    stretched = stretch(stored.pixels, model.in_channels, dark_background=model.dark_background)
    boxes = sample.instances.boxes_xyxy.astype(np.float32)
    likely = None
    if config.overlap_map != "none":
        likely = overlap_map(config.overlap_map, sample.instances, sample.nuclei)
    return _Teacher(
        image_id=sample.image.image_id,
        pixels=stretched,
        layers=to_layers(sample.instances),
        nuclei=to_layers(sample.nuclei) if sample.nuclei is not None and "nuclei" in lesson.heads else None,
        known=None if sample.known is None else sample.known[None].astype(np.uint16),
        likely=likely,
        weights=sample.instances.weights,
        centres_xy=((boxes[:, :2] + boxes[:, 2:] - 1) / 2).astype(np.float32),
        invert=0.5 if model.dark_background and is_ambiguous(stretched) else config.invert,
    )


def _chances(samples: Sequence[Sample], teachers: Sequence[_Teacher], balance: float) -> npt.NDArray[np.float64]:
    named: list[str] | list[int] = [sample.image.modality for sample in samples]
    if not any(named):
        named = kinds([teacher.pixels for teacher in teachers])
    counts = Counter(named)
    chances = np.array([counts[kind] ** -balance for kind in named], dtype=np.float64)
    return np.asarray(chances / chances.sum())


def _centre(rng: np.random.Generator, teacher: _Teacher, crop: int) -> tuple[float, float]:
    height, width = teacher.layers.shape[1:]
    if len(teacher.centres_xy) and rng.random() < 0.8:
        x, y = teacher.centres_xy[int(rng.integers(len(teacher.centres_xy)))]
        shift = rng.uniform(-crop / 3, crop / 3, 2)
        return float(np.clip(x + shift[0], 0, width - 1)), float(np.clip(y + shift[1], 0, height - 1))
    return float(rng.uniform(0, width - 1)), float(rng.uniform(0, height - 1))
