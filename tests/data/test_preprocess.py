from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.preprocess import Window, blend, pad_to_multiple, percentiles_of_counts, tiles, unpad
from loop.errors import InputError, ShapeError

seeds = st.integers(0, 2**32 - 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_of_counts_are_numpys(values, percent):
    counts = np.bincount(values, minlength=12)
    (got,) = percentiles_of_counts(counts, [percent])
    assert got == pytest.approx(np.percentile(values, percent), abs=1e-9)


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
