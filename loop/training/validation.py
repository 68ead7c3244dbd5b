"""What a training asks of images that it does not learn from: its AP on the way, and the thresholds at its end."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import read_image
from loop.errors import ShapeError
from loop.metrics.instance import evaluate, image_ap
from loop.models.segmenter import Segmenter, Sighting
from loop.types import Instances, Sample, UInt8Array

ON_THE_WAY = (8, 2**20)
AT_THE_END = (24, 24 * 520 * 520)
"""At most so many images, and so many pixels of them all: 2**20 are 8 images of 362 x 362 px."""

FIGURES = ("ap", "ap50", "macro_ap", "f1")
DENSE_GRID: Mapping[str, tuple[float, ...]] = {
    "split": (0.1, 0.2, 0.3, 0.45),
    "seed": (0.25, 0.4, 0.55),
    "foreground": (0.4, 0.5, 0.6),
    "min_score": (0.35, 0.5, 0.65, 0.75, 0.8, 0.85),
}
SPARSE_GRID: Mapping[str, tuple[float, ...]] = {"floor": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)}


class Validation:
    """Images with true cells, kept in memory, on which a net is tried with a training's settings."""

    def __init__(
        self, samples: Sequence[Sample], model: ModelConfig, config: TrainConfig, instances: InstanceConfig
    ) -> None:
        """Reads the images; of many, some of each modality.

        Args:
            samples: at least one; none of them may be learnt from. At most 24 are used, with at most as many pixels
                as 24 images of 520 x 520 px, and one in any case.
            model: what the nets are built from.
            config: device, precision and seed.
            instances: the thresholds to start from.

        Raises:
            ImageError: an image cannot be read.
            ShapeError: the cells of an image are of another size than its pixels.
        """
        self._samples = _within(_spread(samples, config.seed), *AT_THE_END)
        self._pixels = [read_image(sample.image.path).pixels for sample in self._samples]
        for pixels, sample in zip(self._pixels, self._samples, strict=True):
            image, cells = sample.image, sample.instances
            if pixels.shape[:2] != cells.shape:
                raise ShapeError(
                    f"{image.image_id}: the image is {pixels.shape[:2]} px, its cells are drawn on {cells.shape}; give "
                    "labels of the image's size"
                )
        self._model = model
        self._config = config
        self._instances = instances

    def ap(self, net: nn.Module) -> float:
        """Mean AP .50:.95 of eight images, 2**20 px at most; the net must be in evaluation mode and is not changed."""
        segmenter = self._segmenter(net)
        few = {sample.image.image_id for sample in _within(self._samples, *ON_THE_WAY)}
        seen = [both for both in zip(self._pixels, self._samples, strict=True) if both[1].image.image_id in few]
        return float(np.mean([image_ap(segmenter.cells(_look(segmenter, *both)), both[1].instances) for both in seen]))

    def fit(self, net: nn.Module) -> tuple[InstanceConfig, dict[str, float]]:
        """The thresholds that serve the validation images best, and AP, AP50, macro AP and F1 with them.

        One threshold after the other over a small grid, each kept only where it raises the mean of these four figures,
        so that neither ranking nor counting, neither frequent nor rare modalities are sacrificed. Each image goes
        through the network once.

        Raises:
            NonFiniteError: the net gives NaN or infinity; the text names the image.
        """
        segmenter = self._segmenter(net)
        sightings = [_look(segmenter, *seen) for seen in zip(self._pixels, self._samples, strict=True)]
        trial = _Trial(segmenter, sightings, self._samples)
        best = self._instances
        figures = trial.measure(best)
        for name, values in (SPARSE_GRID if segmenter.is_sparse else DENSE_GRID).items():
            for value in values:
                tried = best.model_copy(update={name: value})
                found = figures if tried == best else trial.measure(tried)
                if _worth(found) > _worth(figures):
                    best, figures = tried, found
        return best, {key: float(figures[key]) for key in FIGURES}

    def _segmenter(self, net: nn.Module) -> Segmenter:
        return Segmenter(
            net, self._model, self._instances, device=self._config.device, precision=self._config.precision
        )


class _Trial:
    """What thresholds give on images that were looked at; the cells of all scores are drawn once."""

    def __init__(self, segmenter: Segmenter, sightings: Sequence[Sighting], samples: Sequence[Sample]) -> None:
        self._segmenter = segmenter
        self._sightings = sightings
        self._samples = samples
        self._drawn: dict[InstanceConfig, list[Instances]] = {}

    def measure(self, config: InstanceConfig) -> dict[str, Any]:
        """What `evaluate` says of the cells with these thresholds."""
        found = self._cells(config)
        pairs = [(cells, sample.instances) for cells, sample in zip(found, self._samples, strict=True)]
        return evaluate(pairs, modalities=[sample.image.modality for sample in self._samples])

    def _cells(self, config: InstanceConfig) -> list[Instances]:
        if self._segmenter.is_sparse:
            return [self._segmenter.cells(sighting, config) for sighting in self._sightings]
        every = config.model_copy(update={"min_score": 0.0})
        if every not in self._drawn:
            self._drawn[every] = [self._segmenter.cells(sighting, every) for sighting in self._sightings]
        return [cells.take(np.flatnonzero(cells.scores >= config.min_score)) for cells in self._drawn[every]]


def _look(segmenter: Segmenter, pixels: UInt8Array, sample: Sample) -> Sighting:
    return segmenter.look(pixels, image_id=sample.image.image_id)


def _worth(figures: Mapping[str, Any]) -> float:
    return float(np.mean([figures[key] for key in FIGURES]))


def _spread(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """All in random order, the modalities taking turns."""
    rng = np.random.default_rng(seed)
    shuffled = [samples[int(i)] for i in rng.permutation(len(samples))]
    turns: dict[str, int] = {}
    ordered = []
    for place, sample in enumerate(shuffled):
        turn = turns[sample.image.modality] = turns.get(sample.image.modality, -1) + 1
        ordered.append((turn, place, sample))
    return [sample for _, _, sample in sorted(ordered, key=lambda entry: entry[:2])]


def _within(samples: Sequence[Sample], most: int, most_pixels: int) -> list[Sample]:
    """The first and as many after it as the limits allow; one that is too large is passed over."""
    chosen: list[Sample] = []
    pixels = 0
    for sample in samples:
        size = sample.instances.shape[0] * sample.instances.shape[1]
        if not chosen or (len(chosen) < most and pixels + size <= most_pixels):
            chosen.append(sample)
            pixels += size
    return chosen
