from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.errors import InputError, ShapeError
from loop.masks import from_masks, to_dense
from loop.metrics.matching import areas, best_pairs, intersections, iou_matrix, match
from loop.types import Instances

SHAPE = (24, 32)


def drawn(seed, n, shape=SHAPE):
    """n random rectangles and noise blobs, overlapping as it happens."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(n):
        y, x = rng.integers(0, shape[0] - 1), rng.integers(0, shape[1] - 1)
        mask = np.zeros(shape, bool)
        part = mask[y : y + rng.integers(1, 12), x : x + rng.integers(1, 12)]
        part[...] = rng.random(part.shape) < 0.8
        part[0, 0] = True
        masks.append(mask)
    return from_masks(masks, shape, scores=rng.random(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 6))
def test_iou_agrees_with_dense_masks(seed, p, g):
    pred, gt = drawn(seed, p), drawn(seed + 1, g)
    a, b = (to_dense(cells).reshape(len(cells), SHAPE[0] * SHAPE[1]).astype(int) for cells in (pred, gt))
    inter = a @ b.T
    np.testing.assert_array_equal(intersections(pred, gt), inter)
    np.testing.assert_array_equal(areas(pred), a.sum(1))
    union = a.sum(1)[:, None] + b.sum(1)[None] - inter
    iou = iou_matrix(pred, gt)
    assert iou.shape == (p, g)
    assert iou.dtype == np.float64
    np.testing.assert_allclose(iou, inter / union, rtol=1e-15)


def test_boxes_need_not_be_tight_and_an_empty_mask_has_no_iou():
    loose = np.zeros((6, 6), bool)
    loose[2:4, 2:4] = True
    pred = Instances.build((10, 10), [(0, 0, 6, 6), (0, 0, 3, 3)], [loose, np.zeros((3, 3), bool)])
    gt = Instances.build((10, 10), [(2, 2, 4, 4), (5, 5, 6, 6)], [np.ones((2, 2), bool), np.zeros((1, 1), bool)])
    np.testing.assert_array_equal(iou_matrix(pred, gt), [[1, 0], [0, 0]])


def test_cells_of_different_images_are_refused():
    with pytest.raises(ShapeError, match=r"\(24, 32\).*\(8, 8\)"):
        intersections(drawn(0, 1), Instances.build((8, 8)))


def brute(iou, threshold):
    """(number of pairs, sum of IoU) of the best one-to-one pairing, by trying all."""
    big, small = (iou, iou.shape[1]) if iou.shape[0] >= iou.shape[1] else (iou.T, iou.shape[0])
    best = (0, 0.0)
    for rows in permutations(range(big.shape[0]), small):
        values = [big[r, c] for c, r in enumerate(rows) if big[r, c] >= threshold]
        best = max(best, (len(values), sum(values)))
    return best


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.7]))
def test_match_is_the_best_of_all_pairings(seed, p, g, threshold):
    rng = np.random.default_rng(seed)
    iou = rng.random((p, g)) * (rng.random((p, g)) < 0.7)
    pairs = match(iou, threshold)
    assert pairs.shape == (len(pairs), 2)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert list(pairs[:, 0]) == sorted(pairs[:, 0])
    values = iou[pairs[:, 0], pairs[:, 1]]
    assert (values >= threshold).all()
    count, total = brute(iou, threshold)
    assert len(pairs) == count
    assert values.sum() == pytest.approx(total)


def test_many_pairs_beat_one_good_pair():
    # Greedy pairing would take 0.9 first and leave row 1 alone.
    np.testing.assert_array_equal(match(np.array([[0.9, 0.6], [0.7, 0.0]]), 0.5), [[0, 1], [1, 0]])


def test_a_threshold_is_reached_at_equality_and_must_be_an_iou():
    assert match(np.array([[0.5]]), 0.5).tolist() == [[0, 0]]
    assert match(np.array([[0.5]]), 0.500001).shape == (0, 2)
    for wrong in (0, 1.1):
        with pytest.raises(InputError, match="matching threshold"):
            match(np.zeros((1, 1)), wrong)


def test_the_best_pair_is_kept_where_matching_would_give_it_up_for_two():
    iou = np.array([[0.9, 0.3], [0.3, 0.0]])
    np.testing.assert_array_equal(best_pairs(iou), [[0, 0]])
    np.testing.assert_array_equal(match(iou, 0.2), [[0, 1], [1, 0]])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 6))
def test_best_pairs_agree_with_taking_the_highest_again_and_again(seed, p, g):
    rng = np.random.default_rng(seed)
    iou = np.round(rng.random((p, g)), 1) * (rng.random((p, g)) < 0.6)
    left, expected = iou.copy(), []
    while left.size and left.max() > 0:
        row, col = np.unravel_index(left.argmax(), left.shape)
        expected.append([int(row), int(col)])
        left[row] = left[:, col] = 0
    np.testing.assert_array_equal(best_pairs(iou), np.reshape(sorted(expected), (-1, 2)))
