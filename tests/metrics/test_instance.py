import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.masks import from_label_image, from_masks, to_dense
from loop.metrics.instance import aji_of, evaluate, image_ap
from loop.metrics.matching import areas, intersections
from loop.types import Instances

KEYS = ["ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "f1", "pq", "aji", "dice", "iou", "count_error"]
KEYS += ["n_images", "n_gt", "n_pred"]


def _box(y0, x0, y1, x1, shape=(40, 40)):
    mask = np.zeros(shape, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def _scene(rng, n, shape, sizes, spurious=0.2):
    """Rectangles as truth and moved, missed, doubled and invented ones as prediction, overlapping as it happens."""
    truth, guess, scores = [], [], []
    for _ in range(n):
        y, x = rng.integers(0, shape[0] - 4), rng.integers(0, shape[1] - 4)
        h, w = rng.integers(*sizes, size=2)
        truth.append(_box(y, x, y + h, x + w, shape))
        for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
            dy, dx, dh, dw = rng.integers(-2, 3, size=4)
            guess.append(_box(max(y + dy, 0), max(x + dx, 0), y + h + dh, x + w + dw, shape))
            scores.append(np.round(rng.random(), 2))  # ties
        if rng.random() < spurious:
            y, x = rng.integers(0, shape[0] - 4), rng.integers(0, shape[1] - 4)
            guess.append(_box(y, x, y + h, x + w, shape))
            scores.append(np.round(rng.random(), 2))
    return from_masks(guess, shape, scores=np.array(scores, np.float32)), from_masks(truth, shape)


def _pycocotools(pairs, max_detections=1000):
    """COCO's own code: dense masks in, the six figures out; -1 as None."""

    def cells(instances, image):
        for mask, score in zip(to_dense(instances), instances.scores.tolist(), strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            yield {
                "image_id": image,
                "category_id": 1,
                "iscrowd": 0,
                "segmentation": rle,
                "area": float(coco_mask.area(rle)),
                "bbox": coco_mask.toBbox(rle).tolist(),
                "score": score,
            }

    def collection(which):
        coco = COCO()
        annotations = [a for i, pair in enumerate(pairs, 1) for a in cells(pair[which], i)]
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": p[0].shape[0], "width": p[0].shape[1]} for i, p in enumerate(pairs, 1)],
            "categories": [{"id": 1}],
            "annotations": [{**a, "id": k} for k, a in enumerate(annotations, 1)],
        }
        coco.createIndex()
        return coco

    judge = COCOeval(collection(1), collection(0), "segm")
    judge.params.maxDets = [max_detections]
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][:, :, 0, :, 0]
    parts = [precision[..., 0], precision[0, :, 0], precision[5, :, 0], *(precision[..., a] for a in (1, 2, 3))]
    return [float(part.mean()) if (part > -1).all() else None for part in parts]


@pytest.mark.parametrize("seed", range(3))
def test_ap_is_pycocotools_on_crowded_images_of_all_sizes(seed):
    rng = np.random.default_rng(seed)
    pairs = [_scene(rng, 120, (180, 220), (4, 12)) for _ in range(2)]
    pairs += [_scene(rng, 9, (300, 260), (20, 130)), _scene(rng, 3, (64, 64), (6, 20))]
    pairs += [(pairs[3][0], Instances.build((64, 64))), (Instances.build((64, 64)), pairs[3][1])]
    pairs += [(Instances.build((64, 64)), Instances.build((64, 64)))]
    assert max(len(pred) for pred, _ in pairs) > 130
    got = evaluate(pairs)
    expected = _pycocotools(pairs)
    assert [got[key] for key in KEYS[:6]] == pytest.approx(expected, abs=1e-12)
    assert 0.05 < got["ap"] < 0.95
    assert _pycocotools(pairs, 100)[0] != pytest.approx(got["ap"], abs=1e-3)  # COCO's usual 100 would cut


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_image_ap_is_pycocotools_of_one_image(seed, n):
    pred, gt = _scene(np.random.default_rng(seed), n, (48, 56), (3, 14))
    assert image_ap(pred, gt) == pytest.approx(_pycocotools([(pred, gt)])[0], abs=1e-12)
    assert evaluate([(pred, gt)])["ap"] == pytest.approx(image_ap(pred, gt), abs=1e-12)


def test_only_the_thousand_best_scored_cells_of_an_image_count():
    gt = from_masks([_box(0, 0, 5, 5), _box(10, 10, 15, 15)], (40, 40))
    noise = [_box(30, 30, 31, 31)] * 999
    pred = from_masks([*noise, *to_dense(gt)], (40, 40), scores=np.r_[np.ones(999), 0.6, 0.5].astype(np.float32))
    # The first hit is at place 1000 (precision 1/1000), the second at 1001 is cut: 51 of 101 recalls have 1/1000.
    assert image_ap(pred, gt) == pytest.approx(51 / 101 / 1000)
    assert evaluate([(pred, gt)])["ap"] == pytest.approx(51 / 101 / 1000)


def test_perfect_masks_in_any_order_score_one():
    rng = np.random.default_rng(0)
    labels = np.zeros((150, 150), np.int32)
    labels[3:13, 3:13], labels[20:60, 20:60], labels[60:149, 40:148] = 1, 2, 3
    gt = from_label_image(labels)
    pred = gt.take(rng.permutation(3))
    got = evaluate([(pred, gt)])
    assert {got[key] for key in KEYS[:11]} == {1.0}
    assert got["count_error"] == 0
    assert (got["n_images"], got["n_gt"], got["n_pred"]) == (1, 3, 3)
    assert image_ap(pred, gt) == 1


def test_figures_by_hand():
    # True: two 10 x 10 cells. Predicted: the first moved by 2 (shared 80, union 120, IoU 2/3), and one nowhere near.
    gt = from_masks([_box(0, 0, 10, 10), _box(20, 20, 30, 30)], (40, 40))
    pred = from_masks([_box(0, 2, 10, 12), _box(0, 30, 5, 40)], (40, 40), scores=[0.9, 0.8])
    got = evaluate([(pred, gt)])
    assert got["f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert got["pq"] == pytest.approx((2 / 3) / (1 + 0.5 + 0.5))
    assert got["aji"] == pytest.approx(80 / (120 + 100 + 50))
    assert got["dice"] == pytest.approx(2 * 80 / (200 + 150))
    assert got["iou"] == pytest.approx(80 / 270)
    # IoU 2/3 passes .50 .55 .60 .65; there precision 1 up to recall 1/2, which is 51 of the 101 recalls.
    assert got["ap50"] == pytest.approx(51 / 101)
    assert got["ap"] == pytest.approx(0.4 * 51 / 101)
    assert got["ap75"] == 0
    assert (got["ap_s"], got["ap_m"], got["ap_l"]) == (pytest.approx(got["ap"]), None, None)
    assert got["count_error"] == 0


def test_what_is_pooled_and_what_is_averaged():
    gt = from_masks([_box(0, 0, 10, 10), _box(20, 20, 30, 30)], (40, 40))
    none = Instances.build((40, 40))
    pairs = [(gt, gt), (none, gt.take([0])), (gt, none)]
    got = evaluate(pairs)
    assert got["f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert got["pq"] == pytest.approx(2 / 3.5)
    assert got["aji"] == got["dice"] == got["iou"] == pytest.approx(1 / 3)
    assert got["count_error"] == pytest.approx((0 + 1 + 2) / 3)
    assert (got["n_images"], got["n_gt"], got["n_pred"]) == (3, 3, 4)


def test_the_empty_image_is_perfect_when_left_empty_and_nothing_otherwise():
    none, one = Instances.build((40, 40)), from_masks([_box(0, 0, 10, 10)], (40, 40))
    for pred, gt, value in ((none, none, 1.0), (one, none, 0.0), (none, one, 0.0)):
        got = evaluate([(pred, gt)])
        assert [got[k] for k in ("ap", "ap50", "ap75", "f1", "pq", "aji", "dice", "iou")] == [value] * 8
        assert image_ap(pred, gt) == value
        assert got["ap_m"] is got["ap_l"] is None
        assert got["ap_s"] == (0.0 if gt is one else None)
    assert evaluate([(none, none)])["count_error"] == 0
    assert evaluate([(one, none)])["count_error"] == 1


def test_disjoint_cells_score_nothing():
    gt, pred = from_masks([_box(0, 0, 10, 10)], (40, 40)), from_masks([_box(20, 20, 30, 30)], (40, 40))
    got = evaluate([(pred, gt)])
    assert {got[k] for k in ("ap", "ap50", "ap75", "ap_s", "f1", "pq", "aji", "dice", "iou")} == {0.0}
    assert image_ap(pred, gt) == 0


def test_per_modality_and_their_mean():
    rng = np.random.default_rng(5)
    pairs = [_scene(rng, 8, (60, 60), (5, 20)) for _ in range(5)]
    names = ["dark", "bright", "dark", "", "bright"]
    got = evaluate(pairs, modalities=names)
    assert list(got) == [*KEYS, "per", "macro_ap"]
    assert sorted(got["per"]) == ["bright", "dark", "unknown"]
    for name, indices in (("dark", (0, 2)), ("bright", (1, 4)), ("unknown", (3,))):
        alone = evaluate([pairs[i] for i in indices])
        assert list(got["per"][name]) == KEYS
        assert got["per"][name] == {key: alone[key] for key in KEYS}
    assert got["macro_ap"] == pytest.approx(np.mean([part["ap"] for part in got["per"].values()]))
    plain = evaluate(pairs)
    assert plain["per"] == {}
    assert plain["macro_ap"] == plain["ap"] == got["ap"]
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def _aji_by_hand(pred, gt):
    """Kumar's algorithm 1 with sets of pixels."""
    predicted = [{tuple(p) for p in np.argwhere(mask)} for mask in to_dense(pred)]
    true = [{tuple(p) for p in np.argwhere(mask)} for mask in to_dense(gt)]
    shared = union = 0
    used = set()
    for cell in true:
        scores = [len(cell & other) / len(cell | other) for other in predicted]
        j = int(np.argmax(scores))
        if scores[j] == 0:
            union += len(cell)
            continue
        shared += len(cell & predicted[j])
        union += len(cell | predicted[j])
        used.add(j)
    return shared / (union + sum(len(other) for j, other in enumerate(predicted) if j not in used))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_aji_follows_the_published_algorithm(seed, n):
    pred, gt = _scene(np.random.default_rng(seed), n, (30, 30), (3, 12))
    if len(pred) == 0:
        return
    got = aji_of(intersections(pred, gt), areas(pred), areas(gt))
    assert got == pytest.approx(_aji_by_hand(pred, gt))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_order_of_the_true_cells_does_not_matter_and_ranges_hold(seed, n):
    rng = np.random.default_rng(seed)
    pred, gt = _scene(rng, n, (30, 30), (3, 12))
    got, other = evaluate([(pred, gt)]), evaluate([(pred, gt.take(rng.permutation(len(gt))))])
    for key in ("f1", "pq", "dice", "iou", "count_error"):
        assert got[key] == pytest.approx(other[key])
    for key in KEYS[:11]:
        assert got[key] is None or 0 <= got[key] <= 1


def test_refusals():
    gt = from_masks([_box(0, 0, 10, 10)], (40, 40), image_id="well")
    with pytest.raises(InputError, match="no images"):
        evaluate([])
    with pytest.raises(ShapeError, match="2 modalities for 1 images"):
        evaluate([(gt, gt)], modalities=["a", "b"])
    with pytest.raises(ShapeError, match="same image"):
        evaluate([(Instances.build((8, 8)), gt)])
    with pytest.raises(ShapeError, match="compare one image"):
        image_ap(Instances.build((8, 8)), gt)
    broken = from_masks([_box(0, 0, 10, 10)], (40, 40), scores=[np.nan], image_id="well")
    for measure in (lambda: evaluate([(broken, gt)]), lambda: image_ap(broken, gt)):
        with pytest.raises(NonFiniteError, match="'well'"):
            measure()
