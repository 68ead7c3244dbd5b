import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from loop.config import InstanceConfig
from loop.errors import NonFiniteError, ShapeError
from loop.masks import to_dense
from loop.models.queries import confidences_of, instances_from_queries

CONFIG = InstanceConfig(min_area=4)


def disc(size, cx, cy, r):
    y, x = np.mgrid[:size, :size]
    return (x - cx) ** 2 + (y - cy) ** 2 <= r * r


def probs_of(*masks, high=0.9, low=0.05):
    return np.stack([np.where(mask, high, low) for mask in masks]).astype(np.float32)


def sure(n, value=0.8):
    return np.full(n, value, np.float32)


def test_overlapping_cells_stay_overlapping():
    left, right = disc(32, 12, 16, 8), disc(32, 20, 16, 8)
    found = instances_from_queries(probs_of(left, right), np.array([0.6, 0.9], np.float32), (32, 32), CONFIG)
    np.testing.assert_array_equal(to_dense(found), [right, left])
    assert found.scores.tolist() == pytest.approx([0.9 * 0.9, 0.6 * 0.9])


def test_score_is_confidence_times_mean_probability_in_the_mask():
    probs = np.zeros((1, 8, 8), np.float32)
    probs[0, 2:4, 2:6] = 0.6
    probs[0, 4:6, 2:6] = 1.0
    probs[0, 7, 7] = 0.4  # no part of the mask
    found = instances_from_queries(
        probs, sure(1, 0.5), (8, 8), CONFIG, image_id="a", source="pseudo", model_version="3"
    )
    assert found.scores.tolist() == pytest.approx([0.4])
    assert found.boxes_xyxy.tolist() == [[2, 2, 6, 6]]
    assert (found.image_id, found.source, found.model_version) == ("a", "pseudo", "3")


def test_of_two_queries_for_one_cell_the_better_stays():
    cell, nearly = disc(32, 16, 16, 8), disc(32, 17, 16, 8)
    found = instances_from_queries(probs_of(cell, nearly), np.array([0.5, 0.7], np.float32), (32, 32), CONFIG)
    np.testing.assert_array_equal(to_dense(found), [nearly])


def test_a_twin_of_a_dropped_twin_stays():
    """In a row of three, the first drops the second, which may then not drop the third."""
    row = [disc(64, x, 32, 12) for x in (26, 32, 38)]
    found = instances_from_queries(probs_of(*row), np.array([0.9, 0.8, 0.7], np.float32), (64, 64), CONFIG)
    np.testing.assert_array_equal(to_dense(found), [row[0], row[2]])


def test_the_largest_part_stays():
    probs = probs_of(disc(32, 8, 8, 5) | disc(32, 24, 24, 3))
    found = instances_from_queries(probs, sure(1), (32, 32), CONFIG)
    np.testing.assert_array_equal(to_dense(found)[0], disc(32, 8, 8, 5))


def test_small_and_unsure_cells_are_dropped():
    cells = [disc(32, 5, 5, 1), disc(32, 16, 16, 4), disc(32, 26, 26, 4)]
    confidences = np.array([0.9, 0.9, 0.25], np.float32)
    found = instances_from_queries(probs_of(*cells), confidences, (32, 32), InstanceConfig(min_area=6), floor=0.3)
    np.testing.assert_array_equal(to_dense(found), cells[1:2])
    more = instances_from_queries(probs_of(*cells), confidences, (32, 32), InstanceConfig(min_area=6), floor=0.2)
    assert len(more) == 2


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]), st.integers(0, 5), st.integers(0, 5))
def test_boxes_cut_before_enlarging_give_the_enlarged_whole(seed, stride, cut_y, cut_x):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(1, 9, 11)), (0, 1, 1)) * 3
    probs = (1 / (1 + np.exp(-smooth - 0.3))).astype(np.float32)
    shape = (9 * stride - min(cut_y, stride), 11 * stride - min(cut_x, stride))
    found = instances_from_queries(probs, sure(1), shape, InstanceConfig(min_area=1), floor=0.0, stride=stride)
    whole = torch.nn.functional.interpolate(torch.from_numpy(probs)[None], scale_factor=stride, mode="bilinear")[0, 0]
    inside = whole.numpy()[: shape[0], : shape[1]]
    parts, n = ndimage.label(inside > 0.5, np.ones((3, 3)))
    assert len(found) == min(n, 1)
    if n:
        mask = to_dense(found)[0]
        sizes = np.bincount(parts.ravel())[1:]
        assert abs(int(mask.sum()) - int(sizes.max())) <= (0 if stride == 1 else 1)  # 0.5 itself, to the last bit
        assert found.scores[0] == pytest.approx(0.8 * inside[mask].mean(), abs=1e-5)


def test_the_stride_is_read_off_the_frame():
    probs = probs_of(disc(16, 8, 8, 4))
    assert instances_from_queries(probs, sure(1), (62, 64), CONFIG).shape == (62, 64)
    padded = instances_from_queries(probs, sure(1), (20, 20), CONFIG, stride=2)
    assert padded.shape == (20, 20)
    assert padded.boxes_xyxy[0, 2:].tolist() == [20, 20]


def test_a_cell_in_the_padding_is_no_cell():
    assert len(instances_from_queries(probs_of(disc(16, 12, 12, 3)), sure(1), (16, 16), CONFIG, stride=2)) == 0


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_found(n):
    found = instances_from_queries(np.full((n, 8, 8), 0.1, np.float32), sure(n), (16, 16), CONFIG)
    assert len(found) == 0
    assert found.shape == (16, 16)


def test_one_cell_that_fills_the_frame():
    found = instances_from_queries(np.ones((1, 8, 8), np.float32), sure(1), (16, 16), CONFIG)
    assert to_dense(found).all()


def test_confidences_by_hand():
    classes = np.array([0.9, 0.4], np.float32)
    assert confidences_of(classes, None).tolist() == classes.tolist()
    assert confidences_of(classes, np.array([0.4, 0.9], np.float32)).tolist() == pytest.approx([0.6, 0.6])


def test_damaged_probabilities_name_the_image():
    probs = probs_of(disc(8, 4, 4, 2))
    with pytest.raises(NonFiniteError, match="1 probabilities of image 'slide7'"):
        instances_from_queries(probs, np.array([np.nan], np.float32), (8, 8), CONFIG, image_id="slide7")
    probs[0, 0, 0] = np.inf
    with pytest.raises(NonFiniteError, match="slide7"):
        instances_from_queries(probs, sure(1), (8, 8), CONFIG, image_id="slide7")


def test_shapes_that_do_not_fit():
    probs = probs_of(disc(8, 4, 4, 2))
    with pytest.raises(ShapeError, match=r"expected \(N, h, w\) and \(N,\)"):
        instances_from_queries(probs[0], sure(1), (8, 8), CONFIG)
    with pytest.raises(ShapeError, match=r"expected \(N, h, w\) and \(N,\)"):
        instances_from_queries(probs, sure(2), (8, 8), CONFIG)
    with pytest.raises(ShapeError, match="do not cover the frame"):
        instances_from_queries(probs, sure(1), (20, 16), CONFIG, stride=2)


def test_a_mask_wholly_in_the_padding_is_no_cell():
    probs = np.zeros((1, 32, 32), np.float32)
    probs[0, 0:4, 20:28] = 0.9
    assert len(instances_from_queries(probs, sure(1), (1, 1), CONFIG, stride=2)) == 0
    assert len(instances_from_queries(probs, sure(1), (64, 30), CONFIG, stride=2)) == 0
