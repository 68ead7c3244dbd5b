import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.synthetic import draw_cells
from loop.data.texture import LONGEST, SIZE, describe
from loop.errors import ShapeError


def large(seed):
    return draw_cells(np.random.default_rng(seed), (128, 128), 6).pixels


def small(seed):
    return draw_cells(np.random.default_rng(seed), (128, 128), 60).pixels


def inverted(seed):
    return 255 - large(seed)


def coloured(seed):
    pixels = large(seed).copy()
    pixels[:, :, 1] //= 3
    return pixels


def empty(seed):
    return np.clip(np.random.default_rng(seed).normal(20, 4, (128, 128, 3)), 0, 255).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 255), st.integers(0, 99))
def test_any_small_image_gives_finite_numbers(height, width, channels, most, seed):
    pixels = np.random.default_rng(seed).integers(0, most + 1, (height, width, channels)).astype(np.uint8)
    found = describe(pixels)
    assert found.shape == (SIZE,)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (700, 350), (513, 512)])
def test_large_and_thin_images_give_finite_numbers(shape):
    for value in (0, 128, 255):
        found = describe(np.full((*shape, 1), value, np.uint8))
        assert found.shape == (SIZE,)
        assert np.isfinite(found).all()
    found = describe(np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("make", [large, small, inverted])
def test_grey_is_the_same_as_grey_in_three_channels(make):
    pixels = make(0)
    np.testing.assert_allclose(describe(pixels[:, :, :1]), describe(pixels), atol=1e-5)


@pytest.mark.parametrize("added", [5, 30])
@pytest.mark.parametrize("make", [large, small, empty, coloured])
def test_a_constant_brightness_changes_little(make, added):
    pixels = np.minimum(make(1), 255 - added)
    np.testing.assert_allclose(describe(pixels + np.uint8(added)), describe(pixels), atol=1e-3)


def test_the_image_itself_is_not_changed():
    pixels = large(0)
    before = pixels.copy()
    describe(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_like_images_lie_nearer_than_unlike_ones():
    """Five of each of five kinds: whichever image one takes, the nearest other one is of its kind."""
    kinds = [large, small, inverted, coloured, empty]
    found = np.array([describe(kind(seed)) for kind in kinds for seed in range(5)], np.float64)
    spread = found.std(axis=0)
    found = (found - found.mean(axis=0)) / np.where(spread > 0, spread, 1)
    distances = np.linalg.norm(found[:, None] - found[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    of = np.repeat(np.arange(5), 5)
    np.testing.assert_array_equal(of[distances.argmin(axis=1)], of)


def test_what_the_numbers_say_of_drawn_cells():
    few, many = describe(large(0)), describe(small(0))
    pieces, diameter = -2, -1
    assert many[pieces] > few[pieces]
    assert many[diameter] < few[diameter]
    # the pieces of a picture inverted are the same pieces
    np.testing.assert_allclose(describe(inverted(0))[-4:], few[-4:], atol=0.02)
    assert abs(few[6:10]).max() < 1e-5
    assert describe(coloured(0))[7] < -0.02


def test_a_large_image_looks_like_itself_shrunk():
    pixels = large(0)
    big = cv2.resize(pixels, (2 * LONGEST, 2 * LONGEST), interpolation=cv2.INTER_CUBIC)
    shrunk = cv2.resize(big, (LONGEST, LONGEST), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(describe(big), describe(shrunk), atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (4, 4, 4), (0, 4, 3), (4, 0, 1), (2, 4, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match=r"expected \(H, W, 1\) or \(H, W, 3\)"):
        describe(np.zeros(shape, np.uint8))
