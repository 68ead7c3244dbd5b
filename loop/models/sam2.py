"""Segment Anything 2 behind the same two calls as `loop.models.sam.Sam`, where the package `sam2` is installed.

Source: Ravi et al. 2024, "SAM 2" (arXiv:2408.00714); its image predictor. The only importer of sam2.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from loop.data.weights import sha256_of
from loop.errors import CheckpointError, ConfigError, NonFiniteError
from loop.models.runtime import autocast, resolve_device
from loop.models.sam import PROMPTS_A_BATCH, STABILITY_OFFSET, Answers
from loop.rings import crop_mask
from loop.types import UInt8Array

SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


class _Seen(NamedTuple):
    """An encoded image: the package's predictor that holds it, and its (H, W), px."""

    predictor: Any
    shape: tuple[int, int]


class Sam2:
    """A loaded SAM 2. Calls do not change it: an embedding holds its own predictor."""

    def __init__(self, checkpoint: str, *, device: str = "auto", precision: str = "auto") -> None:
        """Loads a checkpoint by its published name, e.g. sam2.1_hiera_small.pt, which tells its size.

        Raises:
            ConfigError: the package is not installed, or the name is not a published one.
            CheckpointError: no such file, or no weights of that size.
        """
        path = Path(checkpoint).expanduser()
        family, _, size = path.stem.partition("_hiera_")
        if family not in ("sam2", "sam2.1") or size not in SIZES:
            expected = f"a file named sam2.1_hiera_SIZE.pt as published, SIZE one of {', '.join(SIZES)}"
            raise ConfigError(f"pseudo.weights.sam2 is {checkpoint!r}; expected {expected}")
        try:
            builder: Any = importlib.import_module("sam2.build_sam")
            self._predictor: Any = importlib.import_module("sam2.sam2_image_predictor").SAM2ImagePredictor
        except ImportError as error:
            advice = "pip install sam2, or take it out of pseudo.labellers"
            raise ConfigError(f"labeller sam2 needs the package sam2 ({error}); {advice}") from error
        if not path.is_file():
            raise CheckpointError(
                f"no weights of SAM 2: {path} is not there; download {path.name} as its authors publish it, and name "
                "the file by pseudo.weights.sam2; the loop goes on without SAM 2"
            )
        self.device = resolve_device(device)
        self.precision = precision
        self.version = f"{path.stem}-{sha256_of(path)[:8]}"
        settings = f"configs/{family}/{family}_hiera_{SIZES[size]}.yaml"
        try:
            self._net: Any = builder.build_sam2(settings, str(path), device=str(self.device))
        except Exception as error:  # a broken pickle, missing keys, or a configuration that the package lacks
            raise CheckpointError(f"{path} cannot be loaded as {settings}: {error}; download it again") from error

    @property
    def side(self) -> int:
        """The side at which the network sees an image, px."""
        return int(self._net.image_size)

    def encode(self, image: UInt8Array) -> _Seen:
        """What `decode` takes, of (H, W, C) uint8, C in {1, 3}."""
        predictor = self._predictor(self._net)
        with torch.inference_mode(), autocast(self.device, self.precision):
            predictor.set_image(np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))))
        return _Seen(predictor, (image.shape[0], image.shape[1]))

    def decode(
        self,
        embedding: _Seen,
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        boxes: npt.ArrayLike | None = None,
        multimask: bool = True,
        least: tuple[float, float] = (0.0, 0.0),
    ) -> Answers:
        """Masks of P prompts; see `loop.models.sam.Sam.decode`.

        Raises:
            NonFiniteError: the network gave NaN or infinity.
        """
        given = {"point_coords": points, "point_labels": point_labels, "box": boxes}
        prompts = {name: np.asarray(value) for name, value in given.items() if value is not None}
        half = 0.5 * np.array(embedding.shape[::-1]) / self.side  # the network itself adds half a pixel of its own
        prompts |= {n: prompts[n] - np.tile(half, w) for n, w in (("point_coords", 1), ("box", 2)) if n in prompts}
        if points is not None and point_labels is None:
            prompts["point_labels"] = np.ones(prompts["point_coords"].shape[:2], np.int32)
        count, per = len(next(iter(prompts.values()))), 3 if multimask else 1
        batch = PROMPTS_A_BATCH[self.device.type]
        crops, scores, stability = [], np.zeros((count, per), np.float32), np.zeros((count, per), np.float32)
        for i in range(0, count, batch):
            some = {name: value[i : i + batch] for name, value in prompts.items()}
            with torch.inference_mode(), autocast(self.device, self.precision):
                logits, iou, _ = embedding.predictor.predict(**some, multimask_output=multimask, return_logits=True)
            if not (np.isfinite(logits).all() and np.isfinite(iou).all()):
                raise NonFiniteError("SAM 2 gave NaN or infinity; use other weights")
            logits = logits.reshape(-1, per, *logits.shape[-2:])
            scores[i : i + batch] = np.clip(iou.reshape(-1, per), 0, 1)
            high, low = ((logits > offset).sum(axis=(2, 3)) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
            stability[i : i + batch] = high / np.maximum(low, 1)
            wanted = (scores[i : i + batch] >= least[0]) & (stability[i : i + batch] >= least[1])
            crops += [
                tuple(crop_mask(mask > 0) if keep else None for mask, keep in zip(masks, kept, strict=True))
                for masks, kept in zip(logits, wanted, strict=True)
            ]
        return Answers(tuple(crops), scores, stability)
