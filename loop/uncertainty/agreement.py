"""How far several looks at an image agree on its cells: the certainty of each cell, the disagreement of the image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array, iou_matrix, match
from loop.types import BoolArray, Instances, IntArray

SAME_CELL = 0.5
"""Cells of two looks whose IoU reaches this are observations of one cell."""


class Agreement(NamedTuple):
    """What M looks at an image make of its cells together.

    Attributes:
        cells: N >= 0 cells, each seen in one look or more: the pixels that at least half of its observations have;
            `scores` are the mean scores of the observations, all else is as in the first of them.
        semantic: (N,) float64 in [0, 1], how sure the looks that saw the cell are that it is one.
        spatial: (N,) float64 in [0, 1], how far they agree on its outline.
        occurrence: (N,) float64 in [0, 1], the share of the looks that saw it.
    """

    cells: Instances
    semantic: Float64Array
    spatial: Float64Array
    occurrence: Float64Array

    @property
    def certainty(self) -> Float64Array:
        """(N,) float64 in [0, 1]: the product of the three."""
        return self.semantic * self.spatial * self.occurrence

    @property
    def disagreement(self) -> float:
        """1 minus the mean certainty of the cells, in [0, 1]; 0 where no look saw a cell."""
        return 1 - float(self.certainty.mean()) if len(self.cells) else 0.0


def agreement(looks: Sequence[Instances], *, same_cell: float = SAME_CELL) -> Agreement:
    """Pairs the cells of several looks into observations of one cell each, and says how certain each cell is.

    Look after look, the cells found are paired one-to-one by IoU with the first observation of each cell known so far;
    what finds no partner is a cell of its own. Semantic certainty is the mean score of a cell's observations, spatial
    the mean IoU of their masks with the mask that at least half of them have, occurrence how many there are, of M.

    Args:
        looks: the cells of M >= 1 looks at one image, in the same coordinates; `image_id` is named in errors.
        same_cell: IoU from which two are one cell, in (0, 1].

    Raises:
        InputError: no looks, or `same_cell` is out of its range.
        ShapeError: looks at images of different sizes.
        NonFiniteError: a score is NaN or infinite; names the image.

    Source: Blok et al. 2022 (MaskAL, arXiv 2112.06586): semantic, spatial and occurrence certainty, their product and
    its mean over the image. Differs: with one class, the semantic certainty is the score in place of 1 minus the
    normalised entropy of the classes, which would call a cell of score 0.1 as certain as one of 0.9; the spatial
    certainty compares masks alone, not boxes too, with the mask that half of the observations have in place of a
    quarter; a look gives at most one observation of a cell; an image without any cell is certain. The cost grows with
    the pairs of cells whose boxes touch.
    """
    _check(looks)
    observed: list[list[tuple[int, int]]] = []  # of each cell: look and number there
    known = looks[0].take([])
    for number, look in enumerate(looks):
        pairs = match(iou_matrix(known, look), same_cell)
        for cell, found in pairs.tolist():
            observed[cell].append((number, found))
        fresh = np.setdiff1d(np.arange(len(look)), pairs[:, 1])
        observed += [[(number, found)] for found in fresh.tolist()]
        known = _joined(known, look.take(fresh))
    crops, semantic, spatial = [], np.zeros(len(observed)), np.zeros(len(observed))
    boxes = np.zeros((len(observed), 4), np.int32)
    for i, cell in enumerate(observed):
        boxes[i], crop, spatial[i] = _mean_mask([(looks[k].boxes_xyxy[j], looks[k].masks[j]) for k, j in cell])
        semantic[i] = np.mean([looks[k].scores[j] for k, j in cell], dtype=np.float64)
        crops.append(crop)
    occurrence = np.array([len(cell) / len(looks) for cell in observed])
    cells = Instances.build(
        known.shape,
        boxes,
        crops,
        scores=semantic.astype(np.float32),
        labels=known.labels,
        weights=known.weights,
        image_id=known.image_id,
        source=known.source,
        model_version=known.model_version,
    )
    return Agreement(cells, semantic, spatial, occurrence)


def _check(looks: Sequence[Instances]) -> None:
    if not looks:
        raise InputError("no looks at the image to compare; give at least one")
    if any(look.shape != looks[0].shape for look in looks):
        raise ShapeError(f"looks at images of {sorted({look.shape for look in looks})}; expected one shape (H, W)")
    if not all(np.isfinite(look.scores).all() for look in looks):
        raise NonFiniteError(
            f"a score of a cell of image {looks[0].image_id!r} is NaN or infinite; train the model again"
        )


def _joined(one: Instances, other: Instances) -> Instances:
    """The cells of both."""
    return Instances.build(
        one.shape,
        np.concatenate([one.boxes_xyxy, other.boxes_xyxy]),
        [*one.masks, *other.masks],
        scores=np.concatenate([one.scores, other.scores]),
        labels=np.concatenate([one.labels, other.labels]),
        weights=np.concatenate([one.weights, other.weights]),
        image_id=one.image_id,
        source=one.source,
        model_version=one.model_version,
    )


def _mean_mask(seen: Sequence[tuple[IntArray, BoolArray]]) -> tuple[IntArray, BoolArray, float]:
    """Box (4,) and mask of the pixels that at least half of the observations have, and their mean IoU with it."""
    boxes = np.array([box for box, _ in seen])
    (left, top), (right, bottom) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    stack = np.zeros((len(seen), bottom - top, right - left), np.bool_)
    for plane, (x0, y0, x1, y1), (_, mask) in zip(stack, boxes, seen, strict=True):
        plane[y0 - top : y1 - top, x0 - left : x1 - left] = mask
    middle: BoolArray = 2 * stack.sum(axis=0) >= len(seen)
    shared, union = (stack & middle).sum(axis=(1, 2)), (stack | middle).sum(axis=(1, 2))
    return np.array([left, top, right, bottom], np.int32), middle, float(np.mean(shared / np.maximum(union, 1)))
