"""Pixels in, cells out: a network with its settings, on the device and in the precision at hand."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from loop.config import InstanceConfig, ModelConfig
from loop.data.intensity import stretch
from loop.data.preprocess import Window, blend, pad_to_multiple, tiles, unpad
from loop.errors import ConfigError, NonFiniteError
from loop.models.watershed import instances_from_maps
from loop.types import FloatArray, Instances, UInt8Array
from loop.uncertainty.aggregate import mean_over_cells
from loop.uncertainty.entropy import binary_entropy

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
    """

    instances: Instances
    uncertainty: float
    embedding: FloatArray


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
            net: one of loop.models.SEGMENTERS: images (B, C, H, W) float32 in [0, 1] to logits (B, 2, H, W), with
                `stride` (H and W must be multiples of it) and `embed`.
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

    def predict(self, pixels: UInt8Array, *, image_id: str = "") -> Prediction:
        """Cells, uncertainty and embedding of an image of any size from 1 x 1 px.

        Args:
            pixels: (H, W, C) uint8, C in {1, 3}.
            image_id: goes into the instances and into errors.

        Raises:
            ShapeError: `pixels` is not (H, W, 1) or (H, W, 3).
            NonFiniteError: the network gives NaN or infinity; the text names the image.
        """
        stretched = self._stretch(pixels)
        probs = self._maps(stretched)
        instances = instances_from_maps(
            probs, self.instance_config, image_id=image_id, model_version=self.model_version
        )
        uncertainty = mean_over_cells(binary_entropy(probs[0]), instances)
        embedding = self._embed(stretched)
        if not np.isfinite(embedding).all():
            raise NonFiniteError(f"the embedding of image {image_id!r} holds NaN or infinity; train the model again")
        return Prediction(instances, uncertainty, embedding)

    def maps(self, pixels: UInt8Array) -> FloatArray:
        """Interior and border probabilities: (2, H, W) float32 in [0, 1]; NaN where the network gives NaN.

        Large images are cut into overlapping windows, whose maps are blended. Memory grows with the image by about
        20 bytes a pixel.

        Args:
            pixels: (H, W, C) uint8, C in {1, 3}.

        Raises:
            ShapeError: `pixels` is not (H, W, 1) or (H, W, 3).
        """
        return self._maps(self._stretch(pixels))

    def _stretch(self, pixels: UInt8Array) -> UInt8Array:
        return stretch(pixels, self.model_config.in_channels, dark_background=self.model_config.dark_background)

    def _maps(self, stretched: UInt8Array) -> FloatArray:
        config = self.instance_config
        shape = (stretched.shape[0], stretched.shape[1])
        overlap = min(config.overlap, config.tile // 2)
        windows = tiles(shape, config.tile, overlap)
        return blend(shape, self._window_maps(stretched, windows), overlap)

    def _window_maps(self, stretched: UInt8Array, windows: list[Window]) -> Iterator[tuple[Window, FloatArray]]:
        at_once = WINDOWS_A_PASS if self.device.type == "cuda" else 1
        for start in range(0, len(windows), at_once):
            together = windows[start : start + at_once]
            crops = [to_input(stretched[w.y0 : w.y1, w.x0 : w.x1]) for w in together]
            padded = np.stack([pad_to_multiple(crop, self._stride) for crop in crops])
            with torch.inference_mode():
                probs = torch.sigmoid(self._run(self._net, padded)).cpu().numpy()
            for window, part in zip(together, probs, strict=True):
                yield window, unpad(part, (window.y1 - window.y0, window.x1 - window.x0))

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
        x = torch.from_numpy(images).to(self.device).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self._precision):
            y: Tensor = function(x)
        return y.float()


def to_input(stretched: UInt8Array) -> FloatArray:
    """(H, W, C) uint8 to what a network takes: (C, H, W) float32 in [0, 1]."""
    return np.ascontiguousarray(stretched.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: the name is none of auto, cpu, cuda, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={name!r}; expected auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("device=cuda, but torch sees no GPU; use device: auto, or install a GPU build of torch")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Whether a net runs under bfloat16 autocast: as asked, and for "auto" where the device computes it natively.

    Native: a GPU that says so; a CPU with AVX512-BF16 or AMX (2 to 3 times faster there, slower elsewhere).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context in which a net runs on `device` in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))
