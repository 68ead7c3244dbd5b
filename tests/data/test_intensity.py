import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.intensity import is_ambiguous, stretch
from loop.data.synthetic import draw_cells
from loop.errors import InputError, ShapeError


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.sampled_from([1, 3])
)
def test_equals_a_plain_calculation_with_numpy(seed, height, width, channels, in_channels):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, rng.integers(1, 257), (height, width, channels), dtype=np.uint8)
    low, median, high = np.percentile(pixels, [0.5, 50, 99.8])
    expected = np.clip((pixels - low) / max(high - low, 4), 0, 1)
    if (median - low) / max(high - low, 4) > 0.5:
        expected = 1 - expected
    if channels < in_channels:
        expected = np.repeat(expected, 3, axis=2)
    elif channels > in_channels:
        expected = expected.mean(axis=2, keepdims=True)
    got = stretch(pixels, in_channels)
    assert got.dtype == np.uint8
    np.testing.assert_allclose(got / 255, expected, atol=1.01 / 255)


def test_cells_are_bright_whichever_way_they_were_pictured():
    pixels, cells = draw_cells(np.random.default_rng(0))
    inside = np.zeros(cells.shape, bool)
    for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy, cells.masks, strict=True):
        inside[y0:y1, x0:x1] |= mask
    for picture in (pixels, 255 - pixels):
        seen = stretch(picture)
        assert seen[inside].mean() > seen[~inside].mean() + 100
    kept = stretch(255 - pixels, dark_background=False)
    assert kept[inside].mean() < kept[~inside].mean() - 100


@pytest.mark.parametrize("value", [0, 7, 255])
def test_an_image_of_one_value_is_black(value):
    assert not stretch(np.full((5, 6, 1), value, np.uint8)).any()


def test_faint_noise_stays_faint():
    pixels = np.random.default_rng(0).integers(10, 12, (64, 64, 1), dtype=np.uint8)
    assert stretch(pixels).max() <= 64


def test_colours_keep_their_order():
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[2, 3] = (200, 100, 50)
    red, green, blue = stretch(pixels)[2, 3]
    assert red > green > blue > 0


def test_a_middle_grey_background_is_ambiguous_and_a_dark_one_is_not():
    grey = np.full((20, 20, 1), 128, np.uint8)
    grey[0, :], grey[1, :] = 0, 255
    assert is_ambiguous(stretch(grey))
    dark = np.zeros((20, 20, 1), np.uint8)
    dark[0, :] = 255
    assert not is_ambiguous(stretch(dark))


def test_the_input_is_not_changed():
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    before = pixels.copy()
    stretch(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_bad_input_is_refused():
    with pytest.raises(ShapeError, match=r"\(4, 4\)"):
        stretch(np.zeros((4, 4), np.uint8))
    with pytest.raises(ShapeError, match=r"\(0, 4, 3\)"):
        stretch(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(InputError, match="in_channels=2"):
        stretch(np.zeros((4, 4, 3), np.uint8), 2)
