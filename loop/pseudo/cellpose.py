"""Cellpose 3 and Cellpose-SAM (cellpose 4) as a labeller, where the package is installed."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.special import expit

from loop.errors import CheckpointError
from loop.masks import from_label_image
from loop.models.runtime import resolve_device
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.pseudo.foreign import importing, loading, seen_once, version_of, weights_of
from loop.types import Instances, UInt8Array

NAME = "cellpose"
SMALLEST = 16  # px; a side of one pixel is lost where Cellpose squeezes its arrays
SIZED = ("cyto", "cyto2", "cyto3", "nuclei")  # Cellpose 3 has a size model for these and no others


class CellposeLabeller:
    """Cells from Cellpose's flows.

    Cellpose gives no score: a cell's score is the mean over its pixels of the sigmoid of the cell probability logit,
    in [0, 1] and above 0.5 by construction, since only pixels of positive logit belong to cells. Stability 1.

    Source: Stringer et al. 2021 and 2025, Pachitariu et al. 2025 (Cellpose, Cellpose 3, Cellpose-SAM). Differs: the
    score; images of a side below 16 px are continued to 16 px.
    """

    name = NAME
    needs_hint = False

    def __init__(self, model: Any, version: str, *, colour: bool) -> None:
        """Takes a loaded `Cellpose` or `CellposeModel`; `colour` says that it takes three channels (Cellpose-SAM)."""
        self._model = model
        self.version = version
        self._colour = colour

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        """As `Labeller.propose`; Cellpose 3 sees a colour image as the mean of its channels."""
        height, width = image.shape[:2]
        grow = ((0, max(0, SMALLEST - height)), (0, max(0, SMALLEST - width)), (0, 0))
        grown = np.pad(image, grow, mode="edge")
        if self._colour and grown.shape[2] == 3:
            found, flows, *_ = self._model.eval(grown, channel_axis=-1)
        else:
            grey = np.asarray(grown.mean(axis=2, dtype=np.float32))
            options = {} if self._colour else {"channels": [0, 0], "diameter": None}
            found, flows, *_ = self._model.eval(grey, **options)
        labels = np.asarray(found, np.int32).reshape(grown.shape[:2])[:height, :width]
        inside = expit(np.asarray(flows[2], np.float32).reshape(grown.shape[:2])[:height, :width])
        values = np.unique(labels[labels > 0])
        scores = np.clip(np.asarray(ndimage.mean(inside, labels, values), np.float32), 0, 1) if len(values) else ()
        return seen_once(
            from_label_image(labels, image_id=image_id, source="pseudo", scores=scores, model_version=self.version)
        )


def cellpose(tools: Tools) -> Labeller:
    """Cellpose with the weights in pseudo.weights.cellpose: a file, or a name that the installed Cellpose knows.

    A known name (cyto3, nuclei, ... of Cellpose 3; cpsam, ... of Cellpose 4) is downloaded by Cellpose at first use.
    Cellpose 3 estimates the cells' diameter for cyto, cyto2, cyto3 and nuclei, and takes the one in the file otherwise.

    Raises:
        ConfigError: cellpose cannot be imported, or no weights are set.
        CheckpointError: the weights are no file and no known name, or cannot be read or downloaded.
    """
    with importing(NAME, "cellpose"):
        from cellpose import models
    given = weights_of(tools.config, NAME, "a file of Cellpose weights or a built-in name (cyto3, cpsam)")
    known = [*models.MODEL_NAMES, *models.get_user_models()]
    if given not in known and not Path(given).expanduser().is_file():
        raise CheckpointError(  # Cellpose itself would go on with its default model, silently
            f"pseudo.weights.cellpose is {given!r}, neither a file nor a name that this Cellpose knows "
            f"({', '.join(known)}); give one of these, or leave cellpose out of pseudo.labellers: the loop goes on "
            "without it"
        )
    device = resolve_device(tools.device)
    options = {"gpu": device.type == "cuda", "device": device}
    is_3 = hasattr(models, "Cellpose")
    with loading(NAME, given):
        if is_3 and given in SIZED:
            model = models.Cellpose(model_type=given, **options)
            file = model.cp.pretrained_model
        else:
            place = given if given in known else str(Path(given).expanduser())
            model = models.CellposeModel(pretrained_model=place, **options)
            file = model.pretrained_model
    return CellposeLabeller(model, version_of(NAME, Path(file)), colour=not is_3)
