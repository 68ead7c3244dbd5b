"""Pixels in, cells out: a network with its settings, on the device and in the precision at hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from loop.config import InstanceConfig, ModelConfig
from loop.data.intensity import stretch
from loop.data.preprocess import pad_to_multiple
from loop.errors import NonFiniteError
from loop.models.click import Scene
from loop.models.dense import head_maps, instances_from_heads, interior_and_border
from loop.models.queries import confidences_of
from loop.models.runtime import autocast, resolve_device, to_input
from loop.models.sparse import QueryBatch, border_of, look
from loop.types import FloatArray, Instances, UInt8Array
from loop.uncertainty.measures import measures_of

THUMBNAIL = 256
WINDOWS_A_PASS = 8


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says about one image.

    Attributes:
        instances: the cells, N >= 0.
        uncertainty: in [0, ln 2], higher = ask a person sooner: mean over the cells of the mean binary entropy of the
            interior probability in the cell; without cells the mean over the whole frame.
        embedding: (D,) float32, finite; like images lie near each other.
        measures: uncertainties by name (loop/uncertainty/measures.py), `uncertainty` as "entropy_cells" among them.
    """

    instances: Instances
    uncertainty: float
    embedding: FloatArray
    measures: dict[str, float] = field(default_factory=dict)


class Sighting(NamedTuple):
    """What a network sees in an image.

    Attributes:
        interior: (H, W) float32, how likely each pixel is inside a cell.
        maps: (K, H, W) float32, the probabilities of its heads; K may be 0 for a sparse network.
        instances: the cells that a sparse network found; None where they have yet to be found in the maps.
    """

    interior: FloatArray
    maps: FloatArray
    instances: Instances | None


class Segmenter:
    """A trained network ready to predict.

    The network is moved to the device and used in evaluation mode; calls do not change it, so one segmenter may serve
    several threads.
    """

    def __init__(
        self,
        net: nn.Module,
        model_config: ModelConfig,
        instance_config: InstanceConfig,
        *,
        device: str = "auto",
        precision: str = "auto",
        model_version: str = "",
    ) -> None:
        """Takes the network as it is.

        Args:
            net: one of loop.models.SEGMENTERS: images (B, C, H, W) float32 in [0, 1] to logits (B, K, H, W) of its K
                `heads`, or to a `SparseOutput`; with `stride` (H and W must be multiples of it) and `embed`.
            model_config: what it was built from.
            instance_config: thresholds and window size.
            device: "auto" (a GPU where there is one), "cpu" or "cuda".
            precision: "auto" (bfloat16 where the device is fast at it), "bf16" or "fp32".
            model_version: registry version, goes into the instances.

        Raises:
            ConfigError: the device is unknown or not there.
        """
        self.device = resolve_device(device)
        self.model_config = model_config
        self.instance_config = instance_config
        self.model_version = model_version
        self._precision = precision
        self._net = net.to(device=self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._stride = int(getattr(net, "stride", 1))
        self._at_once = WINDOWS_A_PASS if self.device.type == "cuda" else 1

    def with_net(self, change: Callable[[nn.Module], nn.Module]) -> "Segmenter":
        """A segmenter of the same settings that looks once at an image, with another network.

        Args:
            change: from this segmenter's network, which it must leave as it is, to the other.
        """
        return Segmenter(
            change(self._net),
            self.model_config,
            self.instance_config.model_copy(update={"tta": 1}),
            device=self.device.type,
            precision=self._precision,
            model_version=self.model_version,
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the maps that the network gives beside cells."""
        heads: tuple[str, ...] = self._net.heads
        return heads

    @property
    def is_sparse(self) -> bool:
        """Whether the network gives masks of single cells rather than maps to find cells in."""
        return getattr(self._net, "queries", None) is not None

    def predict(self, pixels: UInt8Array, *, image_id: str = "") -> Prediction:
        """Cells, uncertainties and embedding of an image of any size from 1 x 1 px.

        Args:
            pixels: (H, W, C) uint8, C in {1, 3}.
            image_id: goes into the instances and into errors.

        Raises:
            ShapeError: `pixels` is not (H, W, 1) or (H, W, 3).
            NonFiniteError: the network gives NaN or infinity; the text names the image.
        """
        stretched = self._stretch(pixels)
        sighting = self._look(stretched, image_id)
        instances = self.cells(sighting, image_id=image_id)
        measures = measures_of(sighting.interior, instances)
        embedding = self._embed(stretched)
        if not np.isfinite(embedding).all():
            raise NonFiniteError(f"the embedding of image {image_id!r} holds NaN or infinity; train the model again")
        return Prediction(instances, measures["entropy_cells"], embedding, measures)

    def look(self, pixels: UInt8Array, *, image_id: str = "") -> Sighting:
        """What the network sees in an image, before thresholds make cells of it; arguments and errors as `predict`."""
        return self._look(self._stretch(pixels), image_id)

    def cells(self, sighting: Sighting, config: InstanceConfig | None = None, *, image_id: str = "") -> Instances:
        """The cells of a sighting with these thresholds, or with the segmenter's own.

        Of a sparse network's cells those of a score of `floor` or more are left.
        """
        chosen = config or self.instance_config
        if sighting.instances is None:
            return instances_from_heads(
                sighting.maps, self.heads, chosen, image_id=image_id, model_version=self.model_version
            )
        return sighting.instances.take(np.flatnonzero(sighting.instances.scores >= chosen.floor))

    def scene(self, pixels: UInt8Array) -> Scene:
        """What clicks in an image are answered from; `pixels` and errors as for `maps`."""
        sighting = self._see(self._stretch(pixels), "")
        if sighting.instances is not None:
            cells = self.cells(sighting)
            return Scene(np.stack([sighting.interior, border_of(cells)]), instances=cells)
        nuclei = sighting.maps[self.heads.index("nuclei")] if "nuclei" in self.heads else None
        return Scene(interior_and_border(sighting.maps, self.heads), nuclei)

    def maps(self, pixels: UInt8Array) -> FloatArray:
        """Interior and border probabilities: (2, H, W) float32 in [0, 1]; NaN where the network gives NaN.

        Large images are cut into overlapping windows, whose maps are blended. Memory grows with the image by about
        20 bytes a pixel. A sparse network's border is the outline of the cells that it found.

        Args:
            pixels: (H, W, C) uint8, C in {1, 3}.

        Raises:
            ShapeError: `pixels` is not (H, W, 1) or (H, W, 3).
        """
        return self.scene(pixels).probs

    def head_maps(self, pixels: UInt8Array) -> dict[str, FloatArray]:
        """The probability map (H, W) float32 of each head by its name; `pixels` and errors as for `maps`."""
        return dict(zip(self.heads, self._see(self._stretch(pixels), "").maps, strict=True))

    def _stretch(self, pixels: UInt8Array) -> UInt8Array:
        return stretch(pixels, self.model_config.in_channels, dark_background=self.model_config.dark_background)

    def _look(self, stretched: UInt8Array, image_id: str) -> Sighting:
        sighting = self._see(stretched, image_id)
        if not np.isfinite(sighting.interior).all():
            raise NonFiniteError(
                f"the model gives NaN or infinity for image {image_id!r}: it is damaged; train it again or go back to "
                "the one before"
            )
        return sighting

    def _see(self, stretched: UInt8Array, image_id: str) -> Sighting:
        config, stride, at_once = self.instance_config, self._stride, self._at_once
        with torch.inference_mode():
            if not self.is_sparse:
                maps = head_maps(self._probabilities, stretched, config, stride=stride, at_once=at_once)
                return Sighting(interior_and_border(maps, self.heads)[0], maps, None)
            seen = look(
                self._queries,
                stretched,
                config,
                at_once=at_once,
                image_id=image_id,
                model_version=self.model_version,
            )
        return Sighting(seen.interior, seen.dense, seen.instances)

    def _probabilities(self, windows: FloatArray) -> FloatArray:
        probs: FloatArray = torch.sigmoid(self._run(self._net, windows)).cpu().numpy()
        return probs

    def _queries(self, windows: FloatArray) -> QueryBatch:
        with autocast(self.device, self._precision):
            output = self._net(self._input(windows))
        classes, masks = (torch.sigmoid(logits.float()).cpu().numpy() for logits in (output.classes, output.masks))
        objectness = None if output.objectness is None else torch.sigmoid(output.objectness.float()).cpu().numpy()
        if output.dense is None:
            dense = np.zeros((len(windows), 0, *windows.shape[2:]), np.float32)
        else:
            dense = torch.sigmoid(output.dense.float()).cpu().numpy()
        return QueryBatch(masks, confidences_of(classes, objectness), dense)

    def _embed(self, stretched: UInt8Array) -> FloatArray:
        """The network's embedding of the image shrunk to at most 256 px a side, so that its cost is bounded."""
        longer = max(stretched.shape[:2])
        if longer > THUMBNAIL:
            height, width = (max(1, round(side * THUMBNAIL / longer)) for side in stretched.shape[:2])
            shrunk = cv2.resize(stretched, (width, height), interpolation=cv2.INTER_AREA)
            stretched = shrunk.reshape(height, width, stretched.shape[2])
        padded = pad_to_multiple(to_input(stretched), self._stride)[None]
        with torch.inference_mode():
            embedding: FloatArray = self._run(self._net.embed, padded)[0].cpu().numpy()
        return embedding

    def _run(self, function: nn.Module, images: FloatArray) -> Tensor:
        with autocast(self.device, self._precision):
            y: Tensor = function(self._input(images))
        return y.float()

    def _input(self, images: FloatArray) -> Tensor:
        return torch.from_numpy(images).to(self.device).contiguous(memory_format=torch.channels_last)
