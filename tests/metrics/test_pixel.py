import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score

from loop.errors import ShapeError
from loop.metrics.pixel import PixelCounts, pixel_counts, pixel_scores


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1))
def test_scores_of_pooled_pixels_agree_with_scikit_learn(seed, n, share, right):
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(1, 12, 2)) for _ in range(n)]
    true = [rng.random(shape) < share for shape in shapes]
    predicted = [np.where(rng.random(mask.shape) < right, mask, ~mask) for mask in true]
    scores = pixel_scores(map(pixel_counts, predicted, true))
    y, x = (np.concatenate([mask.ravel() for mask in masks]) for masks in (true, predicted))
    empty = 1.0 if not (x ^ y).any() else 0.0
    assert scores == pytest.approx(
        {
            "accuracy": accuracy_score(y, x),
            "precision": precision_score(y, x, zero_division=empty),
            "recall": recall_score(y, x, zero_division=empty),
            "f1": f1_score(y, x, zero_division=empty),
            "iou": jaccard_score(y, x, zero_division=empty),
        }
    )


def test_counts_by_hand():
    predicted = np.array([[1, 1, 0], [0, 0, 0]], bool)
    true = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert pixel_counts(predicted, true) == PixelCounts(1, 1, 2, 2)
    assert pixel_scores([PixelCounts(1, 1, 2, 2)]) == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1 / 3, "f1": 0.4, "iou": 0.25}
    )


def test_images_are_pooled_by_pixel_not_averaged():
    large, small = PixelCounts(90, 10, 0, 0), PixelCounts(0, 0, 1, 0)
    assert pixel_scores([large, small])["precision"] == pytest.approx(0.9)
    assert pixel_scores([large, small])["recall"] == pytest.approx(90 / 91)


@pytest.mark.parametrize(
    ("counts", "precision", "recall"),
    [
        ([], 1, 1),
        ([PixelCounts(0, 0, 0, 9)], 1, 1),
        ([PixelCounts(0, 3, 0, 6)], 0, 0),
        ([PixelCounts(0, 0, 3, 6)], 0, 0),
    ],
)
def test_without_pixels_on_one_side(counts, precision, recall):
    scores = pixel_scores(counts)
    assert (scores["precision"], scores["recall"]) == (precision, recall)
    assert scores["f1"] == scores["iou"] == min(precision, recall)


def test_an_image_without_pixels_counts_nothing():
    nothing = np.zeros((0, 5), bool)
    assert pixel_counts(nothing, nothing) == PixelCounts(0, 0, 0, 0)


def test_masks_of_two_images_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(3, 2\)"):
        pixel_counts(np.zeros((2, 3), bool), np.zeros((3, 2), bool))
