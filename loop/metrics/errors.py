"""What stands between predicted and true cells: how much masks and ranking lose, and which cells go wrong.

Two what-ifs bound what better masks or a better ranking could gain (Prytula 2023, section 5.7.4 and table 5.11), and
four counts say what went wrong in words a biologist uses. Dice orders pairs as IoU does; both are of whole masks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from loop.metrics.instance import Pair, evaluate
from loop.metrics.matching import Float64Array, Int64Array, areas, intersections, iou_of, match
from loop.types import Instances

AP_KEYS = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")

FOUND_IOU = 0.5
TOUCHED = 0.1
HALF = 0.5


def error_analysis(pairs: Sequence[Pair]) -> dict[str, Any]:
    """AP as predicted and in the two what-ifs, and the four counts over all images.

    Args:
        pairs: (predicted, true) cells, one pair an image, as `evaluate` takes them.

    Returns:
        "as_predicted", "with_true_masks", "best_matched": each {ap, ap50, ap75, ap_s, ap_m, ap_l} as `evaluate` defines
        them (in [0, 1], None for a size range without true cells); "missed", "invented", "merged", "split": int.

    Raises:
        InputError: no images.
        ShapeError: a pair's cells lie in images of different sizes.
        NonFiniteError: a predicted score is NaN or infinite.

    Source: Prytula 2023, table 5.11 (baseline, w/ gt mask, gt matched). Differs: the counts are ours.
    """
    variants = {
        "as_predicted": pairs,
        "with_true_masks": [(with_true_masks(pred, gt), gt) for pred, gt in pairs],
        "best_matched": [(best_matched(pred, gt), gt) for pred, gt in pairs],
    }
    result: dict[str, Any] = {}
    for name, variant in variants.items():
        measured = evaluate(variant)
        result[name] = {key: measured[key] for key in AP_KEYS}
    counts = [error_counts(pred, gt) for pred, gt in pairs]
    return {**result, **{key: sum(count[key] for count in counts) for key in ("missed", "invented", "merged", "split")}}


def with_true_masks(pred: Instances, gt: Instances) -> Instances:
    """The predicted cells, each with the mask of the true cell of best Dice: what perfect outlines would give.

    Scores, labels and order are kept. A prediction that touches no true cell keeps its own mask. Several predictions of
    one true cell all get its mask; one of them can match, the others count as false positives as before. So what is
    left of the error is cells not found, cells found twice or in the wrong place, and their ranking.

    Args:
        pred: P cells.
        gt: G cells of the same image.

    Raises:
        ShapeError: the two belong to images of different sizes.

    Source: Prytula 2023, section 5.7.4 (w/ gt mask). Our reading: the best Dice has no lower bound but 0; the first of
    equal true cells is taken.
    """
    shared = intersections(pred, gt)
    if shared.size == 0:
        return pred
    dice = _dice(shared, areas(pred), areas(gt))
    best, touched = dice.argmax(axis=1), shared.sum(axis=1) > 0
    return Instances.build(
        pred.shape,
        np.where(touched[:, None], gt.boxes_xyxy[best], pred.boxes_xyxy),
        [gt.masks[k] if hit else own for k, hit, own in zip(best.tolist(), touched.tolist(), pred.masks, strict=True)],
        scores=pred.scores,
        labels=pred.labels,
        weights=pred.weights,
        image_id=pred.image_id,
        source=pred.source,
        model_version=pred.model_version,
    )


def best_matched(pred: Instances, gt: Instances) -> Instances:
    """The predicted cells that are the best one of a true cell, unchanged: what a perfect ranking would keep.

    Pairs are taken by falling Dice, each predicted and each true cell once, as long as they share a pixel. Left out are
    doubles and cells where nothing is; missed cells stay missed and poor outlines poor.

    Args:
        pred: P cells.
        gt: G cells of the same image.

    Returns:
        At most min(P, G) cells in the order of `pred`.

    Raises:
        ShapeError: the two belong to images of different sizes.

    Source: Prytula 2023, section 5.7.4 (gt matched). Our reading: the thesis keeps masks of "high" Dice without a
    number; we keep the best one of each true cell however high.
    """
    shared = intersections(pred, gt)
    dice = _dice(shared, areas(pred), areas(gt))
    rows, cols = np.nonzero(shared)
    free_rows, free_cols = np.ones(len(pred), np.bool_), np.ones(len(gt), np.bool_)
    for k in np.argsort(-dice[rows, cols], kind="stable").tolist():
        if free_rows[rows[k]] and free_cols[cols[k]]:
            free_rows[rows[k]] = free_cols[cols[k]] = False
    return pred.take(np.flatnonzero(~free_rows))


def error_counts(pred: Instances, gt: Instances) -> dict[str, int]:
    """How many cells were missed, invented, merged and split.

    First, predicted and true cells are paired one to one at IoU >= 0.5: a true cell with a partner is found. Then

    - merged: predicted cells that cover at least half of each of two or more true cells; a true cell that another
      prediction finds does not count, so a small cell lying on a large one, both found, is no merger;
    - split: true cells not found, in which at least half of each of two or more predicted cells lies; predicted cells
      that find another true cell, and those that merge, do not count;
    - missed: true cells not found, neither split nor under a merging prediction, of which no prediction covers a tenth
      or more; predicted cells that find another true cell do not count;
    - invented: predicted cells that find nothing and of which less than a tenth lies on any one true cell.

    A true cell is at most one of found, split and missed, a predicted one at most one of merging and invented; a true
    cell badly outlined (touched, but below IoU 0.5) and a second prediction of a found cell are none of them. A cell in
    two pieces of which one alone reaches IoU 0.5 is found, not split.

    Args:
        pred: P cells, whatever their scores: drop those you would not show first.
        gt: G cells of the same image.

    Returns:
        {"missed", "invented", "merged", "split"}: "missed" and "split" count true cells, the others predicted ones.

    Raises:
        ShapeError: the two belong to images of different sizes.
    """
    shared, pred_areas, gt_areas = intersections(pred, gt), areas(pred), areas(gt)
    rows, cols = match(iou_of(shared, pred_areas, gt_areas), FOUND_IOU).T
    finder, found = np.zeros(len(pred), np.bool_), np.zeros(len(gt), np.bool_)
    finder[rows], found[cols] = True, True
    theirs = np.zeros(shared.shape, np.bool_)
    theirs[rows, cols] = True
    covered = shared / np.maximum(gt_areas, 1)[None, :]
    within = shared / np.maximum(pred_areas, 1)[:, None]

    under = (covered >= HALF) & (theirs | ~found[None, :])
    merging = under.sum(axis=1) >= 2
    merged_away = under[merging].any(axis=0)
    spare = ~finder & ~merging
    split = ~found & ~merged_away & ((within >= HALF)[spare].sum(axis=0) >= 2)
    touched = (covered >= TOUCHED)[~finder].any(axis=0)
    missed = ~found & ~merged_away & ~split & ~touched
    invented = ~finder & ~(within >= TOUCHED).any(axis=1) & ~merging
    kinds = {"missed": missed, "invented": invented, "merged": merging, "split": split}
    return {name: int(np.count_nonzero(which)) for name, which in kinds.items()}


def _dice(shared: Int64Array, pred_areas: Int64Array, gt_areas: Int64Array) -> Float64Array:
    """(P, G) float64 in [0, 1]; 0 where both masks are empty."""
    dice: Float64Array = 2 * shared / np.maximum(pred_areas[:, None] + gt_areas[None, :], 1)
    return dice
