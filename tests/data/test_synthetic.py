import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from loop.data.synthetic import MIN_AREA, draw_cells
from loop.errors import InputError
from loop.masks import to_dense


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.booleans())
def test_exactly_n_whole_cells_apart_or_touching(seed, n, touching):
    pixels, cells = draw_cells(np.random.default_rng(seed), (64, 64), n, touching)
    assert (pixels.shape, pixels.dtype, len(cells)) == ((64, 64, 3), np.uint8, n)
    masks = to_dense(cells)
    assert masks.sum(axis=0).max(initial=0) <= 1
    for i, mask in enumerate(masks):
        assert mask.sum() >= MIN_AREA
        assert ndimage.label(mask)[1] == 1
        others = masks[:i].any(axis=0) if i else np.zeros((64, 64), bool)
        if i:
            assert (ndimage.binary_dilation(mask) & others).any() == touching
            assert touching or not (ndimage.binary_dilation(mask, np.ones((3, 3))) & others).any()


def test_cells_are_bright_on_a_dark_noisy_ground():
    pixels, cells = draw_cells(np.random.default_rng(0), (64, 80), 5, image_id="a")
    inside = to_dense(cells).any(axis=0)
    ground = ~ndimage.binary_dilation(inside, iterations=3)
    assert pixels[inside].mean() > pixels[ground].mean() + 60
    assert pixels[ground].std() > 1
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()
    assert cells.image_id == "a"
    assert cells.source == "human"


def test_the_same_seed_draws_the_same_picture():
    first, second, other = (draw_cells(np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(to_dense(first.instances), to_dense(second.instances))
    assert (first.pixels != other.pixels).any()


def test_refusals():
    for shape, n in (((15, 64), 1), ((64, 64), -1)):
        with pytest.raises(InputError, match="expected at least 16 px"):
            draw_cells(np.random.default_rng(0), shape, n)
    with pytest.raises(InputError, match="of 200 cells fit"):
        draw_cells(np.random.default_rng(0), (16, 16), 200)
