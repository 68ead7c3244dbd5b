import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_studio_sdk.converter import brush

from loop.errors import LabelError
from loop.labelstudio.rle import decode_brush, encode_brush

unhurried = settings(max_examples=60, deadline=None)
sides = st.integers(1, 24)


def sdk_alpha(rle, shape):
    return brush.decode_rle(rle).reshape(*shape, 4)[..., 3]


@given(hnp.arrays(bool, st.tuples(sides, sides)))
@unhurried
def test_random_masks_are_written_and_read_as_the_sdk_does(mask):
    rle = encode_brush(mask)
    assert rle == brush.mask2rle(mask.astype(np.uint8) * 255)
    np.testing.assert_array_equal(decode_brush(rle, mask.shape[1], mask.shape[0]), mask * np.uint8(255))


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (1, 4), (1, 64), (1, 65), (128, 128), (128, 129), (256, 128), (300, 400)]
)
def test_long_runs_and_run_size_limits_are_written_as_the_sdk_does(shape, value):
    mask = np.full(shape, value)
    mask[0, 0] = True
    rle = encode_brush(mask)
    assert rle == brush.mask2rle(mask.astype(np.uint8) * 255)
    assert all(type(byte) is int for byte in rle)
    np.testing.assert_array_equal(decode_brush(rle, shape[1], shape[0]), sdk_alpha(rle, shape))


@given(hnp.arrays(np.uint8, st.tuples(sides, sides, st.just(4)), elements=st.sampled_from([0, 1, 100, 127, 128, 255])))
@unhurried
def test_any_colours_and_soft_edges_are_read_as_the_sdk_does(rgba):
    rle = brush.encode_rle(rgba.reshape(-1))
    height, width = rgba.shape[:2]
    alpha = decode_brush(rle, width, height)
    np.testing.assert_array_equal(alpha, rgba[..., 3])
    np.testing.assert_array_equal(alpha, sdk_alpha(rle, (height, width)))


def stream(*fields):
    """Bytes of (value, bits) pairs, most significant bit first."""
    text = "".join(f"{value:0{bits}b}" for value, bits in fields)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


HEADER = ((7, 5), (2, 4), (3, 4), (7, 4), (15, 4))


def test_literal_blocks_as_the_browser_writes_them_are_read():
    # 2 x 1 pixels: a run of 3 zeros, then 5 literals 9 1 2 3 200 that start at the first pixel's alpha.
    rle = stream(
        (8, 32), *HEADER, (1, 1), (0, 2), (2, 3), (0, 8), (0, 1), (1, 2), (4, 4), *((v, 8) for v in (9, 1, 2, 3, 200))
    )
    assert decode_brush(rle, 2, 1).tolist() == [[9, 200]]
    assert sdk_alpha(rle, (1, 2)).tolist() == [[9, 200]]


def test_a_mask_of_another_size_is_refused():
    rle = encode_brush(np.ones((4, 5), bool))
    with pytest.raises(LabelError, match="holds 80 values of 8 bits; expected 96 of 8 for an image of 6 x 4 px"):
        decode_brush(rle, 6, 4)


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ([], "end after 0 bytes"),
        (encode_brush(np.eye(9, dtype=bool))[:20], "end after 20 bytes"),
        ([256, 0, 0], "integers 0..255"),
        (["a"], "integers 0..255"),
        (stream((324, 32), *HEADER, (1, 1), (3, 2), (999, 16), (0, 8)), "reach 1000 values of 324"),
    ],
)
def test_damaged_run_lengths_are_refused(rle, says):
    with pytest.raises(LabelError, match=says):
        decode_brush(rle, 9, 9)
