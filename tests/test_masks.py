import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco
from scipy import ndimage

from loop import masks
from loop.errors import LabelError, OverlapError, ShapeError
from loop.types import Instances

EIGHT = np.ones((3, 3), int)
unhurried = settings(max_examples=60, deadline=None)


@st.composite
def noise_masks(draw, side=16):
    """Any mask at all: empty, full, specks, holes, on every border."""
    shape = draw(st.tuples(st.integers(1, side), st.integers(1, side)))
    return draw(hnp.arrays(bool, shape))


@st.composite
def blob_images(draw, side=48):
    """(H, W) label images of smooth cells, touching each other and the border."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(12, side)), draw(st.integers(12, side)))
    n = draw(st.integers(0, 5))
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.int32)
    for value in range(1, n + 1):
        cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        ry, rx = rng.uniform(2, 14, 2)
        labels[((rows - cy) / ry) ** 2 + ((columns - cx) / rx) ** 2 <= rng.uniform(0.7, 1.3, shape)] = value
    return labels


def union_iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def ring_contents(mask):
    """What an exact outer ring can hold: each 8-connected part with its holes filled (scipy's answer)."""
    parts, n = ndimage.label(mask, EIGHT)
    return [ndimage.binary_fill_holes(parts == i + 1) for i in range(n)]


@given(hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=14), elements=st.integers(0, 6)))
@unhurried
def test_label_image_round_trip_renumbers_only(labels):
    cells = masks.from_label_image(labels)
    values = [v for v in np.unique(labels) if v]
    assert len(cells) == len(values)
    expected = np.zeros_like(labels)
    for i, value in enumerate(values):
        expected[labels == value] = i + 1
    back = masks.to_label_image(cells)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, expected)


def test_label_values_far_apart_keep_their_order():
    labels = np.zeros((5, 6), np.int64)
    labels[0, 0], labels[2:4, 3:5], labels[4, 5] = 7, 2_000_000_000, 70_000
    cells = masks.from_label_image(labels, scores=[0.1, 0.2, 0.3], image_id="a", source="model", model_version="v")
    assert cells.boxes_xyxy.tolist() == [[0, 0, 1, 1], [5, 4, 6, 5], [3, 2, 5, 4]]
    np.testing.assert_allclose(cells.scores, [0.1, 0.2, 0.3])
    assert (cells.image_id, cells.source, cells.model_version) == ("a", "model", "v")
    full = masks.from_label_image(np.full((2, 2), 70_000))
    assert full.masks[0].all()


def test_a_value_in_two_parts_stays_one_cell():
    cells = masks.from_label_image(np.array([[1, 0, 1]], np.uint16))
    assert len(cells) == 1
    assert cells.masks[0].tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (np.zeros((2, 2, 3), np.uint8), ShapeError, r"expected \(H, W\)"),
        (np.zeros((2, 2)), LabelError, "float64; expected integers"),
        (np.full((2, 2), -1), LabelError, "holds -1"),
    ],
)
def test_what_is_no_label_image_is_refused(labels, error, says):
    with pytest.raises(error, match=says):
        masks.from_label_image(labels, image_id="a")


@given(hnp.arrays(bool, st.tuples(st.integers(0, 4), st.just(7), st.just(5))))
@unhurried
def test_masks_round_trip_with_overlaps_and_without_the_empty_ones(stack):
    cells = masks.from_masks(list(stack), (7, 5), scores=np.arange(len(stack)) / 10, labels=list(range(len(stack))))
    kept = [i for i, mask in enumerate(stack) if mask.any()]
    np.testing.assert_array_equal(masks.to_dense(cells), stack[kept])
    assert cells.labels.tolist() == kept
    np.testing.assert_allclose(cells.scores, np.array(kept) / 10, rtol=1e-6)


def test_masks_of_another_size_or_with_too_few_scores_are_refused():
    with pytest.raises(ShapeError, match="mask 0"):
        masks.from_masks([np.ones((3, 4), bool)], (4, 3))
    with pytest.raises(ShapeError, match="1 masks but 2 scores"):
        masks.from_masks([np.ones((3, 4), bool)], (3, 4), scores=[1, 1])


def overlapping():
    stack = np.zeros((3, 1, 6), bool)
    stack[0, 0, 0:3] = stack[1, 0, 2:5] = stack[2, 0, 5:6] = True
    return masks.from_masks(list(stack), (1, 6), scores=[0.9, 0.5, 0.7], image_id="plate1")


def test_overlap_is_refused_unless_a_rule_is_given():
    with pytest.raises(OverlapError, match="masks 0 and 1 of image 'plate1' share 1 px"):
        masks.to_label_image(overlapping())
    assert masks.to_label_image(overlapping(), on_overlap="score").tolist() == [[1, 1, 1, 2, 2, 3]]
    assert masks.to_label_image(overlapping(), on_overlap="order").tolist() == [[1, 1, 2, 2, 2, 3]]
    equal = masks.from_masks([np.ones((1, 2), bool)] * 2, (1, 2))
    assert masks.to_label_image(equal, on_overlap="score").tolist() == [[1, 1]]


def test_no_cells_in_every_format():
    none = Instances.build((3, 4))
    assert not masks.to_label_image(none).any()
    assert masks.to_dense(none).shape == (0, 3, 4)
    assert masks.to_coco_rle(none) == []
    assert masks.to_polygons(none, 0.5) == []
    assert len(masks.from_coco_rle([], (3, 4))) == len(masks.from_polygons([], (3, 4))) == 0
    assert len(masks.from_label_image(np.zeros((3, 4), np.uint8))) == 0


@given(noise_masks())
@unhurried
def test_coco_run_lengths_are_those_of_pycocotools(mask):
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": list(mask.shape), "counts": expected["counts"].decode()}
    cells = masks.from_masks([mask], mask.shape)
    assert masks.to_coco_rle(cells) == ([text] if mask.any() else [])
    back = masks.from_coco_rle([text], mask.shape)
    np.testing.assert_array_equal(masks.to_dense(back), masks.to_dense(cells))
    np.testing.assert_array_equal(back.boxes_xyxy, cells.boxes_xyxy)


def test_coco_run_lengths_of_a_large_image_keep_large_counts():
    labels = np.zeros((1500, 900), np.int32)
    labels[3:700, 5:300] = 1
    labels[1499, 899] = 2
    cells = masks.from_label_image(labels)
    rles = masks.to_coco_rle(cells)
    assert [int(coco.area(dict(rle))) for rle in rles] == [697 * 295, 1]
    np.testing.assert_array_equal(masks.to_label_image(masks.from_coco_rle(rles, labels.shape)), labels)


def test_coco_run_lengths_that_do_not_fit_are_refused():
    rle = masks.to_coco_rle(masks.from_label_image(np.eye(4, dtype=np.uint8)))[0]
    with pytest.raises(ShapeError, match=r"of size \[4, 4\]; the image is \[5, 4\]"):
        masks.from_coco_rle([rle], (5, 4))
    with pytest.raises(LabelError, match="run lengths 0 cover"):
        masks.from_coco_rle([{"size": [4, 4], "counts": rle["counts"][:-1]}], (4, 4))


@given(noise_masks())
@unhurried
def test_an_exact_ring_holds_exactly_the_largest_part_with_its_holes(mask):
    cells = masks.from_masks([mask], mask.shape)
    back = masks.to_dense(masks.from_polygons(masks.to_polygons(cells, 0.0), mask.shape))
    contents = ring_contents(mask)
    assert len(back) == len(cells)
    for ring in back:
        assert any((ring == part).all() for part in contents)
        assert ring.sum() == max(part.sum() for part in contents)


@given(blob_images(), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
@unhurried
def test_polygons_keep_every_whole_cell(labels, tolerance):
    parts = [ndimage.binary_fill_holes(ndimage.label(labels == v, EIGHT)[0] == 1) for v in np.unique(labels) if v]
    cells = masks.from_masks(parts, labels.shape)
    back = masks.from_polygons(masks.to_polygons(cells, tolerance), labels.shape)
    assert len(back) == len(cells)
    for before, after in zip(masks.to_dense(cells), masks.to_dense(back), strict=True):
        assert union_iou(before, after) >= 0.97


def test_a_ring_runs_along_the_pixels_edges_not_their_centres():
    labels = np.zeros((8, 10), np.uint8)
    labels[2:6, 3:9] = 1
    (ring,) = masks.to_polygons(masks.from_label_image(labels), 0.0)
    assert ring.min(axis=0).tolist() == [3, 2]
    assert ring.max(axis=0).tolist() == [9, 6]


def test_tolerance_saves_points():
    rows, columns = np.mgrid[:101, :101]
    cells = masks.from_masks([(rows - 50) ** 2 + (columns - 50) ** 2 <= 45**2], (101, 101))
    exact, coarse = (len(masks.to_polygons(cells, tolerance)[0]) for tolerance in (0.0, 0.5))
    assert coarse < exact / 2


def test_rings_around_no_pixel_are_dropped_with_their_scores():
    rings = [
        np.array([[0.1, 0.1], [0.3, 0.1], [0.2, 0.3]]),
        np.array([[1, 1], [3, 1], [3, 3], [1, 3]], float),
        np.array([[20, 20], [30, 20], [25, 30]], float),
        np.array([[0.6, 0.1], [1.4, 0.4], [0.9, 4.3]]),
    ]
    cells = masks.from_polygons(rings, (5, 5), scores=[0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(cells.scores, [0.2])


def test_memory_grows_with_the_cells_not_with_the_image():
    labels = np.zeros((3000, 3000), np.int32)
    for i in range(100):
        labels[30 * i + 5 : 30 * i + 25, 30 * i + 5 : 30 * i + 25] = i + 1
    cells = masks.from_label_image(labels)
    tracemalloc.start()
    masks.from_polygons(masks.to_polygons(cells, 0.5), labels.shape)
    masks.from_coco_rle(masks.to_coco_rle(cells), labels.shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 3000
