"""How large labelled cells are and of what shape, so that an answer to a click can be compared with them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from loop.errors import InputError, ShapeError
from loop.metrics.matching import Float64Array
from loop.types import BoolArray, Instances

LEAST_CELLS = 10
FEATURES = ("log_area", "solidity", "elongation")
FLOORS = (0.15, 0.03, 0.10)
"""Least spread of each feature, so that a few equal cells do not make every other one impossible."""
_MAD_TO_DEVIATION = 1.4826  # the median absolute deviation of a normal distribution is 1 / 1.4826 of its own


@dataclass(frozen=True)
class Typical:
    """Middle and spread of three features of labelled cells, in the order of FEATURES.

    - log_area: ln px.
    - solidity: px / px of the convex hull, in (0, 1].
    - elongation: ln of the longer over the shorter axis of the ellipse of equal second moments, >= 0.

    Attributes:
        median: of each feature.
        spread: 1.4826 x the median absolute deviation from it, not below FLOORS: the standard deviation where the
            feature is normally distributed, and nearly untouched by a few odd labels.
        cells: how many cells were measured.
    """

    median: tuple[float, ...]
    spread: tuple[float, ...]
    cells: int

    def of(self, masks: Sequence[BoolArray], *, cut: Sequence[bool] | BoolArray | None = None) -> Float64Array:
        """How usual cells of these sizes and shapes are; nothing is impossible.

        1 / (1 + d^2 / 3), where d^2 sums the squared deviations from the medians in spreads over the three features. A
        usual cell has about 0.5, one of exactly the median size and shape 1. More convex than the median is not odd.

        Args:
            masks: N arrays (h, w) bool, cropped or not, each with at least one pixel.
            cut: N flags, True where the image's edge cuts the cell: being smaller than the median is then not odd, and
                neither is its elongation. None: no cell is cut.

        Returns:
            (N,) float64 in (0, 1].

        Raises:
            ShapeError: a mask is empty, or there is not one flag a mask.

        Source: the heavy tail is that of a Cauchy distribution; no paper.
        """
        flags = np.zeros(len(masks), np.bool_) if cut is None else np.asarray(cut, np.bool_)
        if flags.shape != (len(masks),):
            raise ShapeError(f"{len(masks)} masks but flags of shape {flags.shape}; expected one flag a mask")
        features = np.reshape([shape_of(mask) for mask in masks], (-1, len(FEATURES)))
        deviation = (features - np.array(self.median)) / np.array(self.spread)
        deviation[:, 1] = np.minimum(deviation[:, 1], 0)
        deviation[flags, 0] = np.maximum(deviation[flags, 0], 0)
        deviation[flags, 2] = 0
        return np.asarray(1 / (1 + (deviation**2).sum(axis=1) / len(FEATURES)))

    def to_document(self) -> dict[str, Any]:
        """Ready for JSON; `from_document` is the inverse."""
        described = {
            name: {"median": middle, "spread": spread}
            for name, middle, spread in zip(FEATURES, self.median, self.spread, strict=True)
        }
        return {"cells": self.cells, **described}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Typical":
        """What `to_document` wrote.

        Raises:
            InputError: a number is missing, is none, or is out of its range.
        """
        try:
            median = tuple(float(document[name]["median"]) for name in FEATURES)
            spread = tuple(float(document[name]["spread"]) for name in FEATURES)
            cells = int(document["cells"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(_refused(document, f"{type(error).__name__}: {error}")) from error
        if not all(map(math.isfinite, (*median, *spread))) or min(spread) <= 0 or cells < 1:
            raise InputError(_refused(document, "numbers out of their range"))
        return cls(median, spread, cells)


def fit_typical(images: Sequence[Instances]) -> Typical | None:
    """Size and shape of the labelled cells of several images; None under 10 cells.

    Cells that touch their image's edge are cut and do not count, unless fewer than 10 are left without them. Empty
    masks do not count. Costs about 0.05 ms a cell of 20 px across.
    """
    whole: list[tuple[float, ...]] = []
    at_edge: list[tuple[float, ...]] = []
    for cells in images:
        for is_cut, mask in zip(touches_edge(cells), cells.masks, strict=True):
            if mask.any():
                (at_edge if is_cut else whole).append(shape_of(mask))
    measured = whole if len(whole) >= LEAST_CELLS else whole + at_edge
    if len(measured) < LEAST_CELLS:
        return None
    features = np.array(measured, np.float64)
    median = np.median(features, axis=0)
    spread = np.maximum(_MAD_TO_DEVIATION * np.median(np.abs(features - median), axis=0), FLOORS)
    return Typical(tuple(median.tolist()), tuple(spread.tolist()), len(measured))


def touches_edge(cells: Instances) -> BoolArray:
    """(N,) bool: whose box reaches an edge of the image."""
    (height, width), boxes = cells.shape, cells.boxes_xyxy
    return np.asarray((boxes[:, :2] == 0).any(axis=1) | (boxes[:, 2] == width) | (boxes[:, 3] == height))


def shape_of(mask: BoolArray) -> tuple[float, ...]:
    """The three features of a mask (h, w), cropped or not, in the order of FEATURES; `Typical` says what they are.

    Raises:
        ShapeError: the mask is empty.
    """
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    area = moments["m00"]
    if not area:
        raise ShapeError(f"an empty mask {mask.shape} has neither size nor shape; drop it")
    xx, yy, xy = (moments[name] / area for name in ("mu20", "mu02", "mu11"))
    difference = float(np.hypot(xx - yy, 2 * xy))
    pixel = 1 / 12  # second moment of the pixel itself, without which a line has no width
    longer, shorter = (xx + yy + difference) / 2 + pixel, max((xx + yy - difference) / 2, 0.0) + pixel
    return math.log(area), area / max(_hull_area(mask), area), 0.5 * math.log(longer / shorter)


def _hull_area(mask: BoolArray) -> float:
    """How many pixel centres the convex hull of the mask's pixel centres holds.

    Source: Pick 1899: a polygon with its corners on a grid holds area + points on its border / 2 + 1 of the grid's.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    first = mask[rows].argmax(axis=1)
    last = mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)
    ends: npt.NDArray[np.int32] = np.stack([np.r_[first, last], np.r_[rows, rows]], axis=1).astype(np.int32)
    hull = cv2.convexHull(ends)[:, 0]
    steps = np.abs(hull - np.roll(hull, -1, axis=0))
    return float(cv2.contourArea(hull)) + float(np.gcd(steps[:, 0], steps[:, 1]).sum()) / 2 + 1


def _refused(document: object, reason: str) -> str:
    return (
        f"the typical cells {str(document)[:80]!r} cannot be read ({reason}); expected 'cells' and of "
        f"{', '.join(FEATURES)} a 'median' and a 'spread' above 0: the next round writes them again"
    )
