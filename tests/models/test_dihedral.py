import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.errors import InputError, ShapeError
from loop.masks import from_masks, to_dense
from loop.models.dihedral import TRANSFORMS, apply, apply_instances, invert, invert_instances
from loop.types import Instances

transforms = st.sampled_from(TRANSFORMS)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.uint8, np.bool_, np.int32])


def _cells(seed, height, width, n):
    """Boxes anywhere inside, loose or tight, random masks, overlapping as it happens."""
    rng = np.random.default_rng(seed)
    y, x = (np.sort(rng.integers(0, side + 1, (n, 2)), axis=1) for side in (height, width))
    kept = [i for i in range(n) if y[i, 0] < y[i, 1] and x[i, 0] < x[i, 1]]
    boxes = [(x[i, 0], y[i, 0], x[i, 1], y[i, 1]) for i in kept]
    masks = [rng.random((y1 - y0, x1 - x0)) < 0.5 for x0, y0, x1, y1 in boxes]
    n = len(kept)
    return Instances.build(
        (height, width),
        boxes,
        masks,
        scores=rng.random(n, np.float32),
        labels=rng.integers(0, 3, n),
        weights=rng.random(n, np.float32),
        image_id="plate",
        source="model",
        model_version="7",
    )


def _assert_same(one, other):
    assert one.shape == other.shape
    for name in ("boxes_xyxy", "scores", "labels", "weights"):
        assert getattr(one, name).dtype == getattr(other, name).dtype
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for mask, twin in zip(one.masks, other.masks, strict=True):
        np.testing.assert_array_equal(mask, twin)
    assert (one.image_id, one.source, one.model_version) == (other.image_id, other.source, other.model_version)


def test_the_eight_by_hand():
    x = np.array([[1, 2, 3], [4, 5, 6]])
    expected = [
        [[1, 2, 3], [4, 5, 6]],
        [[3, 2, 1], [6, 5, 4]],
        [[4, 5, 6], [1, 2, 3]],
        [[6, 5, 4], [3, 2, 1]],
        [[1, 4], [2, 5], [3, 6]],
        [[3, 6], [2, 5], [1, 4]],
        [[4, 1], [5, 2], [6, 3]],
        [[6, 3], [5, 2], [4, 1]],
    ]
    for k, values in zip(TRANSFORMS, expected, strict=True):
        np.testing.assert_array_equal(apply(k, x), values)
    np.testing.assert_array_equal(apply(5, x), np.rot90(x))
    np.testing.assert_array_equal(apply(6, x), np.rot90(x, -1))
    np.testing.assert_array_equal(apply(3, x), np.rot90(x, 2))


@given(transforms, seeds, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2), dtypes)
def test_arrays_come_back_bit_for_bit(k, seed, height, width, extra, dtype):
    x = (1000 * np.random.default_rng(seed).standard_normal((2,) * extra + (height, width))).astype(dtype)
    before = x.copy()
    laid = apply(k, x)
    assert laid.shape[-2:] == ((height, width) if k < 4 else (width, height))
    back = invert(k, laid)
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    assert laid.flags.c_contiguous
    assert back.flags.c_contiguous
    assert back.tobytes() == x.tobytes() == before.tobytes()
    assert apply(k, invert(k, x)).tobytes() == x.tobytes()


def test_nan_and_negative_zero_come_back():
    x = np.array([[np.nan, -0.0, np.inf]], np.float32)
    for k in TRANSFORMS:
        assert invert(k, apply(k, x)).tobytes() == x.tobytes()


@given(transforms, seeds, st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_cells_come_back_and_lie_where_their_pixels_do(k, seed, height, width, n):
    cells = _cells(seed, height, width, n)
    laid = apply_instances(k, cells)
    np.testing.assert_array_equal(to_dense(laid), apply(k, to_dense(cells)))
    _assert_same(invert_instances(k, laid), cells)
    _assert_same(apply_instances(k, invert_instances(k, cells)), cells)


def test_no_cells():
    cells = from_masks([], (3, 5))
    assert apply_instances(6, cells).shape == (5, 3)
    assert len(invert_instances(6, apply_instances(6, cells))) == 0


@pytest.mark.parametrize("function", [apply, invert])
def test_refusals_for_arrays(function):
    with pytest.raises(InputError, match="no transform 8"):
        function(8, np.zeros((2, 2)))
    with pytest.raises(ShapeError, match="no rows and columns"):
        function(1, np.zeros(3))


@pytest.mark.parametrize("function", [apply_instances, invert_instances])
def test_refusals_for_cells(function):
    with pytest.raises(InputError, match="no transform -1"):
        function(-1, from_masks([], (3, 5)))
