from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.preprocess import Window, blend, normalise, pad_to_multiple, percentiles_of_counts, tiles, unpad
from loop.errors import InputError, ShapeError

seeds = st.integers(0, 2**32 - 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_of_counts_are_numpys(values, percent):
    counts = np.bincount(values, minlength=12)
    (got,) = percentiles_of_counts(counts, [percent])
    assert got == pytest.approx(np.percentile(values, percent), abs=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_puts_the_percentiles_at_zero_and_one(channels):
    pixels = np.random.default_rng(0).integers(20, 200, (30, 40, channels), dtype=np.uint8)
    got = normalise(pixels, channels)
    assert (got.shape, got.dtype) == ((channels, 30, 40), np.float32)
    for c in range(channels):
        low, high = np.percentile(pixels[:, :, c], [1, 99])
        np.testing.assert_allclose(got[c], np.clip((pixels[:, :, c] - low) / (high - low), 0, 1), atol=1e-6)


def test_channels_are_repeated_or_averaged():
    rng = np.random.default_rng(1)
    grey, colour = rng.integers(0, 256, (9, 8, 1), dtype=np.uint8), rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(normalise(grey), np.repeat(normalise(grey, 1), 3, axis=0))
    np.testing.assert_allclose(normalise(colour, 1)[0], normalise(colour).mean(axis=0), atol=1e-6)
    assert normalise(colour, 1).shape == (1, 9, 8)


def test_brightness_and_contrast_do_not_matter():
    pixels = np.random.default_rng(2).integers(0, 100, (30, 30, 1), dtype=np.uint8)
    np.testing.assert_allclose(normalise(pixels * 2 + 30), normalise(pixels), atol=1e-6)


def test_a_constant_image_becomes_zeros():
    assert not normalise(np.full((40, 40, 3), 77, np.uint8)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_cells_rarer_than_the_percentiles_keep_their_contrast(sign):
    pixels = np.full((40, 40, 1), 120, np.int16)
    pixels[::2] += 4 * sign  # the ground: both percentiles are in it
    pixels[5:7, 5:8] += 100 * sign
    got = normalise(pixels.astype(np.uint8))[0] if sign > 0 else 1 - normalise(pixels.astype(np.uint8))[0]
    # The range reaches a quarter of the way to the brightest pixel (224): from 120 to 146.
    np.testing.assert_allclose(got[5:7, 5:8], 1, atol=1e-6)
    np.testing.assert_allclose(got[::2, 20], 4 / 26, atol=1e-6)
    np.testing.assert_allclose(got[1::2, 20], 0, atol=1e-6)
    pixels[:] = 77
    pixels[3, 3] += 10 * sign
    lone = normalise(pixels.astype(np.uint8))[0]
    assert lone[3, 3] == (1 if sign > 0 else 0)
    assert (lone == lone[3, 3]).sum() == 1


def test_one_hot_pixel_does_not_darken_the_rest():
    pixels = np.random.default_rng(3).integers(20, 100, (60, 60, 1), dtype=np.uint8)
    before = normalise(pixels)
    pixels[0, 0] = 255
    assert np.abs(normalise(pixels) - before)[:, 1:].max() < 0.02


@given(seeds, st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 3]), st.sampled_from([1, 3]))
def test_normalise_stays_in_range_and_leaves_its_input_alone(seed, height, width, channels, in_channels):
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(rng.integers(0, 255), rng.integers(0, 90), (height, width, channels)), 0, 255)
    pixels = pixels.astype(np.uint8)
    before = pixels.copy()
    got = normalise(pixels, in_channels)
    assert (got.shape, got.dtype) == ((in_channels, height, width), np.float32)
    assert got.min() >= 0
    assert got.max() <= 1
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 2), (0, 8, 3)])
def test_normalise_refuses_other_shapes(shape):
    with pytest.raises(ShapeError, match="expected \\(H, W, 1\\)"):
        normalise(np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match="in_channels=2"):
        normalise(np.zeros((8, 8, 1), np.uint8), 2)


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 32), st.integers(0, 2))
def test_unpad_undoes_pad(seed, height, width, multiple, extra_axes):
    image = np.random.default_rng(seed).random((2,) * extra_axes + (height, width), np.float32)
    padded = pad_to_multiple(image, multiple)
    assert padded.shape[-2] % multiple == padded.shape[-1] % multiple == 0
    assert padded.shape[-2] - height < multiple
    assert padded.shape[-1] - width < multiple
    assert padded.dtype == np.float32
    np.testing.assert_array_equal(unpad(padded, (height, width)), image)


def test_padding_is_a_mirror():
    image = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    np.testing.assert_array_equal(pad_to_multiple(image, 4)[0], [1, 2, 3, 2])
    np.testing.assert_array_equal(pad_to_multiple(image, 4)[:, 0], [1, 4, 1, 4])
    assert pad_to_multiple(image, 1) is image


def test_padding_refusals():
    with pytest.raises(InputError, match="multiple=0"):
        pad_to_multiple(np.zeros((4, 4), np.float32), 0)
    with pytest.raises(ShapeError, match="at least one pixel"):
        pad_to_multiple(np.zeros((0, 4), np.float32), 4)
    with pytest.raises(ShapeError, match="smaller than"):
        unpad(np.zeros((4, 4), np.float32), (5, 4))


sizes = st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 39))


@given(sizes)
def test_tiles_cover_every_pixel_in_windows_of_one_size(size):
    height, width, tile, overlap = size
    overlap = min(overlap, tile - 1)
    windows = tiles((height, width), tile, overlap)
    cover = np.zeros((height, width), int)
    for y0, x0, y1, x1 in windows:
        assert (y1 - y0, x1 - x0) == (min(tile, height), min(tile, width))
        assert 0 <= y0 < y1 <= height
        assert 0 <= x0 < x1 <= width
        cover[y0:y1, x0:x1] += 1
    assert cover.min() >= 1
    assert len(set(windows)) == len(windows)
    for starts in (sorted({w.y0 for w in windows}), sorted({w.x0 for w in windows})):
        assert all(b - a <= tile - overlap for a, b in pairwise(starts))


@settings(deadline=None)
@given(seeds, sizes)
def test_blend_undoes_tiles(seed, size):
    height, width, tile, overlap = size
    overlap = min(overlap, tile - 1)
    image = np.random.default_rng(seed).random((2, height, width), np.float32)
    parts = ((w, image[:, w.y0 : w.y1, w.x0 : w.x1]) for w in tiles((height, width), tile, overlap))
    got = blend((height, width), parts, overlap)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, image, rtol=1e-5)


def test_a_seam_fades_from_one_window_to_the_next():
    left, right = Window(0, 0, 1, 6), Window(0, 4, 1, 10)
    got = blend((1, 10), [(left, np.zeros((1, 1, 6), np.float32)), (right, np.ones((1, 1, 6), np.float32))], 2)
    # In the two shared columns the ramps are 2/3, 1/3 against 1/3, 2/3.
    np.testing.assert_allclose(got[0, 0], [0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1], atol=1e-6)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (4, 4), (4, -1)])
def test_tiles_refuse_windows_that_get_nowhere(tile, overlap):
    with pytest.raises(InputError, match="overlap < tile"):
        tiles((8, 8), tile, overlap)
    with pytest.raises(InputError, match="no pixels"):
        tiles((0, 8), 4, 1)


def test_blend_refuses_gaps_and_wrong_sizes():
    part = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(ShapeError, match=r"16 pixels .* no window"):
        blend((4, 8), [(Window(0, 0, 4, 4), part)], 1)
    with pytest.raises(ShapeError, match="no window"):
        blend((4, 4), [], 1)
    for window in (Window(0, 0, 4, 5), Window(0, 2, 4, 6), Window(-1, 0, 3, 4)):
        with pytest.raises(ShapeError, match="inside it"):
            blend((4, 4), [(window, part)], 1)
