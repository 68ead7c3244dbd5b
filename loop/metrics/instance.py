"""How well predicted cells agree with the true ones, over many images or for one.

Every number is in [0, 1] and higher is better, but for `count_error` (lower is better, not bounded by 1). Cells of all
labels count as one class. The images may be of different sizes, masks may overlap.

| key | what | over the images |
|---|---|---|
| ap, ap50, ap75 | COCO mask AP, mean of IoU .50:.95, at .50, at .75; the 1,000 best-scored cells of an image | pooled |
| ap_s, ap_m, ap_l | the same for true cells below 32^2, from 32^2 to 96^2, above 96^2 px; None without any | pooled |
| f1 | 2 TP / (2 TP + FP + FN) of one-to-one pairs with IoU >= 0.5 | pooled |
| pq | panoptic quality: sum of the IoU of those pairs / (TP + FP / 2 + FN / 2) | pooled |
| aji | aggregated Jaccard index, see `aji_of` | mean |
| dice, iou | of the union of all cells, foreground against background | mean |
| count_error | abs(n_pred - n_gt) / max(n_gt, 1) | mean |

Empty images: without true and without predicted cells an image is perfect (1); with only one of the two it is 0. The
same holds for a whole set without a true cell. An empty image with predictions adds false positives to what is pooled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array, Int64Array, areas, intersections, iou_matrix, iou_of, match
from loop.types import BoolArray, FloatArray, Instances

MAX_DETECTIONS = 1000
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREA_RANGES = {"small": [0, 32**2], "medium": [32**2, 96**2], "large": [96**2, 1e5**2]}

Pair = tuple[Instances, Instances]


class _OneImage(NamedTuple):
    """What each image adds to the figures; `ranked_iou` is (P, G) of the best-scored cells, best first."""

    gt_areas: Int64Array
    pred_areas: Int64Array
    scores: FloatArray
    ranked_iou: Float64Array
    true_positives: int
    iou_of_pairs: float
    aji: float
    dice: float
    iou: float
    count_error: float


def evaluate(pairs: Sequence[Pair], *, modalities: Sequence[str] | None = None) -> dict[str, Any]:
    """Every metric of a set of images, whole and per modality; the module's text defines each.

    Args:
        pairs: (predicted, true) cells, one pair an image. Scores rank the predicted cells of all images together.
        modalities: one name an image; an empty name counts as "unknown". Without it `per` is empty.

    Returns:
        ap, ap50, ap75, ap_s, ap_m, ap_l, f1, pq, aji, dice, iou, count_error (float, or None for an area range without
        true cells), n_images, n_gt, n_pred (int), per ({modality: the same keys}), macro_ap (mean of `ap` over the
        modalities; `ap` itself without them). No value is NaN.

    Raises:
        InputError: no images.
        ShapeError: not one modality for each image, or a pair's cells lie in images of different sizes.
        NonFiniteError: a predicted score is NaN or infinite.
    """
    if not pairs:
        raise InputError("no images to evaluate; give at least one pair of predicted and true cells")
    if modalities is not None and len(modalities) != len(pairs):
        raise ShapeError(f"{len(modalities)} modalities for {len(pairs)} images; give one for each")
    images = [_measure(pred, gt) for pred, gt in pairs]
    whole = _summary(images)
    names = [name or "unknown" for name in modalities or ()]
    per = {
        name: _summary([image for image, other in zip(images, names, strict=True) if other == name])
        for name in sorted(set(names))
    }
    macro = float(np.mean([part["ap"] for part in per.values()])) if per else whole["ap"]
    return {**whole, "per": per, "macro_ap": macro}


def image_ap(pred: Instances, gt: Instances) -> float:
    """COCO mask AP .50:.95 of one image, its 1,000 best-scored cells: what a paired comparison of models needs.

    Returns:
        In [0, 1]; 1 where both are empty, 0 where only one is. Equal to COCO's own evaluation of a set of this one
        image. The AP of a set is not the mean of its images' APs.

    Raises:
        ShapeError: the two belong to images of different sizes.
        NonFiniteError: a predicted score is NaN or infinite.

    Source: pycocotools cocoeval.py, evaluateImg and accumulate. Differs: cells that have only one partner to choose
    from are paired all at once.
    """
    best = _best_first(pred)
    if len(pred) > 0 and len(gt) > 0:
        return _average_precision(_true_positives(iou_matrix(pred.take(best), gt)), len(gt))
    if pred.shape != gt.shape:
        raise ShapeError(f"predicted cells lie in {pred.shape}, the true ones in {gt.shape} (H, W); compare one image")
    return 1.0 if len(pred) == len(gt) else 0.0


def aji_of(inter: Int64Array, pred_areas: Int64Array, gt_areas: Int64Array) -> float:
    """Aggregated Jaccard index of one image, in [0, 1]; 1 where both are empty, 0 where only one is.

    Each true cell takes the predicted cell of highest IoU with it (one may be taken twice); the shared pixels of these
    pairs over their unions, to which true cells without any overlap and predicted cells never taken add their areas.

    Args:
        inter: (P, G) shared pixels.
        pred_areas: (P,) px.
        gt_areas: (G,) px.

    Source: Kumar et al., IEEE TMI 36 (2017), algorithm 1.
    """
    if len(pred_areas) == 0 or len(gt_areas) == 0:
        return 1.0 if len(pred_areas) == len(gt_areas) else 0.0
    best = iou_of(inter, pred_areas, gt_areas).argmax(axis=0)
    shared = inter[best, np.arange(len(gt_areas))]
    touched = shared > 0
    union = gt_areas.sum() + (pred_areas[best] - shared)[touched].sum()
    unused = np.setdiff1d(np.arange(len(pred_areas)), best[touched])
    return float(shared.sum() / max(union + pred_areas[unused].sum(), 1))


def _measure(pred: Instances, gt: Instances) -> _OneImage:
    ranked = _best_first(pred)
    inter, pred_areas, gt_areas = intersections(pred, gt), areas(pred), areas(gt)
    iou = iou_of(inter, pred_areas, gt_areas)
    rows, cols = match(iou, 0.5).T
    n_pred, n_gt = len(pred), len(gt)
    guessed, true = _foreground(pred), _foreground(gt)
    both, either = int(np.count_nonzero(guessed & true)), int(np.count_nonzero(guessed | true))
    return _OneImage(
        gt_areas=gt_areas,
        pred_areas=pred_areas,
        scores=pred.scores,
        ranked_iou=iou[ranked],
        true_positives=len(rows),
        iou_of_pairs=float(iou[rows, cols].sum()),
        aji=aji_of(inter, pred_areas, gt_areas),
        dice=2 * both / (both + either) if either else 1.0,
        iou=both / either if either else 1.0,
        count_error=abs(n_pred - n_gt) / max(n_gt, 1),
    )


def _summary(images: Sequence[_OneImage]) -> dict[str, Any]:
    """The values of the 15 keys for some of the images, at least one."""
    n_gt, n_pred = (sum(len(part) for part in parts) for parts in zip(*(image[:2] for image in images), strict=True))
    half = (n_gt + n_pred) / 2
    return {
        **_coco_ap(images),
        "f1": sum(image.true_positives for image in images) / half if half else 1.0,
        "pq": sum(image.iou_of_pairs for image in images) / half if half else 1.0,
        "aji": float(np.mean([image.aji for image in images])),
        "dice": float(np.mean([image.dice for image in images])),
        "iou": float(np.mean([image.iou for image in images])),
        "count_error": float(np.mean([image.count_error for image in images])),
        "n_images": len(images),
        "n_gt": n_gt,
        "n_pred": n_pred,
    }


def _foreground(instances: Instances) -> BoolArray:
    canvas = np.zeros(instances.shape, dtype=np.bool_)
    for (x0, y0, x1, y1), mask in zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True):
        canvas[y0:y1, x0:x1] |= mask
    return canvas


def _best_first(pred: Instances) -> Int64Array:
    """Indices of the best-scored cells, best first, equal ones in their order; at most MAX_DETECTIONS."""
    if not np.isfinite(pred.scores).all():
        raise NonFiniteError(f"a predicted cell of image {pred.image_id!r} has a score that is no number")
    return np.argsort(-pred.scores, kind="stable")[:MAX_DETECTIONS]


def _coco_ap(images: Sequence[_OneImage]) -> dict[str, float | None]:
    """The six COCO figures; an area range has no value without true cells of that size.

    COCO's pairing and accumulation are faster-coco-eval's; the IoU it would compute from run lengths is already there.
    """
    keys = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
    if not any(len(image.gt_areas) for image in images):
        perfect = 0.0 if any(len(image.pred_areas) for image in images) else 1.0
        return {**dict.fromkeys(keys[:3], perfect), **dict.fromkeys(keys[3:])}
    truths = _coco([(image.gt_areas, np.ones(len(image.gt_areas), np.float32)) for image in images])
    guesses = _coco([(image.pred_areas, image.scores) for image in images])
    judge = COCOeval_faster(truths, guesses, "bbox", ranges=AREA_RANGES)
    judge.computeIoU = lambda image, category: images[image - 1].ranked_iou
    judge.params.maxDets = [MAX_DETECTIONS]
    judge.evaluate()
    judge.accumulate()
    precision = np.asarray(judge.eval["precision"])[:, :, 0, :, 0]  # threshold, recall, area range; -1 = undefined
    parts = (precision[:, :, 0], precision[0, :, 0], precision[5, :, 0], *(precision[:, :, a] for a in (1, 2, 3)))
    return {key: float(part.mean()) if (part > -1).all() else None for key, part in zip(keys, parts, strict=True)}


def _coco(images: Sequence[tuple[Int64Array, FloatArray]]) -> COCO:
    """COCO's form of the areas and scores of each image's cells; image and cell ids count from 1."""
    cells = [
        {"image_id": image, "category_id": 1, "iscrowd": 0, "area": area, "score": score}
        for image, (sizes, scores) in enumerate(images, start=1)
        for area, score in zip(sizes.tolist(), scores.tolist(), strict=True)
    ]
    return COCO(
        {
            "images": [{"id": image} for image in range(1, len(images) + 1)],
            "annotations": [{**cell, "id": number} for number, cell in enumerate(cells, start=1)],
            "categories": [{"id": 1, "name": "cell"}],
        }
    )


def _true_positives(iou: Float64Array) -> BoolArray:
    """COCO's greedy pairing at each threshold.

    Args:
        iou: (P, G), best score first.

    Returns:
        (10, P) bool: whether the cell found a true one that no better-scored cell had taken, the nearest one free (the
        last of equals).
    """
    floors = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    rows, cols = np.nonzero(iou >= floors[0])
    found = np.zeros((len(floors), len(iou)), dtype=np.bool_)
    alone = (np.bincount(rows, minlength=1)[rows] == 1) & (np.bincount(cols, minlength=1)[cols] == 1)
    found[:, rows[alone]] = iou[rows[alone], cols[alone]] >= floors
    taken = np.zeros((len(floors), iou.shape[1]), dtype=np.bool_)
    for row in np.unique(rows[~alone]):
        near = np.flatnonzero(iou[row] >= floors[0])[::-1]
        free = (iou[row, near] >= floors) & ~taken[:, near]
        hit = free.any(axis=1)
        best = near[np.where(free, iou[row, near], -1).argmax(axis=1)]
        found[:, row] = hit
        taken[hit, best[hit]] = True
    return found


def _average_precision(found: BoolArray, n_gt: int) -> float:
    """Mean over thresholds of the precision at COCO's 101 recalls, best score first."""
    hits = np.cumsum(found, axis=1)
    precision = hits / np.arange(1, found.shape[1] + 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(envelope, [(0, 0), (0, 1)])
    places = [np.searchsorted(recall, RECALLS, side="left") for recall in hits / n_gt]
    return float(np.mean([row[place] for row, place in zip(padded, places, strict=True)]))
