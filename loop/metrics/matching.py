"""How much predicted cells overlap the true ones, and which of them belong together."""

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from loop.errors import InputError, ShapeError
from loop.types import Instances

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


def areas(instances: Instances) -> Int64Array:
    """Pixels of every mask: (N,) int64; (0,) for no cells."""
    return np.array([np.count_nonzero(mask) for mask in instances.masks], dtype=np.int64)


def intersections(pred: Instances, gt: Instances) -> Int64Array:
    """Pixels that every predicted cell shares with every true one.

    Only pairs whose boxes overlap are touched, and of these only the common part of the boxes: the cost grows with
    the number of such pairs, not with the image.

    Args:
        pred: P cells.
        gt: G cells of the same image.

    Returns:
        (P, G) int64; P or G may be 0.

    Raises:
        ShapeError: the two belong to images of different sizes.
    """
    if pred.shape != gt.shape:
        raise ShapeError(
            f"predicted cells of {gt.image_id or pred.image_id or 'an image'} lie in {pred.shape}, the true ones in "
            f"{gt.shape} (H, W); compare cells of the same image"
        )
    counts = np.zeros((len(pred), len(gt)), dtype=np.int64)
    if counts.size == 0:
        return counts
    low = np.maximum(pred.boxes_xyxy[:, None, :2], gt.boxes_xyxy[None, :, :2])
    high = np.minimum(pred.boxes_xyxy[:, None, 2:], gt.boxes_xyxy[None, :, 2:])
    rows, cols = np.nonzero((low < high).all(axis=2))
    parts = np.concatenate([low[rows, cols], high[rows, cols]], axis=1).tolist()
    origins_p, origins_g = pred.boxes_xyxy[:, :2].tolist(), gt.boxes_xyxy[:, :2].tolist()
    for i, j, (x0, y0, x1, y1) in zip(rows.tolist(), cols.tolist(), parts, strict=True):
        px, py = origins_p[i]
        gx, gy = origins_g[j]
        common = pred.masks[i][y0 - py : y1 - py, x0 - px : x1 - px] & gt.masks[j][y0 - gy : y1 - gy, x0 - gx : x1 - gx]
        counts[i, j] = np.count_nonzero(common)
    return counts


def iou_matrix(pred: Instances, gt: Instances) -> Float64Array:
    """IoU of every predicted cell with every true one.

    Args:
        pred: P cells; they may overlap one another.
        gt: G cells of the same image; they may overlap one another.

    Returns:
        (P, G) float64 in [0, 1]; 0 where both masks are empty; P or G may be 0.

    Raises:
        ShapeError: the two belong to images of different sizes.
    """
    return iou_of(intersections(pred, gt), areas(pred), areas(gt))


def iou_of(inter: Int64Array, pred_areas: Int64Array, gt_areas: Int64Array) -> Float64Array:
    """IoU from what `intersections` and `areas` count: (P, G) float64 in [0, 1], 0 where the union is empty."""
    union = pred_areas[:, None] + gt_areas[None, :] - inter
    iou: Float64Array = inter / np.maximum(union, 1)
    return iou


def match(iou: Float64Array, threshold: float) -> Int64Array:
    """One-to-one pairs whose IoU reaches a threshold: as many as possible, and of those the highest IoU in all.

    Args:
        iou: (P, G) in [0, 1].
        threshold: in (0, 1]; a pair counts when its IoU is at least this.

    Returns:
        (K, 2) int64, row and column of each pair, ascending by row; K may be 0. No row and no column appears twice.

    Raises:
        InputError: the threshold is out of its range.

    Source: StarDist matching.py, `matching` (linear assignment). Differs: the assignment is solved only where a cell
    has more than one partner to choose from; elsewhere the pair is read off.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"the matching threshold is {threshold}; give an IoU in (0, 1]")
    allowed = iou >= threshold
    rows, cols = np.nonzero(allowed)
    alone = (allowed.sum(axis=1)[rows] == 1) & (allowed.sum(axis=0)[cols] == 1)
    pairs = np.stack([rows[alone], cols[alone]], axis=1).astype(np.int64)
    if alone.all():
        return pairs
    open_rows, open_cols = np.unique(rows[~alone]), np.unique(cols[~alone])
    part = iou[np.ix_(open_rows, open_cols)]
    fewest = min(part.shape)
    gain = np.where(part >= threshold, 1.0 + part / (2 * fewest), 0.0)
    chosen_r, chosen_c = linear_sum_assignment(gain, maximize=True)
    kept = part[chosen_r, chosen_c] >= threshold
    contested = np.stack([open_rows[chosen_r[kept]], open_cols[chosen_c[kept]]], axis=1)
    together = np.concatenate([pairs, contested.astype(np.int64)])
    return together[np.argsort(together[:, 0], kind="stable")]


def best_pairs(iou: Float64Array) -> Int64Array:
    """One-to-one pairs that share a pixel, the highest IoU first; of equals the earlier row, then column.

    Unlike `match`, no pair is given up so that more pairs are found.

    Args:
        iou: (P, G) in [0, 1].

    Returns:
        (K, 2) int64, row and column of each pair, ascending by row; K may be 0. No row and no column appears twice.
    """
    rows, cols = np.nonzero(iou > 0)
    free_rows, free_cols = np.ones(iou.shape[0], np.bool_), np.ones(iou.shape[1], np.bool_)
    pairs: list[tuple[int, int]] = []
    for k in np.argsort(-iou[rows, cols], kind="stable").tolist():
        row, col = int(rows[k]), int(cols[k])
        if free_rows[row] and free_cols[col]:
            free_rows[row] = free_cols[col] = False
            pairs.append((row, col))
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
