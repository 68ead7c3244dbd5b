"""How far two people agree about the cells of one image; neither is the truth, so every number is symmetric.

| key | what |
|---|---|
| f1 | 2 K / (P + G) of the K one-to-one pairs with IoU >= 0.5 |
| pq | sum of the IoU of those pairs / ((P + G) / 2) |
| mean_iou | mean IoU of those pairs |
| ap | K / (P + G - K), the mean over the IoU thresholds .50:.95 |
| count_difference | abs(P - G) |

Labels of people have no scores, so the AP over scores that rates a model (loop/metrics/instance.py) does not apply;
`ap` is the one of the matching papers, which needs none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from loop.metrics.instance import IOU_THRESHOLDS
from loop.metrics.matching import iou_matrix, match
from loop.types import Instances


class Agreement(NamedTuple):
    """Two label sets of one image, P and G cells; f1, pq and ap in [0, 1], 1 where both sets are empty.

    Attributes:
        n_first: P.
        n_second: G.
        n_pairs: K, the pairs with IoU >= 0.5.
        iou_of_pairs: sum of their IoU.
        ap: see the module's text.
    """

    n_first: int
    n_second: int
    n_pairs: int
    iou_of_pairs: float
    ap: float

    @property
    def f1(self) -> float:
        """Share of the cells that both drew."""
        return self._of_half(self.n_pairs)

    @property
    def pq(self) -> float:
        """Panoptic quality."""
        return self._of_half(self.iou_of_pairs)

    @property
    def mean_iou(self) -> float | None:
        """How alike the cells are that both drew; None where there is no such cell."""
        return self.iou_of_pairs / self.n_pairs if self.n_pairs else None

    @property
    def count_difference(self) -> int:
        """By how many cells the two differ."""
        return abs(self.n_first - self.n_second)

    def _of_half(self, amount: float) -> float:
        cells = self.n_first + self.n_second
        return 2 * amount / cells if cells else 1.0


def agreement_of(first: Instances, second: Instances) -> Agreement:
    """How far two label sets of one image agree; classes and scores do not count.

    Args:
        first: P cells; 0 included.
        second: G cells of the same image; 0 included.

    Raises:
        ShapeError: the two belong to images of different sizes.

    Source: Schmidt et al., MICCAI 2018 (StarDist), section 3: AP = TP / (TP + FN + FP), and Kirillov et al., CVPR 2019,
    equation 1 (PQ). Differs: where neither set has a cell the two agree.
    """
    iou = iou_matrix(first, second)
    pairs = match(iou, 0.5)
    either = len(first) + len(second)
    shares = []
    for threshold in IOU_THRESHOLDS.tolist():
        n = len(match(iou, threshold))
        shares.append(n / (either - n) if either else 1.0)
    found = float(iou[pairs[:, 0], pairs[:, 1]].sum())
    return Agreement(len(first), len(second), len(pairs), found, float(np.mean(shares)))


def summary_of(found: Sequence[Agreement]) -> dict[str, float | int | None]:
    """f1, pq and mean_iou over the cells of all comparisons, ap and count_difference their means; none of them of none.

    Returns:
        f1, pq, mean_iou (None where no cell was drawn by both), ap, count_difference, cells (of both sets together).
        {} for no comparisons.
    """
    if not found:
        return {}
    whole = Agreement(
        sum(one.n_first for one in found),
        sum(one.n_second for one in found),
        sum(one.n_pairs for one in found),
        sum(one.iou_of_pairs for one in found),
        float(np.mean([one.ap for one in found])),
    )
    return {
        "f1": whole.f1,
        "pq": whole.pq,
        "mean_iou": whole.mean_iou,
        "ap": whole.ap,
        "count_difference": float(np.mean([one.count_difference for one in found])),
        "cells": whole.n_first + whole.n_second,
    }
