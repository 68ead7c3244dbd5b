import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_studio_sdk.converter import brush

from loop.errors import LabelError, ShapeError
from loop.labelstudio.rle import decode_brush, decode_brushes, encode_brush
from loop.rings import crop_mask

unhurried = settings(max_examples=60, deadline=None)
sides = st.integers(1, 24)


def sdk_rle(mask):
    return brush.mask2rle(mask.astype(np.uint8) * 255)


def sdk_mask(rle, shape):
    return brush.decode_rle(rle).reshape(*shape, 4)[..., 3] >= 128


def framed(crop, shape):
    """The crop in its frame, after a look at whether it is tight."""
    full = np.zeros(shape, bool)
    if crop is not None:
        x0, y0, x1, y1 = crop.box_xyxy
        for side in (crop.mask[0], crop.mask[-1], crop.mask[:, 0], crop.mask[:, -1]):
            assert side.any()
        full[y0:y1, x0:x1] = crop.mask
    return full


@given(hnp.arrays(bool, st.tuples(sides, sides)))
@unhurried
def test_random_masks_are_written_and_read_as_the_sdk_does(mask):
    rle = encode_brush(mask)
    assert rle == sdk_rle(mask)
    np.testing.assert_array_equal(framed(decode_brush(rle, mask.shape), mask.shape), mask)


@given(hnp.arrays(bool, st.tuples(sides, sides)), st.tuples(*[st.integers(0, 9)] * 4))
@unhurried
def test_a_part_of_the_image_is_written_as_the_whole_is(mask, around):
    top, bottom, left, right = around
    full = np.pad(mask, ((top, bottom), (left, right)))
    assert encode_brush(mask, full.shape, (left, top)) == sdk_rle(full)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (1, 4), (1, 64), (1, 65), (128, 128), (128, 129), (256, 128), (300, 400), (800, 900)]
)
def test_long_runs_and_run_size_limits_are_written_as_the_sdk_does(shape, value):
    for corner in (True, value):
        mask = np.full(shape, value)
        mask[0, 0] = corner
        rle = encode_brush(mask)
        assert rle == sdk_rle(mask)
        assert all(type(byte) is int for byte in rle)
        np.testing.assert_array_equal(framed(decode_brush(rle, shape), shape), mask)


def test_a_cell_in_a_large_image_is_read_past_its_empty_rows():
    mask = np.zeros((1500, 1400), bool)
    mask[700:760, 300:390] = np.random.default_rng(0).random((60, 90)) < 0.5
    mask[1400, 1399] = mask[1401, 0] = True
    rle = encode_brush(mask)
    assert rle == sdk_rle(mask)
    np.testing.assert_array_equal(framed(decode_brush(rle, mask.shape), mask.shape), mask)


def test_a_mask_that_reaches_out_of_the_image_is_refused():
    for corner in ((-1, 0), (0, -1), (3, 0), (0, 2)):
        with pytest.raises(ShapeError, match=r"a mask of 3 x 2 px at .* reaches out of an image of 5 x 3 px"):
            encode_brush(np.ones((2, 3), bool), (3, 5), corner)


@given(hnp.arrays(np.uint8, st.tuples(sides, sides, st.just(4)), elements=st.sampled_from([0, 1, 100, 127, 128, 255])))
@unhurried
def test_any_colours_and_soft_edges_are_read_as_the_sdk_does(rgba):
    rle = brush.encode_rle(rgba.reshape(-1))
    shape = rgba.shape[:2]
    mask = framed(decode_brush(rle, shape), shape)
    np.testing.assert_array_equal(mask, rgba[..., 3] >= 128)
    np.testing.assert_array_equal(mask, sdk_mask(rle, shape))


def stream(*fields):
    """Bytes of (value, bits) pairs, most significant bit first."""
    text = "".join(f"{value:0{bits}b}" for value, bits in fields)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


HEADER = ((7, 5), (2, 4), (3, 4), (7, 4), (15, 4))


@st.composite
def blocks(draw):
    """Any stream: runs and literals of any lengths and of any run sizes, with the values that it stands for."""
    sizes = draw(st.sampled_from([(3, 4, 8, 16), (1, 2, 3, 4), (16, 16, 16, 16), (2, 5, 9, 12)]))
    values, fields = [], []
    for _ in range(draw(st.integers(1, 12))):
        which = draw(st.integers(0, 3))
        count = draw(st.integers(1, min(1 << sizes[which], 300)))
        is_run = draw(st.booleans())
        here = draw(st.lists(st.sampled_from([0, 127, 128, 255]), min_size=1, max_size=7))
        here = here[:1] if is_run else [here[k % len(here)] for k in range(count)]
        fields += [(int(is_run), 1), (which, 2), (count - 1, sizes[which]), *((value, 8) for value in here)]
        values += here * count if is_run else here
    missing = -len(values) % 4
    fields += [(1, 1), (0, 2), (missing - 1, sizes[0]), (200, 8)] if 0 < missing <= 1 << sizes[0] else []
    values += [200] * missing if missing <= 1 << sizes[0] else []
    sizes_field = tuple((size - 1, 4) for size in sizes)
    return stream((len(values), 32), (7, 5), *sizes_field, *fields), np.array(values, np.uint8)


@given(blocks())
@settings(max_examples=150, deadline=None)
def test_literals_and_runs_of_any_sizes_are_read(drawn):
    rle, values = drawn
    assume(values.size % 4 == 0)
    for shape in ((1, values.size // 4), (values.size // 4, 1)):
        np.testing.assert_array_equal(framed(decode_brush(rle, shape), shape), values[3::4].reshape(shape) >= 128)


def told(decoded, shape):
    """What can be compared of a region that was read or refused."""
    return str(decoded) if isinstance(decoded, LabelError) else framed(decoded, shape).tolist()


@st.composite
def regions(draw, shape):
    """One region's stream for `shape`: the SDK's of bare or soft-edged pixels, literals alone, or a damaged one."""
    elements = draw(st.sampled_from([[0, 255], [0, 1, 100, 127, 128, 255], [0]]))
    rgba = draw(hnp.arrays(np.uint8, (*shape, 4), elements=st.sampled_from(elements)))
    kind = draw(st.sampled_from(["sdk", "sdk", "sizes", "literals", "cut", "bit", "long", "followed", "other"]))
    if kind in ("literals", "sizes"):  # of 12 bits, so one block; among run sizes that the SDK never writes
        values = rgba.reshape(-1).tolist()
        sizes = ((7, 5), (2, 4), (3, 4), (11, 4), (15, 4)) if kind == "sizes" else HEADER
        which, bits = (2, 12) if kind == "sizes" else (3, 16)
        return stream((len(values), 32), *sizes, (0, 1), (which, 2), (len(values) - 1, bits), *((v, 8) for v in values))
    rle = brush.encode_rle(rgba.reshape(-1)) if kind != "other" else encode_brush(np.ones((1, 2000), bool))
    if kind == "cut":
        return rle[: draw(st.integers(0, len(rle) - 1))]
    if kind == "bit":
        at = draw(st.integers(0, 8 * len(rle) - 1))
        rle[at // 8] ^= 128 >> at % 8
    if kind == "long":
        return stream((rgba.size, 32), *HEADER, (1, 1), (3, 2), (draw(st.integers(0, 65535)), 16), (255, 8))
    return [*rle, *draw(st.lists(st.integers(0, 255), max_size=40))] if kind == "followed" else rle


@given(st.data(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=150, deadline=None)
def test_regions_read_together_are_as_read_alone_and_as_the_sdk_reads_them(data, shape):
    rles = data.draw(st.lists(regions(shape), max_size=8))
    for rle, decoded in zip(rles, decode_brushes(rles, shape), strict=True):
        got = told(decoded, shape)
        assert got == told(decode_brushes([rle], shape)[0], shape)
        assert got == told(slow(rle, shape), shape)
        if not isinstance(decoded, LabelError):
            np.testing.assert_array_equal(got, sdk_mask(rle, shape))


def slow(rle, shape):
    """The format's definition, one value after the other."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    height, width = shape
    if len(bits) < 53:
        return LabelError(f"brush run lengths end after {len(rle)} bytes, before the mask begins")
    total, word = int(bits[:32], 2), int(bits[32:37], 2) + 1
    if (total, word) != (4 * height * width, 8):
        return LabelError(
            f"brush region holds {total} values of {word} bits; expected {4 * height * width} of 8 for an image of"
            f" {width} x {height} px: the region is damaged or belongs to another image"
        )
    sizes = [int(bits[k : k + 4], 2) + 1 for k in (37, 41, 45, 49)]
    at, values = 53, []
    cut = LabelError(f"brush run lengths end after {len(rle)} bytes in the middle of the mask")
    while len(values) < total:
        if at + 3 > len(bits) or at + 3 + (size := sizes[int(bits[at + 1 : at + 3], 2)]) > len(bits):
            return cut
        count = int(bits[at + 3 : at + 3 + size], 2) + 1
        words = 1 if bits[at] == "1" else count
        first, at = at + 3 + size, at + 3 + size + 8 * words
        if at > len(bits):
            return cut
        read = [int(bits[k : k + 8], 2) for k in range(first, at, 8)]
        values += read * count if bits[first - 3 - size] == "1" else read
    if len(values) > total:
        return LabelError(f"brush run lengths reach {len(values)} values of {total}: the region is damaged")
    mask = np.array(values[3::4]).reshape(shape) >= 128
    return crop_mask(mask)


def test_no_regions_are_read():
    assert decode_brushes([], (3, 4)) == []


def test_literal_blocks_as_the_browser_writes_them_are_read():
    # 2 x 1 pixels: a run of 3 zeros, then 5 literals 9 1 2 3 200 that start at the first pixel's alpha.
    rle = stream(
        (8, 32), *HEADER, (1, 1), (0, 2), (2, 3), (0, 8), (0, 1), (1, 2), (4, 4), *((v, 8) for v in (9, 1, 2, 3, 200))
    )
    assert decode_brush(rle, (1, 2)).box_xyxy == (1, 0, 2, 1)
    assert sdk_mask(rle, (1, 2)).tolist() == [[False, True]]


def test_what_follows_the_mask_is_left_alone():
    rle = encode_brush(np.eye(9, dtype=bool))
    crop = decode_brush([*rle, 0, 0, 255, 7], (9, 9))
    np.testing.assert_array_equal(crop.mask, np.eye(9, dtype=bool))


def test_a_mask_of_another_size_is_refused():
    rle = encode_brush(np.ones((4, 5), bool))
    with pytest.raises(LabelError, match="holds 80 values of 8 bits; expected 96 of 8 for an image of 6 x 4 px"):
        decode_brush(rle, (4, 6))


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ([], "end after 0 bytes"),
        (encode_brush(np.eye(9, dtype=bool))[:20], "end after 20 bytes"),
        (stream((324, 32), *HEADER, (0, 1), (3, 2), (300, 16), (0, 8)), "end after 10 bytes"),
        (stream((324, 32), *HEADER, (1, 1), (3, 2), (300, 16))[:-1], "end after 8 bytes"),
        ([256, 0, 0], "integers 0..255"),
        (10**12, "integers 0..255, not int"),
        (["a"], "integers 0..255"),
        (stream((324, 32), *HEADER, (1, 1), (3, 2), (999, 16), (0, 8)), "reach 1000 values of 324"),
        (stream((324, 32), *HEADER, (1, 1), (3, 2), (65535, 16), (0, 8)), "reach 65536 values of 324"),
    ],
)
def test_damaged_run_lengths_are_refused(rle, says):
    with pytest.raises(LabelError, match=says):
        decode_brush(rle, (9, 9))
