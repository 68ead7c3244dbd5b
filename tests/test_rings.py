import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from loop.errors import ConfigError, NonFiniteError, ShapeError
from loop.rings import crop_mask, fill_rings, outlines

unhurried = settings(max_examples=60, deadline=None)


@st.composite
def noise_masks(draw, side=16):
    """Any mask at all: empty, full, specks, holes, on every border."""
    shape = draw(st.tuples(st.integers(1, side), st.integers(1, side)))
    return draw(hnp.arrays(bool, shape))


def union_iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def filled(ring, shape):
    image = np.zeros(shape, bool)
    for crop in fill_rings([ring], shape):
        if crop is not None:
            x0, y0, x1, y1 = crop.box_xyxy
            image[y0:y1, x0:x1] = crop.mask
    return image


@given(noise_masks(), st.sampled_from([0.3, 0.5, 1.0, 4.0]))
@unhurried
def test_the_stated_iou_is_that_of_the_way_back(mask, tolerance):
    if mask.any():
        (ring,) = outlines([mask], tolerance)
        assert len(ring.points_xy) >= 3
        assert ring.iou == pytest.approx(union_iou(filled(ring.points_xy, mask.shape), mask))


def test_a_ring_loses_holes_and_other_parts_and_says_how_much():
    holed = np.ones((5, 5), bool)
    holed[1:4, 1:4] = False
    assert outlines([holed], 0.5)[0].iou == pytest.approx(16 / 25)
    parts = np.ones((4, 11), bool)
    parts[:, 4] = False
    assert outlines([parts], 0.0)[0].iou == pytest.approx(24 / 40)


@given(st.lists(noise_masks(), max_size=6), st.sampled_from([0.0, 0.5, 2.0]))
@unhurried
def test_masks_outlined_together_are_those_outlined_alone(masks, tolerance):
    masks = [mask for mask in masks if mask.any()] + [np.ones((2, 90), bool)]
    for mask, ring in zip(masks, outlines(masks, tolerance), strict=True):
        (alone,) = outlines([mask], tolerance)
        np.testing.assert_array_equal(ring.points_xy, alone.points_xy)
        assert ring.iou == alone.iou


def test_an_outline_needs_pixels_and_a_tolerance():
    with pytest.raises(ShapeError, match="empty mask"):
        outlines([np.ones((2, 2), bool), np.zeros((3, 3), bool)], 0.5)
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="tolerance_px"):
            outlines([np.ones((3, 3), bool)], tolerance)


@given(
    st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25)), min_size=3, max_size=3, unique=True),
    st.booleans(),
)
@unhurried
def test_hand_drawn_triangles_take_the_pixels_whose_centres_they_hold(corners, reverse):
    triangle = np.array(corners[::-1] if reverse else corners)
    full = filled(triangle, (16, 20))
    x, y = np.meshgrid(np.arange(20) + 0.5, np.arange(16) + 0.5)
    sides = []
    for a, b in zip(triangle, np.roll(triangle, -1, axis=0), strict=True):
        normal = np.array([a[1] - b[1], b[0] - a[0]])
        sides.append(((x - a[0]) * normal[0] + (y - a[1]) * normal[1]) / max(np.hypot(*normal), 1e-12))
    sides = np.array(sides)
    inside, outside = (sides > 1e-6).all(0) | (sides < -1e-6).all(0), (sides > 1e-6).any(0) & (sides < -1e-6).any(0)
    assert full[inside].all()
    assert not full[outside].any()


def test_a_ring_that_crosses_itself_is_filled_as_a_browser_fills_it():
    angles = np.pi / 2 + np.arange(5) * 4 * np.pi / 5
    star = np.stack([50 + 40 * np.cos(angles), 50 - 40 * np.sin(angles)], axis=1)
    cell = filled(star, (100, 100))
    assert cell[50, 50]
    np.testing.assert_array_equal(ndimage.binary_fill_holes(cell), cell)


def test_a_closed_ring_may_repeat_its_first_point():
    ring = np.array([[1, 1], [5, 1], [5, 4], [1, 4]], float)
    closed = np.concatenate([ring, ring[:1]])
    np.testing.assert_array_equal(filled(ring, (6, 6)), filled(closed, (6, 6)))
    assert filled(ring, (6, 6)).sum() == 12


@pytest.mark.parametrize("ring", [np.zeros((2, 2)), np.zeros((4, 3)), np.zeros(6)])
def test_what_is_no_ring_is_refused(ring):
    with pytest.raises(ShapeError, match="ring 1 has shape"):
        fill_rings([np.eye(3, 2), ring], (5, 5))


def test_a_ring_with_nan_is_refused():
    with pytest.raises(NonFiniteError, match=r"ring 1 has the point \[ ?1. nan\]"):
        fill_rings([np.eye(3, 2), np.array([[0, 0], [1, np.nan], [2, 2]])], (5, 5))


def test_no_rings():
    assert fill_rings([], (5, 5)) == []
    assert outlines([], 0.5) == []


def test_rings_filled_together_are_those_filled_alone():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1000, (12, 2, 2))
    rings = [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) for (x0, y0), (x1, y1) in corners]
    rings.insert(3, np.array([[7.0, 7.0], [7.1, 7.0], [7.0, 7.1]]))
    crops = fill_rings(rings, (900, 1000))
    assert crops[3] is None
    for ring, crop in zip(rings, crops, strict=True):
        low, high = np.round(ring.min(0)), np.minimum(np.round(ring.max(0)), (1000, 900))
        assert (0 if crop is None else crop.mask.sum()) == max(np.prod(high - low), 0)


def test_a_crop_is_tight_and_a_copy():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:4] = True
    crop = crop_mask(mask, x0=10)
    assert crop.box_xyxy == (12, 1, 14, 3)
    assert crop.mask.all()
    assert not np.shares_memory(crop.mask, mask)
    assert crop_mask(np.zeros((5, 6), bool)) is None
