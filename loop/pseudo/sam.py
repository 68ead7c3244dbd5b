"""Labeller `sam`: Segment Anything on a grid of points, prompted by the champion's cells, or both.

Source: Kirillov et al. 2023 (arXiv:2304.02643), section 4 and appendix B (automatic masks, their filters); seed 000
section 3.1 (masks filtered by colour). Differs: one piece a mask, its holes filled; limits on its area; large images
are seen in windows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch

from loop.config import SamConfig
from loop.data.intensity import stretch
from loop.data.preprocess import Window, tiles
from loop.errors import ShapeError
from loop.metrics.matching import areas, intersections, iou_matrix
from loop.models.sam import Answers, batched_nms
from loop.models.sam_weights import load_sam
from loop.models.stitch import merge_windows
from loop.pseudo.base import Proposal, Tools
from loop.pseudo.hsv_filter import cell_colours, hsv_filter
from loop.rings import Crop, crop_mask, largest_part
from loop.types import FloatArray, Instances, UInt8Array

MIN_AREA = 20
"""Smaller masks are dropped, px."""
MAX_SHARE = 0.4
"""Masks of a larger share of the image are background."""
LEAST = (0.88, 0.95)
"""Automatic masks of a lower predicted IoU or stability are dropped (the package's defaults)."""
NMS_IOU = 0.7
AGREEMENT = 0.25
"""Prompted: where no mask agrees with the champion's cell so far, SAM sees no cell there."""
COVERED = 0.5
"""Both: an automatic mask that shares more of itself, or of a prompted one, with a prompted one says nothing new."""
ZOOM = 1.5
"""Images longer than so many times the network's input side are seen in windows of that side."""
WINDOW_OVERLAP = 0.2
_BAND = 200  # cells compared with all others at a time, so that no table is N x N


class Promptable(Protocol):
    """A network that encodes an image once and answers prompts: loop/models/sam.py, sam2.py."""

    version: str

    @property
    def side(self) -> int:
        """The longer side at which it sees an image, px."""
        ...

    def encode(self, image: UInt8Array) -> Any:
        """What `decode` takes, of (H, W, 3) uint8."""
        ...

    def decode(
        self,
        embedding: Any,
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        boxes: npt.ArrayLike | None = None,
        multimask: bool = True,
        least: tuple[float, float] = (0.0, 0.0),
    ) -> Answers:
        """Masks of P prompts; see `loop.models.sam.Sam.decode`."""
        ...


class _Found(NamedTuple):
    crop: Crop
    score: float
    stability: float


class SamLabeller:
    """Proposes what a promptable network finds; see `loop.pseudo.base.Labeller` for its attributes."""

    def __init__(
        self,
        name: str,
        model: Promptable,
        config: SamConfig,
        *,
        colours: FloatArray | None = None,
        least: tuple[float, float] = LEAST,
    ) -> None:
        """Takes the network as it is.

        Args:
            name: its key in PSEUDO_LABELLERS; the version is "NAME:VERSION OF THE MODEL".
            model: the network.
            config: mode, grid, whether colours are looked at.
            colours: (K, 3) float32 colours of labelled cells (`cell_colours`); None = those of the champion's cells in
                the image, where there are any.
            least: automatic masks of a lower predicted IoU or stability are dropped.
        """
        self.name = name
        self.version = f"{name}:{model.version}"
        self.needs_hint = config.mode == "prompted"
        self._model = model
        self._config = config
        self._colours = colours
        self._least = least

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        """Cells of an image; score = the IoU that the network expects of the mask.

        Args:
            image: (H, W, C) uint8, C in {1, 3}, any size from 1 x 1 px. Its intensities are stretched first; colours
                and a bright background stay.
            image_id: goes into the instances.
            hint: the champion's cells; without them the mode "prompted" proposes nothing.

        Raises:
            ShapeError: the image is no such array, or the hint is of another size.
        """
        seen = stretch(image, 3, dark_background=False)
        shape = (image.shape[0], image.shape[1])
        if hint is not None and hint.shape != shape:
            raise ShapeError(f"the hint of {image_id!r} is of {hint.shape}, the image of {shape}; give its own cells")
        prompted = hint if hint is not None and self._config.mode != "automatic" else Instances.build(shape)
        cells, free = self._look(seen, prompted)
        if self._config.hsv_filter and len(free):
            known = self._colours
            if known is None and hint is not None and len(hint):
                known = cell_colours(image, hint)
            free = hsv_filter(image, free, known_colours=known)
        cells = _added(cells, free)
        ones = np.ones(len(cells), np.float32)
        named = replace(cells, weights=ones, image_id=image_id, source="pseudo", model_version=self.version)
        return Proposal(named, cells.weights)

    def _look(self, seen: UInt8Array, hint: Instances) -> tuple[Instances, Instances]:
        """Prompted and automatic masks within the limits, window by window; weights = stability."""
        shape = (seen.shape[0], seen.shape[1])
        answered: list[_Found] = []
        parts: list[tuple[Window, Instances]] = []
        for window, cells in _views(shape, hint, self._model.side):
            if not len(cells) and self._config.mode == "prompted":
                continue
            y0, x0, y1, x1 = window
            embedding = self._model.encode(np.ascontiguousarray(seen[y0:y1, x0:x1]))
            answered += [_moved(found, x0, y0) for found in self._prompted(embedding, cells)]
            if self._config.mode != "prompted":
                parts.append((window, self._automatic(embedding, (y1 - y0, x1 - x0))))
        prompted = _limited(_instances(shape, answered))
        automatic = merge_windows(shape, parts) if parts else Instances.build(shape)
        return prompted.take(_best(prompted)), _limited(automatic)

    def _prompted(self, embedding: Any, hint: Instances) -> list[_Found]:
        """For each cell the mask that agrees best with its box and area, of those that its peak and box ask for."""
        if not len(hint):
            return []
        answers = self._model.decode(embedding, points=peaks(hint)[:, None], boxes=hint.boxes_xyxy.astype(np.float64))
        found = []
        for i, crops in enumerate(answers.crops):
            own = Crop(_box(hint, i), hint.masks[i])
            pieces = [None if crop is None else one_piece(crop) for crop in crops]
            agreed = [0.0 if piece is None else agreement(piece, own) for piece in pieces]
            best = int(np.argmax(agreed))
            if (piece := pieces[best]) is not None and agreed[best] >= AGREEMENT:
                found.append(_Found(piece, float(answers.scores[i, best]), float(answers.stability[i, best])))
        return found

    def _automatic(self, embedding: Any, shape: tuple[int, int]) -> Instances:
        """The masks that a grid of points asks for, by the package's filters; weights = stability."""
        grid = (np.arange(self._config.points_per_side) + 0.5) / self._config.points_per_side
        x, y = np.meshgrid(grid * shape[1], grid * shape[0])
        answers = self._model.decode(
            embedding, points=np.stack([x.ravel(), y.ravel()], axis=1)[:, None], least=self._least
        )
        found = [
            _Found(crop, float(answers.scores[i, j]), float(answers.stability[i, j]))
            for i, crops in enumerate(answers.crops)
            for j, crop in enumerate(crops)
            if crop is not None
        ]
        boxes = torch.tensor([f.crop.box_xyxy for f in found], dtype=torch.float32).reshape(-1, 4)
        scores = torch.tensor([f.score for f in found])
        kept = batched_nms(boxes, scores, torch.zeros(len(found)), NMS_IOU).tolist()
        return _instances(shape, [found[i]._replace(crop=one_piece(found[i].crop)) for i in kept])


def sam(tools: Tools) -> SamLabeller:
    """The labeller `sam` with the weights that the settings name.

    Raises:
        CheckpointError: no weights, or not those of a SAM of that kind.
    """
    config = tools.config.sam
    return SamLabeller("sam", load_sam(config.kind, config.checkpoint, device=tools.device), config)


def peaks(cells: Instances) -> npt.NDArray[np.float64]:
    """(N, 2) x, y px: the centre of each cell's pixel farthest from its edge (image borders count as edges)."""
    found = np.zeros((len(cells), 2))
    for i, ((x0, y0, _, _), mask) in enumerate(zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True)):
        depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        found[i] = x0 + column - 0.5, y0 + row - 0.5
    return found


def agreement(crop: Crop, other: Crop) -> float:
    """In [0, 1]: the IoU of two masks' boxes times the ratio of the smaller area to the larger."""
    a, b = (np.array(c.box_xyxy) for c in (crop, other))
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = int(np.prod(sides.clip(min=0)))
    union = int(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared
    smaller, larger = sorted((int(crop.mask.sum()), int(other.mask.sum())))
    return shared / union * smaller / max(1, larger)


def one_piece(crop: Crop) -> Crop:
    """The largest part of a mask (8-connected), its holes filled."""
    mask = largest_part(crop.mask)
    rings, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), rings, -1, 1, cv2.FILLED).astype(np.bool_)
    x0, y0, _, _ = crop.box_xyxy
    tight = crop_mask(filled)
    return crop if tight is None else _moved(_Found(tight, 0, 0), x0, y0).crop


def _views(shape: tuple[int, int], cells: Instances, side: int) -> Iterator[tuple[Window, Instances]]:
    """Each window of the image with the cells that lie farthest from its inner edges, in the window's frame."""
    if max(shape) <= ZOOM * side:
        yield Window(0, 0, *shape), cells
        return
    windows = tiles(shape, side, int(WINDOW_OVERLAP * side))
    frames = np.array([(w.x0, w.y0, w.x1, w.y1) for w in windows])
    edges = np.array([0, 0, shape[1], shape[0]])
    room = (cells.boxes_xyxy[:, None] - frames) * [1, 1, -1, -1]
    room = np.where(frames == edges, max(shape), room).min(axis=2)
    owner = room.argmax(axis=1) if len(cells) else np.zeros(0, np.int64)
    for i, window in enumerate(windows):
        yield window, _within(cells.take(np.flatnonzero(owner == i)), window)


def _within(cells: Instances, window: Window) -> Instances:
    y0, x0, y1, x1 = window
    boxes, masks = [], []
    for box, mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True):
        left, top, right, bottom = max(box[0], x0), max(box[1], y0), min(box[2], x1), min(box[3], y1)
        part = mask[top - box[1] : bottom - box[1], left - box[0] : right - box[0]]
        if left < right and top < bottom and part.any():
            boxes.append((left - x0, top - y0, right - x0, bottom - y0))
            masks.append(part)
    return Instances.build((y1 - y0, x1 - x0), boxes, masks)


def _moved(found: _Found, x: int, y: int) -> _Found:
    x0, y0, x1, y1 = found.crop.box_xyxy
    return found._replace(crop=Crop((x0 + x, y0 + y, x1 + x, y1 + y), found.crop.mask))


def _box(cells: Instances, i: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = cells.boxes_xyxy[i].tolist()
    return x0, y0, x1, y1


def _instances(shape: tuple[int, int], found: Sequence[_Found]) -> Instances:
    return Instances.build(
        shape,
        [f.crop.box_xyxy for f in found],
        [f.crop.mask for f in found],
        scores=[f.score for f in found],
        weights=[f.stability for f in found],
    )


def _limited(cells: Instances) -> Instances:
    size = areas(cells)
    return cells.take(np.flatnonzero((size >= MIN_AREA) & (size <= MAX_SHARE * cells.shape[0] * cells.shape[1])))


def _best(cells: Instances) -> list[int]:
    """Of cells whose masks overlap beyond NMS_IOU the one of the best score, in the given order."""
    boxes = cells.boxes_xyxy
    stays = np.zeros(len(cells), np.bool_)
    for i in np.argsort(-cells.scores, kind="stable").tolist():
        meets = (boxes[:, :2] < boxes[i, 2:]).all(axis=1) & (boxes[:, 2:] > boxes[i, :2]).all(axis=1)
        better = np.flatnonzero(stays & meets)
        stays[i] = not (iou_matrix(cells.take([i]), cells.take(better)) > NMS_IOU).any()
    return [int(i) for i in np.flatnonzero(stays)]


def _added(cells: Instances, more: Instances) -> Instances:
    """`cells`, and those of `more` where there are none of them."""
    size, new = areas(cells), [cells]
    for start in range(0, len(more), _BAND):
        some = more.take(range(start, min(start + _BAND, len(more))))
        smaller = np.minimum(areas(some)[:, None], size[None])
        new.append(some.take(np.flatnonzero((intersections(some, cells) <= COVERED * smaller).all(axis=1))))
    return Instances.build(
        cells.shape,
        np.concatenate([part.boxes_xyxy for part in new]),
        [mask for part in new for mask in part.masks],
        scores=np.concatenate([part.scores for part in new]),
        weights=np.concatenate([part.weights for part in new]),
    )
