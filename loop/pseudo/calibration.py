"""How likely a person would keep a proposed cell: learnt from labelled images, so that no cell calibrates itself."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

from loop.config import PseudoConfig
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.calibration import Bin, brier_error, expected_calibration_error, reliability, spearman
from loop.metrics.matching import Float64Array, Int64Array, areas, best_pairs, iou_matrix
from loop.pseudo.evidence import EVIDENCE
from loop.pseudo.fusion import Fused
from loop.types import BoolArray, FloatArray, Instances

ISOTONIC_CELLS = 300
FURTHEST = 4.0  # standard deviations; what lies beyond counts as so far
SHARE_OF_LINE = 0.3  # of the logistic curve in the isotonic one, so that no two scores tie
L2 = 10.0


class Calibrator(BaseModel):
    """Evidence to confidence: a linear score, then a rising curve; plain numbers, equal where they are equal.

    Attributes:
        names: the F columns of the evidence.
        mean, scale, weights: F numbers each; the score is bias + sum of weights x (feature - mean) / scale, the last
            kept within 4 of 0.
        bias: of the score.
        slope, offset: of the logistic curve expit(slope x score + offset), slope >= 0.
        knots: (score, chance) of the isotonic curve, both rising; empty where there were too few cells for it.
        keep_iou: from which IoU on a person's cell agreed.
        cells, images: how many it was fitted on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...]
    mean: tuple[FiniteFloat, ...]
    scale: tuple[FiniteFloat, ...]
    weights: tuple[FiniteFloat, ...]
    bias: FiniteFloat
    slope: FiniteFloat
    offset: FiniteFloat
    knots: tuple[tuple[FiniteFloat, FiniteFloat], ...]
    keep_iou: FiniteFloat
    cells: int
    images: int

    def score(self, features: FloatArray) -> Float64Array:
        """(N,) linear score, any real number; `confidence` rises with it. Arguments and errors as there."""
        _check_features(features, self.names)
        return _linear(features, np.array(self.mean), np.array(self.scale), np.array([*self.weights, self.bias]))

    def confidence(self, features: FloatArray) -> FloatArray:
        """(N,) float32 in [0, 1]: the chance that a person's cell agrees at `keep_iou`.

        Args:
            features: (N, F) as `evidence` gives them; N may be 0.

        Raises:
            ShapeError: another number of columns than the calibrator was fitted on.
            NonFiniteError: a value is NaN or infinite; the text names the column.
        """
        return _curve(self.score(features), self.slope, self.offset, self.knots)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `from_dict` gives an equal calibrator back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Calibrator":
        """The calibrator that `to_dict` wrote.

        Raises:
            InputError: it is none, or one of other evidence than today's.
        """
        try:
            found = cls.model_validate(stored)
        except ValidationError as error:
            raise InputError(f"this is no stored calibrator: {error}; fit it again") from error
        if found.names != EVIDENCE or any(len(n) != len(EVIDENCE) for n in (found.mean, found.scale, found.weights)):
            raise InputError(f"the calibrator reads {found.names}; today's evidence is {EVIDENCE}: fit it again")
        return found


class Calibration(NamedTuple):
    """A fitted calibrator and how good it is on cells that it was not fitted on.

    Attributes:
        calibrator: fitted on all cells.
        out_of_fold: (N,) float32, confidence of each cell by a calibrator fitted without any cell of its image.
        figures: of `out_of_fold`: "ece", "ece_mass" (10 bins of equal width, of equal mass), "brier_error", "spearman"
            (with the IoU); and "cells", "images", "agreed" (the share of cells).
        bins: reliability of `out_of_fold` in 10 bins of equal width.
    """

    calibrator: Calibrator
    out_of_fold: FloatArray
    figures: dict[str, float]
    bins: list[Bin]


def calibrate(
    features: FloatArray, iou: FloatArray, images: Sequence[str], config: PseudoConfig, *, folds: int = 10
) -> Calibration:
    """A calibrator from cells that a person has judged, and that the labellers were not taught.

    A logistic regression with an L2 penalty on standardised features gives the score. The curve from score to
    confidence is fitted on scores of cells whose images the regression has not seen: the logistic one (Platt), blended
    with the isotonic one from 300 cells on.

    Args:
        features: (N, F) as `evidence` gives them.
        iou: (N,) as `true_iou` gives it; a cell agrees from `config.keep_iou` on.
        images: N image ids, or names of their groups: cells of one are never on both sides.
        config: `keep_iou`, `calibrate_cells`.
        folds: parts of the images, >= 2; at most as many as there are images.

    Raises:
        InputError: as `reason_against` says, or `folds` < 2.
        NonFiniteError: a value is NaN or infinite; the text names the column.
        ShapeError: not one IoU and one image for each row, or not one column for each name in `EVIDENCE`.

    Source: Platt 1999; Zadrozny & Elkan 2002 (isotonic). Differs: both curves together, so that no two scores tie.
    """
    if not len(features) == len(iou) == len(images):
        raise ShapeError(
            f"{len(features)} rows of evidence, {len(iou)} IoU, {len(images)} images; give one each a cell"
        )
    _check_features(features, EVIDENCE)
    if not np.isfinite(iou).all():
        raise NonFiniteError("an IoU is NaN or infinite; calibrate on judged cells only")
    reason = reason_against(iou, images, config)
    if reason or folds < 2:
        raise InputError(reason or f"folds={folds}; give at least 2")
    agreed = np.asarray(iou >= config.keep_iou)
    part = _parts(images, folds)
    out_of_fold = np.zeros(len(iou), np.float32)
    for k in range(int(part.max()) + 1):
        others = part != k
        rest = [image for image, other in zip(images, others.tolist(), strict=True) if other]
        fitted = _fit(features[others], agreed[others], rest, folds, config.keep_iou)
        out_of_fold[~others] = fitted.confidence(features[~others])
    calibrator = _fit(features, agreed, images, folds, config.keep_iou)
    figures = {
        "ece": expected_calibration_error(out_of_fold, agreed),
        "ece_mass": expected_calibration_error(out_of_fold, agreed, binning="mass"),
        "brier_error": brier_error(out_of_fold, agreed),
        "spearman": spearman(out_of_fold, iou),
        "cells": float(len(iou)),
        "images": float(len(set(images))),
        "agreed": float(agreed.mean()),
    }
    return Calibration(calibrator, out_of_fold, figures, reliability(out_of_fold, agreed))


def reason_against(iou: FloatArray, images: Sequence[str], config: PseudoConfig) -> str:
    """Why these cells calibrate nothing, in a sentence; "" where they can."""
    n, agreed = len(iou), int(np.count_nonzero(np.asarray(iou) >= config.keep_iou))
    if n < config.calibrate_cells:
        return f"{n} judged cells calibrate nothing; {config.calibrate_cells} are needed: label more images"
    if len(set(images)) < 2:
        return "all judged cells are of one image; cells of at least 2 are needed: label more images"
    if agreed in (0, n):
        return (
            f"{agreed} of {n} judged cells agree with a person's at IoU {config.keep_iou}; some must and some must "
            "not: label more images"
        )
    return ""


def true_iou(proposed: Instances, person: Instances) -> FloatArray:
    """(N,) float32 in [0, 1]: IoU of each proposed cell with the person's cell that it is paired with, else 0.

    Pairs are one to one, the best first: of two halves of a cell, one is right as far as it goes and one is not.

    Raises:
        ShapeError: the two belong to images of different sizes.
    """
    iou = iou_matrix(proposed, person)
    rows, columns = best_pairs(iou).T
    paired = np.zeros(len(proposed), np.float32)
    paired[rows] = iou[rows, columns]
    return paired


def judged(proposed: Instances, known: BoolArray | None) -> BoolArray:
    """(N,) bool: whether half of a cell's pixels or more lie where the person's labels are complete.

    Args:
        proposed: N >= 0 cells.
        known: (H, W) bool as in `Sample`; None = everywhere.

    Raises:
        ShapeError: `known` is not of the cells' shape.
    """
    if known is None:
        return np.ones(len(proposed), np.bool_)
    if known.shape != proposed.shape:
        raise ShapeError(f"the known ground is {known.shape}, the cells lie in {proposed.shape}; expected the same")
    pairs = zip(proposed.boxes_xyxy.tolist(), proposed.masks, strict=True)
    inside = [np.count_nonzero(mask & known[y0:y1, x0:x1]) for (x0, y0, x1, y1), mask in pairs]
    return np.asarray(2 * np.array(inside, np.int64) >= areas(proposed))


def uncalibrated(fused: Fused) -> FloatArray:
    """(N,) float32 in [0, 1]: score x stability, to show cells by while nothing is calibrated; not to teach by."""
    return np.asarray(fused.instances.scores * fused.stability, np.float32)


def _fit(features: FloatArray, agreed: BoolArray, images: Sequence[str], folds: int, keep_iou: float) -> Calibrator:
    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6, scale, 1.0)
    line = _logistic(_standard(features, mean, scale), agreed, L2)
    scores = np.zeros(len(agreed))
    part = _parts(images, folds)
    for k in range(int(part.max()) + 1):
        own = part == k
        seen = _logistic(_standard(features[~own], mean, scale), agreed[~own], L2) if not own.all() else line
        scores[own] = _linear(features[own], mean, scale, seen)
    slope, offset = _platt(scores, agreed)
    return Calibrator(
        names=EVIDENCE,
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(line[:-1].tolist()),
        bias=float(line[-1]),
        slope=slope,
        offset=offset,
        knots=_knots(scores, agreed) if len(agreed) >= ISOTONIC_CELLS else (),
        keep_iou=keep_iou,
        cells=len(agreed),
        images=len(set(images)),
    )


def _parts(images: Sequence[str], folds: int) -> Int64Array:
    """(N,) part of each cell, 0 to at most folds - 1: whole images, the largest dealt first, to the smallest part."""
    names, cells = np.unique(np.asarray(images, dtype=np.str_), return_counts=True)
    part: dict[str, int] = {}
    load = [0] * min(folds, len(names))
    for i in np.argsort(-cells, kind="stable").tolist():
        least = load.index(min(load))
        part[str(names[i])] = least
        load[least] += int(cells[i])
    return np.array([part[image] for image in images], np.int64)


def _standard(features: FloatArray, mean: Float64Array, scale: Float64Array) -> Float64Array:
    return np.asarray(np.clip((features - mean) / scale, -FURTHEST, FURTHEST), np.float64)


def _linear(features: FloatArray, mean: Float64Array, scale: Float64Array, line: Float64Array) -> Float64Array:
    return np.asarray(_standard(features, mean, scale) @ line[:-1] + line[-1], np.float64)


def _logistic(x: Float64Array, target: npt.NDArray[Any], l2: float) -> Float64Array:
    """(F + 1,) weights and bias of the penalised logistic regression of targets (N,) in [0, 1] on x (N, F).

    The bias is penalised by a thousandth, so that it stays finite where all targets are alike.
    """
    wanted = np.asarray(target, np.float64)
    penalty = np.append(np.full(x.shape[1], l2), 1e-3)

    def loss(line: Float64Array) -> tuple[float, Float64Array]:
        scores = x @ line[:-1] + line[-1]
        error = expit(scores) - wanted
        value = float((np.logaddexp(0, scores) - wanted * scores).sum() + (penalty * line**2).sum() / 2)
        return value, np.append(x.T @ error, error.sum()) + penalty * line

    return np.asarray(minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x, np.float64)


def _platt(scores: Float64Array, agreed: BoolArray) -> tuple[float, float]:
    """Slope >= 0 and offset of the logistic curve; level where better scores agreed no more often."""
    right, n = int(agreed.sum()), len(agreed)
    smoothed = np.where(agreed, (right + 1) / (right + 2), 1 / (n - right + 2))
    slope, offset = _logistic(scores[:, None], smoothed, 1e-3).tolist()
    if slope > 0:
        return slope, offset
    return 0.0, float(np.log((right + 1) / (n - right + 1)))


def _knots(scores: Float64Array, agreed: BoolArray) -> tuple[tuple[float, float], ...]:
    """Mean score and chance of each step of the isotonic curve; a step's chance counts half a cell for either side."""
    places, place, cells = np.unique(scores, return_inverse=True, return_counts=True)
    right = np.bincount(place, weights=agreed)
    steps = isotonic_regression(right / cells, weights=cells).blocks.tolist()
    x = [float(np.average(places[a:b], weights=cells[a:b])) for a, b in pairwise(steps)]
    y = [float((right[a:b].sum() + 0.5) / (cells[a:b].sum() + 1)) for a, b in pairwise(steps)]
    return tuple(zip(x, np.maximum.accumulate(y).tolist(), strict=True))


def _curve(scores: Float64Array, slope: float, offset: float, knots: Sequence[tuple[float, float]]) -> FloatArray:
    chance = expit(slope * scores + offset)
    if knots:
        x, y = np.array(knots).T
        chance = SHARE_OF_LINE * chance + (1 - SHARE_OF_LINE) * np.interp(scores, x, y)
    return np.asarray(np.clip(chance, 0, 1), np.float32)


def _check_features(features: FloatArray, names: Sequence[str]) -> None:
    if features.ndim != 2 or features.shape[1] != len(names):
        raise ShapeError(f"the evidence is {features.shape}; expected (N, {len(names)}): {', '.join(names)}")
    broken = np.argwhere(~np.isfinite(features))
    if len(broken):
        row, column = broken[0].tolist()
        raise NonFiniteError(f"{names[column]} of cell number {row} is {features[row, column]}; expected a number")
