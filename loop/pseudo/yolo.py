"""YOLO segmentation networks of ultralytics as a labeller, where the package is installed. AGPL-3.0: see `yolo`."""

import logging
import os
from typing import Any

import numpy as np

from loop.errors import CheckpointError
from loop.masks import from_masks
from loop.models.runtime import resolve_device
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.pseudo.foreign import importing, loading, seen_once, version_of, weights_path
from loop.types import Instances, UInt8Array

NAME = "yolo"
LOWEST = 0.1  # cells of a lower score are not proposed; the calibration decides on the others

logger = logging.getLogger(__name__)


class YoloLabeller:
    """Masks of a YOLO segmentation network, whatever their class; the score is the box's confidence, stability 1.

    The network looks at the whole image, scaled to the size that it was trained on (640 px in most): cells of a few
    pixels in a large image are missed. Full-size masks are held for the moment: N x H x W x 4 bytes.

    Source: ultralytics (Jocher et al.).
    """

    name = NAME
    needs_hint = False

    def __init__(self, model: Any, version: str, *, device: str, max_cells: int) -> None:
        """Takes a loaded ultralytics.YOLO, the torch device to run on, and how many cells an image gives at most."""
        self._model = model
        self.version = version
        self._options = {"device": device, "max_det": max_cells, "conf": LOWEST, "retina_masks": True}

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        """As `Labeller.propose`."""
        height, width = image.shape[:2]
        bgr = np.ascontiguousarray(np.broadcast_to(image, (height, width, 3))[..., ::-1])
        result = self._model.predict(bgr, verbose=False, save=False, **self._options)[0]
        masks, scores = [], []
        if result.masks is not None:
            masks = list(result.masks.data.cpu().numpy() > 0.5)
            scores = np.clip(result.boxes.conf.float().cpu().numpy(), 0, 1).tolist()
        cells = from_masks(
            masks, (height, width), scores=scores, image_id=image_id, source="pseudo", model_version=self.version
        )
        return seen_once(cells)


def yolo(tools: Tools) -> Labeller:
    """A YOLO segmentation network from the file in pseudo.weights.yolo.

    ultralytics and weights trained with it are under the AGPL-3.0, which asks that what is built on them and offered to
    others, also over a network, be published with its source; a warning in the log says so. Such a file is a pickle:
    reading it may run code, so use files from people you trust only. ultralytics is told neither to install packages
    nor to call home (YOLO_AUTOINSTALL, YOLO_OFFLINE), where these are not set.

    Raises:
        ConfigError: ultralytics cannot be imported, or no file is set.
        CheckpointError: the file is not there, cannot be read, or gives no masks.
    """
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    with importing(NAME, "ultralytics"):
        from ultralytics import YOLO
    path = weights_path(tools.config, NAME, "a .pt file of a YOLO segmentation network")
    logger.warning(
        "labeller yolo is on: ultralytics and its weights are under the AGPL-3.0; what you offer to others with them, "
        "also over a network, must be published with its source, unless you hold a licence of Ultralytics"
    )
    with loading(NAME, str(path)):
        model = YOLO(str(path))
    if model.task != "segment":
        raise CheckpointError(
            f"pseudo.weights.yolo is {str(path)!r}, a network for the task {model.task!r}; give one that segments "
            "(its name ends in -seg), or leave yolo out of pseudo.labellers: the loop goes on without it"
        )
    device = str(resolve_device(tools.device))
    return YoloLabeller(model, version_of(NAME, path), device=device, max_cells=tools.config.max_cells)
