"""StarDist as a labeller, where the packages stardist and tensorflow are installed."""

from importlib import import_module
from typing import Any

import numpy as np

from loop.data.weights import sha256_of
from loop.errors import CheckpointError
from loop.masks import from_label_image
from loop.models.runtime import resolve_device
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.pseudo.foreign import importing, loading, seen_once, weights_path
from loop.types import FloatArray, Instances, UInt8Array

NAME = "stardist"
WEIGHTS = ("weights_best.h5", "weights_last.h5", "weights_now.h5")


class StarDistLabeller:
    """Star-convex cells; a cell's score is its object probability, stability 1.

    The thresholds are those in the model's folder (thresholds.json). Cells that overlap give the pixels that they share
    to the more likely one.

    Source: Schmidt et al. 2018 (StarDist).
    """

    name = NAME
    needs_hint = False

    def __init__(self, model: Any, version: str, *, device: Any) -> None:
        """Takes a loaded StarDist2D and a function that gives the context in which TensorFlow runs on a device."""
        self._model = model
        self.version = version
        self._device = device

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        """As `Labeller.propose`; a model of one channel sees the mean of a colour image's channels."""
        scaled = _scaled(image)
        if self._model.config.n_channel_in == 1:
            given, axes = np.asarray(scaled.mean(axis=2)), "YX"
        else:
            given, axes = np.broadcast_to(scaled, (*scaled.shape[:2], 3)), "YXC"
        with self._device():
            labels, details = self._model.predict_instances(
                given, axes=axes, show_tile_progress=False, predict_kwargs={"verbose": 0}
            )
        values = np.unique(labels[labels > 0])  # a cell that others cover is in `details`, but not in the labels
        scores = np.clip(np.asarray(details["prob"], np.float32)[values - 1], 0, 1)
        return seen_once(
            from_label_image(labels, image_id=image_id, source="pseudo", scores=scores, model_version=self.version)
        )


def _scaled(image: UInt8Array) -> FloatArray:
    """(H, W, C) float32, each channel's 1st percentile at 0 and its 99.8th at 1, as StarDist's models were trained."""
    low, high = np.percentile(image, (1, 99.8), axis=(0, 1), keepdims=True)
    return np.asarray((image - low) / (high - low + 1e-20), np.float32)


def stardist(tools: Tools) -> Labeller:
    """StarDist with the model folder in pseudo.weights.stardist: config.json, weights_best.h5, thresholds.json.

    Raises:
        ConfigError: stardist or tensorflow cannot be imported, or no folder is set.
        CheckpointError: the folder is not there, lacks a part, or cannot be read.
    """
    with importing(NAME, "stardist tensorflow"):
        tensorflow: Any = import_module("tensorflow")
        from stardist.models import StarDist2D
    expected = "the folder of a StarDist2D model (config.json, weights_best.h5, thresholds.json)"
    folder = weights_path(tools.config, NAME, expected).resolve()
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"pseudo.weights.stardist is {str(folder)!r}, without config.json or weights; give {expected}, or "
            "leave stardist out of pseudo.labellers: the loop goes on without it"
        )
    with loading(NAME, str(folder)):
        model = StarDist2D(None, name=folder.name, basedir=str(folder.parent))
    kind = "GPU" if resolve_device(tools.device).type == "cuda" and _has_gpu(tensorflow) else "CPU"
    version = f"{NAME}:{folder.name}-{sha256_of(weights[0])[:8]}"
    return StarDistLabeller(model, version, device=lambda: tensorflow.device(f"/{kind}:0"))


def _has_gpu(tensorflow: Any) -> bool:
    return bool(tensorflow.config.list_physical_devices("GPU"))
