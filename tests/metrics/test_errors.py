import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.masks import from_masks, to_dense
from loop.metrics.errors import AP_KEYS, best_matched, error_analysis, error_counts, with_true_masks
from loop.metrics.instance import evaluate
from loop.metrics.matching import iou_matrix
from loop.types import Instances

SHAPE = (40, 60)
NONE = {"missed": 0, "invented": 0, "merged": 0, "split": 0}


def _cells(*boxes, scores=None):
    """Filled rectangles (y0, x0, y1, x1)."""
    masks = np.zeros((len(boxes), *SHAPE), bool)
    for mask, (y0, x0, y1, x1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return from_masks(list(masks), SHAPE, scores=scores)


def _counts(pred, gt, **expected):
    assert error_counts(_cells(*pred), _cells(*gt)) == {**NONE, **expected}


def test_masks_become_those_of_the_best_dice_and_keep_their_scores():
    gt = _cells((0, 0, 10, 10), (0, 12, 10, 22))
    # 60 px on the left cell and 40 on the right one; all of the right one; nothing at all
    pred = _cells((0, 4, 10, 16), (0, 12, 10, 23), (30, 30, 35, 35), scores=[0.9, 0.8, 0.7])
    got = with_true_masks(pred, gt)
    np.testing.assert_array_equal(to_dense(got)[:2], to_dense(gt))
    np.testing.assert_array_equal(to_dense(got)[2], to_dense(pred)[2])
    np.testing.assert_array_equal(got.scores, pred.scores)


def test_several_predictions_of_one_cell_all_get_its_mask_and_one_counts():
    gt = _cells((0, 0, 10, 10), (20, 20, 30, 30))
    pred = _cells((0, 0, 10, 6), (0, 4, 10, 10), (20, 20, 30, 29), scores=[0.9, 0.8, 0.7])
    got = with_true_masks(pred, gt)
    np.testing.assert_array_equal(got.boxes_xyxy, [[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    # precision at the two true positives: 1 (rank 1) and 2/3 (rank 3); 51 of COCO's 101 recalls lie at or below 1/2
    assert evaluate([(got, gt)])["ap"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_the_best_dice_is_not_the_largest_overlap():
    # on the large cell: 40 px shared, Dice 80 / 440; on the small one: 30 px shared, Dice 60 / 70
    gt = _cells((0, 0, 40, 10), (0, 10, 3, 20))
    pred = _cells((0, 0, 4, 10))
    assert with_true_masks(pred, gt).masks[0].shape == (40, 10)
    pred = from_masks([to_dense(pred)[0] | to_dense(gt)[1]], SHAPE)
    assert with_true_masks(pred, gt).masks[0].shape == (3, 10)


def test_best_matched_keeps_one_prediction_for_each_true_cell():
    gt = _cells((0, 0, 10, 10), (20, 20, 30, 30), (0, 40, 5, 45))
    pred = _cells((0, 0, 10, 7), (0, 0, 10, 9), (20, 20, 23, 30), (30, 50, 35, 55), scores=[0.9, 0.2, 0.3, 1.0])
    got = best_matched(pred, gt)
    np.testing.assert_allclose(got.scores, [0.2, 0.3])


def test_best_matched_goes_on_to_the_second_best_where_the_best_is_taken():
    # both predictions are best with the left cell; the right cell then takes the one that is left
    gt = _cells((0, 0, 10, 10), (0, 10, 10, 20))
    pred = _cells((0, 0, 10, 10), (0, 3, 10, 16), scores=[0.5, 0.6])
    np.testing.assert_allclose(best_matched(pred, gt).scores, [0.5, 0.6])
    pred = _cells((0, 0, 10, 10), (0, 3, 10, 10), scores=[0.5, 0.6])
    np.testing.assert_allclose(best_matched(pred, gt).scores, [0.5])


@pytest.mark.parametrize("boxes", [(), ((0, 0, 5, 5),)])
def test_without_true_or_predicted_cells(boxes):
    none, some = _cells(), _cells(*boxes)
    assert len(with_true_masks(some, none)) == len(some)
    assert len(best_matched(some, none)) == 0
    assert len(with_true_masks(none, some)) == len(best_matched(none, some)) == 0
    assert error_counts(some, none) == {**NONE, "invented": len(some)}
    assert error_counts(none, some) == {**NONE, "missed": len(some)}


def test_perfect_cells_have_no_error():
    _counts([(0, 0, 10, 10), (5, 5, 20, 20)], [(0, 0, 10, 10), (5, 5, 20, 20)])


def test_missed_is_a_cell_without_a_tenth_of_it_under_a_prediction():
    _counts([], [(0, 0, 10, 10)], missed=1)
    _counts([(0, 9, 10, 15)], [(0, 0, 10, 10)])  # a tenth of the cell, a sixth of the prediction
    _counts([(0, 9, 9, 15)], [(0, 0, 10, 10)], missed=1)  # 9 px of 100 are less


def test_a_neighbour_that_leaks_over_a_missed_cell_does_not_find_it():
    _counts([(0, 0, 10, 13)], [(0, 0, 10, 10), (0, 10, 10, 20)], missed=1)  # 30 % of the right cell, found left cell


def test_invented_is_a_prediction_without_a_tenth_of_it_on_a_cell():
    _counts([(0, 0, 10, 10), (20, 20, 25, 25)], [(0, 0, 10, 10)], invented=1)
    _counts([(0, 0, 10, 10), (0, 9, 10, 19)], [(0, 0, 10, 10)])  # 10 of its 100 px on the cell
    _counts([(0, 0, 10, 10), (0, 9, 10, 20)], [(0, 0, 10, 10)], invented=1)


def test_a_second_prediction_of_a_found_cell_is_no_error_of_the_four():
    _counts([(0, 0, 10, 10), (0, 0, 9, 10)], [(0, 0, 10, 10)])


def test_merged_is_one_prediction_over_two_cells():
    _counts([(0, 0, 10, 20)], [(0, 0, 10, 9), (0, 11, 10, 20)], merged=1)
    _counts([(0, 0, 10, 16)], [(0, 0, 10, 10), (0, 12, 10, 20)], merged=1)  # finds the left one and half the right one
    _counts([(0, 0, 10, 15)], [(0, 0, 10, 10), (0, 12, 10, 20)], missed=1)  # only 3/8 of the right one, as a neighbour


def test_a_small_cell_on_a_large_one_both_found_is_no_merger():
    _counts([(0, 0, 20, 20), (5, 5, 10, 10)], [(0, 0, 20, 20), (5, 5, 10, 10)])
    _counts([(0, 0, 20, 20)], [(0, 0, 20, 20), (5, 5, 10, 10)], merged=1)


def test_split_is_a_cell_in_pieces():
    _counts([(0, 0, 10, 7), (0, 7, 10, 14), (0, 14, 10, 20)], [(0, 0, 10, 20)], split=1)
    _counts([(0, 0, 10, 12), (0, 12, 10, 20)], [(0, 0, 10, 20)])  # 60 % in one piece: found
    _counts([(0, 0, 10, 8)], [(0, 0, 10, 20)])  # one piece alone: badly outlined
    many = [(0, x, 10, x + 1) for x in range(0, 20, 2)]  # each piece covers only a twentieth
    _counts(many, [(0, 0, 10, 20)], split=1)


def test_found_cells_on_a_large_one_are_not_its_pieces():
    small = [(0, 0, 5, 5), (10, 10, 15, 15)]
    _counts(small, [(0, 0, 20, 20), *small], missed=1)


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 6), st.integers(0, 6))
def test_what_always_holds(seed, n_pred, n_gt):
    rng = np.random.default_rng(seed)

    def some(n):
        y, x = rng.integers(0, 30, n), rng.integers(0, 50, n)
        h, w = rng.integers(1, 20, (2, n))
        return _cells(*zip(y, x, y + h, x + w, strict=True), scores=rng.random(n, np.float32))

    pred, gt = some(n_pred), some(n_gt)
    counts = error_counts(pred, gt)
    assert counts["missed"] + counts["split"] <= len(gt)
    assert counts["invented"] + counts["merged"] <= len(pred)
    assert len(best_matched(pred, gt)) <= min(len(pred), len(gt))
    close = [iou for iou in iou_matrix(pred, gt).ravel().tolist() if iou >= 0.5]
    if len(set(close)) == len(close):  # between equal pairs the order may decide
        order_p, order_g = rng.permutation(n_pred), rng.permutation(n_gt)
        assert error_counts(pred.take(order_p), gt.take(order_g)) == counts
    again = with_true_masks(with_true_masks(gt, gt), gt)
    np.testing.assert_array_equal(to_dense(again), to_dense(gt))
    if n_gt:
        assert error_counts(gt, gt) == NONE


def test_analysis_of_two_images_by_hand():
    gt = _cells((0, 0, 10, 10), (20, 20, 30, 30))
    poor = _cells(
        (0, 0, 10, 7), (20, 20, 30, 27), (0, 50, 5, 55), scores=[0.5, 0.4, 0.9]
    )  # IoU 0.7, and an invented one
    result = error_analysis([(poor, gt), (_cells(), _cells((0, 0, 10, 10)))])
    assert set(result) == {"as_predicted", "with_true_masks", "best_matched", *NONE}
    assert {name: result[name] for name in NONE} == {**NONE, "missed": 1, "invented": 1}
    assert all(tuple(result[name]) == AP_KEYS for name in ("as_predicted", "with_true_masks", "best_matched"))
    # two of three true cells found (recall 2/3: 67 of 101 recalls), the invented one ranked first: precision 2/3
    assert result["as_predicted"]["ap50"] == pytest.approx(67 / 101 * 2 / 3)
    assert result["as_predicted"]["ap"] == pytest.approx(67 / 101 * 2 / 3 * 5 / 10)  # IoU 0.72 passes 5 thresholds
    assert result["as_predicted"]["ap75"] == 0
    assert result["with_true_masks"]["ap"] == pytest.approx(67 / 101 * 2 / 3)
    assert result["best_matched"]["ap50"] == pytest.approx(67 / 101)
    assert result["best_matched"]["ap"] == pytest.approx(67 / 101 * 5 / 10)
    assert result["as_predicted"]["ap_l"] is None


def test_refusals():
    other = from_masks([], (5, 5))
    for function in (with_true_masks, best_matched, error_counts):
        with pytest.raises(ShapeError, match="same image"):
            function(_cells(), other)
    with pytest.raises(InputError, match="no images"):
        error_analysis([])
    bad = Instances.build(SHAPE, [(0, 0, 1, 1)], [np.ones((1, 1), bool)], scores=[np.nan])
    with pytest.raises(NonFiniteError, match="score"):
        error_analysis([(bad, _cells())])
