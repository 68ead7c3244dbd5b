"""The loop's own models as labellers: the champion, and the best of each kind of network."""

import copy
from collections.abc import Callable

import numpy as np

from loop.errors import InputError
from loop.metrics.matching import Float64Array, iou_matrix
from loop.models.dihedral import apply, invert, invert_instances
from loop.models.segmenter import Segmenter, Sighting
from loop.models.stitch import fuse
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.types import FloatArray, Instances, UInt8Array

VIEWS: dict[int, tuple[int, ...]] = {
    1: (0,),
    2: (0, 1),
    4: (0, 1, 2, 3),
    7: (0, 1, 2, 3, 5, 6),
    8: (0, 1, 2, 3, 4, 5, 6, 7),
}
"""Number of views to the transforms of loop/models/dihedral.py."""

FOUND_IOU = 0.5
STRICTNESS = (-0.2, 0.2)  # the averaged map is looked at with a laxer and a stricter foreground too
WEAKEST = 0.05  # a sparse network's cells of a lower score are no cells


class OwnLabeller:
    """A segmenter that looks at an image in several flips and turns and says how stable each cell is.

    A dense network's maps are turned back and averaged, and the cells are found once, in the mean map. Its looks are
    the single views, and the mean map with a foreground threshold lower and higher by 0.2. A sparse network's cells are
    turned back and fused; its looks are the views. `stability` is the mean over the looks of the IoU with the look's
    best cell, 0 where that is below 0.5; `score` is the mean interior probability (dense), or the mean score in the
    views that found the cell (sparse). Cells of any score are proposed, so that doubtful ones are known.

    Source: seed 003, section 3.5. Differs: both flips are the half turn, so seven names are six looks, and each counts
    once; 8 adds the two transpositions.
    """

    needs_hint = False

    def __init__(self, name: str, segmenter: Segmenter, *, views: int = 4) -> None:
        """Takes a trained segmenter, which is not changed.

        Args:
            name: key in PSEUDO_LABELLERS.
            segmenter: its `model_version` becomes `version`; its own `tta` is not used here.
            views: 1, 2, 4, 7 or 8 looks.

        Raises:
            InputError: another number of views.
        """
        if views not in VIEWS:
            raise InputError(f"views={views}; give one of {', '.join(map(str, VIEWS))}")
        self.name = name
        self.version = segmenter.model_version
        self._views = VIEWS[views]
        lenient = {"tta": 1, "min_score": 0.0, "floor": min(WEAKEST, segmenter.instance_config.floor)}
        self._segmenter = copy.copy(segmenter)
        self._segmenter.instance_config = segmenter.instance_config.model_copy(update=lenient)

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        """All cells of an image, weak ones too; `hint` is not used.

        Raises:
            ShapeError: the image is not (H, W, 1) or (H, W, 3).
            NonFiniteError: the network gives NaN or infinity; the text names the image.
        """
        cells, scores, looks = (self._fused if self._segmenter.is_sparse else self._mean)(image, image_id)
        proposed = Instances.build(
            cells.shape,
            cells.boxes_xyxy,
            cells.masks,
            scores=scores,
            labels=cells.labels,
            image_id=image_id,
            source="pseudo",
            model_version=self.version,
        )
        return Proposal(proposed, stability_of(cells, looks))

    def _mean(self, image: UInt8Array, image_id: str) -> tuple[Instances, FloatArray, list[Instances]]:
        """Cells of the mean map, their scores, and the cells of each look; one view's maps are held at a time."""
        config, looks, total = self._segmenter.instance_config, list[Instances](), None
        for view in self._views:
            seen = self._segmenter.look(_turned(view, image), image_id=image_id)
            back = Sighting(invert(view, seen.interior), invert(view, seen.maps), None)
            if len(self._views) > 1:
                looks.append(self._segmenter.cells(back))
            total = back if total is None else Sighting(total.interior + back.interior, total.maps + back.maps, None)
        if total is None:
            raise InputError("no views of the image; give at least one")
        share = np.float32(1 / len(self._views))
        mean = Sighting(total.interior * share, total.maps * share, None)
        cells = self._segmenter.cells(mean, image_id=image_id)
        for step in STRICTNESS:
            foreground = float(np.clip(config.foreground + step, 0.05, 0.95))
            looks.append(self._segmenter.cells(mean, config.model_copy(update={"foreground": foreground})))
        return cells, cells.scores, looks

    def _fused(self, image: UInt8Array, image_id: str) -> tuple[Instances, FloatArray, list[Instances]]:
        """Fused cells, their mean scores where they were found, and the cells of each view."""
        looks = []
        for view in self._views:
            seen = self._segmenter.look(_turned(view, image), image_id=image_id)
            looks.append(invert_instances(view, self._segmenter.cells(seen, image_id=image_id)))
        cells = fuse(looks) if len(looks) > 1 else looks[0]
        times = np.maximum(sum(((iou_matrix(cells, look) >= FOUND_IOU).any(axis=1) for look in looks), 0), 1)
        scores = np.clip(cells.scores * len(looks) / times, 0, 1).astype(np.float32)
        return cells, scores, looks


def own(kind: str) -> Callable[[Tools], Labeller]:
    """The builder of the labeller `kind`: "champion" or a key of SEGMENTERS."""

    def build(tools: Tools) -> Labeller:
        return OwnLabeller(kind, tools.segmenter(kind), views=tools.config.views)

    return build


def stability_of(cells: Instances, looks: list[Instances]) -> FloatArray:
    """How far the looks agree on each cell: mean over them of the best IoU, 0 in a look where that is below 0.5.

    Args:
        cells: N >= 0.
        looks: the cells of one look each, at least one, in the same image.

    Returns:
        (N,) float32 in [0, 1].
    """
    best: list[Float64Array] = [iou_matrix(cells, look).max(axis=1, initial=0) for look in looks]
    agreed = np.stack([np.where(iou >= FOUND_IOU, iou, 0) for iou in best])
    return np.asarray(agreed.mean(axis=0), np.float32)


def _turned(view: int, image: UInt8Array) -> UInt8Array:
    if image.ndim != 3:
        return image  # the segmenter says what is wrong with it
    return np.ascontiguousarray(apply(view, image.transpose(2, 0, 1)).transpose(1, 2, 0))
