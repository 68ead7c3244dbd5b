"""What a training asks of images that it does not learn from: its AP on the way, and the thresholds at its end."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import read_image
from loop.metrics.instance import evaluate, image_ap
from loop.models.segmenter import Segmenter, Sighting
from loop.types import Instances, Sample, UInt8Array

MOST_ON_THE_WAY = 8
MOST_AT_THE_END = 24

DENSE_GRID: Mapping[str, tuple[float, ...]] = {
    "split": (0.1, 0.2, 0.3, 0.45),
    "seed": (0.25, 0.4, 0.55),
    "foreground": (0.4, 0.5, 0.6),
    "min_score": (0.5, 0.65, 0.75, 0.8, 0.85),
}
SPARSE_GRID: Mapping[str, tuple[float, ...]] = {"floor": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)}


class Validation:
    """Images with true cells, kept in memory, on which a net is tried with a training's settings."""

    def __init__(
        self, samples: Sequence[Sample], model: ModelConfig, config: TrainConfig, instances: InstanceConfig
    ) -> None:
        """Reads the images; of many, some of each modality.

        Args:
            samples: at least one; none of them may be learnt from.
            model: what the nets are built from.
            config: device, precision and seed.
            instances: the thresholds to start from.

        Raises:
            ImageError: an image cannot be read.
        """
        self._samples = _spread(samples, MOST_AT_THE_END, config.seed)
        self._pixels = [read_image(sample.image.path).pixels for sample in self._samples]
        self._model = model
        self._config = config
        self._instances = instances

    def ap(self, net: nn.Module) -> float:
        """Mean over up to eight images of their AP .50:.95; the net must be in evaluation mode and stays as it is."""
        segmenter = self._segmenter(net)
        seen = list(zip(self._samples, self._pixels, strict=True))[:MOST_ON_THE_WAY]
        return float(np.mean([image_ap(_cells(segmenter, pixels), sample.instances) for sample, pixels in seen]))

    def fit(self, net: nn.Module) -> tuple[InstanceConfig, dict[str, float]]:
        """The thresholds that serve the validation images best, and AP, macro AP and F1 with them.

        One threshold after the other over a small grid. What is raised is the mean of AP
        and F1, each over all images and as the mean over modalities, so that neither ranking nor counting, neither the
        frequent nor the rare is sacrificed. Each image goes through the network once.
        """
        segmenter = self._segmenter(net, floor=SPARSE_GRID["floor"][0])
        sightings = [segmenter.look(pixels) for pixels in self._pixels]
        best = self._instances
        figures = self._measure(segmenter, sightings, best)
        for name, values in (SPARSE_GRID if segmenter.is_sparse else DENSE_GRID).items():
            for value in values:
                tried = best.model_copy(update={name: value})
                found = figures if tried == best else self._measure(segmenter, sightings, tried)
                if _worth(found) > _worth(figures):
                    best, figures = tried, found
        return best, {key: float(figures[key]) for key in ("ap", "ap50", "macro_ap", "f1")}

    def _segmenter(self, net: nn.Module, **changes: float) -> Segmenter:
        thresholds = self._instances.model_copy(update=changes)
        return Segmenter(net, self._model, thresholds, device=self._config.device, precision=self._config.precision)

    def _measure(self, segmenter: Segmenter, sightings: Sequence[Sighting], config: InstanceConfig) -> dict[str, Any]:
        pairs = [
            (segmenter.cells(sighting, config), sample.instances)
            for sighting, sample in zip(sightings, self._samples, strict=True)
        ]
        return evaluate(pairs, modalities=[sample.image.modality for sample in self._samples])


def _cells(segmenter: Segmenter, pixels: UInt8Array) -> Instances:
    return segmenter.cells(segmenter.look(pixels))


def _worth(figures: Mapping[str, Any]) -> float:
    macro_f1 = float(np.mean([part["f1"] for part in figures["per"].values()]))
    return float(np.mean([figures["ap"], figures["macro_ap"], figures["f1"], macro_f1]))


def _spread(samples: Sequence[Sample], most: int, seed: int) -> list[Sample]:
    """At most `most` of the samples in random order, the modalities taking turns."""
    rng = np.random.default_rng(seed)
    shuffled = [samples[int(i)] for i in rng.permutation(len(samples))]
    turns: dict[str, int] = {}
    ordered = []
    for place, sample in enumerate(shuffled):
        turn = turns[sample.image.modality] = turns.get(sample.image.modality, -1) + 1
        ordered.append((turn, place, sample))
    return [sample for _, _, sample in sorted(ordered, key=lambda entry: entry[:2])][:most]
