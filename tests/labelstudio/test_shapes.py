import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_studio_sdk.converter import brush
from PIL import Image

from loop.errors import LabelError
from loop.labelstudio.rle import encode_brush
from loop.labelstudio.shapes import READERS, number, png_url, rectangle_ring, to_percent, to_pixels


def full(crop, shape):
    image = np.zeros(shape, bool)
    if crop is not None:
        x0, y0, x1, y1 = crop.box_xyxy
        image[y0:y1, x0:x1] = crop.mask
    return image


def filled(shape, rows, columns):
    image = np.zeros(shape, bool)
    image[slice(*rows), slice(*columns)] = True
    return image


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@given(
    st.integers(1, 12_000),
    st.integers(1, 12_000),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
)
@settings(deadline=None)
def test_percent_never_leaves_the_image_and_half_pixels_come_back_exactly(height, width, parts):
    points = np.round(np.array(parts) * (2 * width, 2 * height)) / 2
    percent = to_percent(points, (height, width))
    assert 0 <= np.min(percent) <= np.max(percent) <= 100
    np.testing.assert_array_equal(to_pixels(percent, (height, width)), points)


@pytest.mark.parametrize(
    "points",
    [None, "text", [1, 2], [[1, 2, 3]], [[1, None]], [["a", 1]], [[1, float("nan")]], [[1e9, 0]], [[1], [1, 2]]],
)
def test_points_that_are_none_are_refused(points):
    with pytest.raises(LabelError, match="pairs of numbers"):
        to_pixels(points, (10, 10))


@pytest.mark.parametrize("given_x", [None, "1", True, float("nan"), float("inf")])
def test_a_number_must_be_one(given_x):
    with pytest.raises(LabelError, match="its x is"):
        number({"x": given_x}, "x")
    assert number({}, "x", 2) == 2
    with pytest.raises(LabelError, match="its x is None"):
        number({}, "x")


def test_a_polygon():
    value = {"points": [[10, 20], [50, 20], [50, 60], [10, 60]]}
    np.testing.assert_array_equal(
        full(READERS["polygon"](value, (50, 20)), (50, 20)), filled((50, 20), (10, 30), (2, 10))
    )


def test_an_upright_rectangle():
    value = {"x": 25, "y": 10, "width": 50, "height": 20, "rotation": 0}
    np.testing.assert_array_equal(
        full(READERS["rectangle"](value, (100, 40)), (100, 40)), filled((100, 40), (10, 30), (10, 30))
    )


@pytest.mark.parametrize(
    ("rotation", "rows", "columns"),
    [(90, (20, 60), (80, 100)), (180, (0, 20), (60, 100)), (270, (-20, 20), (100, 120)), (360, (20, 40), (100, 140))],
)
def test_a_rectangle_turns_around_its_top_left_corner_in_pixels(rotation, rows, columns):
    # 40 x 20 px with its corner at (100, 20) of an image of 200 x 100: percent differ along x and y, pixels do not.
    value = {"x": 50, "y": 20, "width": 20, "height": 20, "rotation": rotation}
    expected = filled((100, 200), (max(rows[0], 0), rows[1]), columns)
    np.testing.assert_array_equal(full(READERS["rectangle"](value, (100, 200)), (100, 200)), expected)


def test_a_rectangle_turned_by_30_degrees_has_the_corners_of_trigonometry():
    ring = rectangle_ring({"x": 50, "y": 50, "width": 10, "height": 5, "rotation": 30}, (100, 100))
    root = np.sqrt(3) / 2
    expected = [[50, 50], [50 + 10 * root, 55], [50 + 10 * root - 2.5, 55 + 5 * root], [47.5, 50 + 5 * root]]
    np.testing.assert_allclose(ring, expected, atol=1e-9)


@given(st.floats(-180, 360), st.floats(5, 95), st.floats(5, 95), st.floats(1, 40), st.floats(1, 40))
@settings(max_examples=60, deadline=None)
def test_an_ellipse_holds_the_pixels_of_its_equation(rotation, cx, cy, rx, ry):
    shape = (60, 90)
    value = {"x": cx, "y": cy, "radiusX": rx, "radiusY": ry, "rotation": rotation}
    got = full(READERS["ellipse"](value, shape), shape)
    x = np.arange(90) + 0.5 - cx * 0.9
    y = np.arange(60)[:, None] + 0.5 - cy * 0.6
    angle = np.radians(rotation)
    u, v = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    level = (u / (rx * 0.9)) ** 2 + (v / (ry * 0.6)) ** 2
    assert got[level < 0.99].all()
    assert not got[level > 1.01].any()


def test_a_brush_stroke_counts_from_alpha_128():
    alpha = np.array([[0, 127, 128], [255, 1, 200]], np.uint8)
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 3] = alpha
    crop = READERS["brush"]({"rle": brush.encode_rle(rgba.reshape(-1))}, (2, 3))
    assert full(crop, (2, 3)).tolist() == [[False, False, True], [True, False, True]]
    assert READERS["brush"]({"rle": encode_brush(np.zeros((2, 3), bool))}, (2, 3)) is None
    with pytest.raises(LabelError, match="end after 0 bytes"):
        READERS["brush"]({}, (2, 3))


def test_a_bitmask_is_its_alpha():
    rgba = np.zeros((4, 5, 4), np.uint8)
    rgba[1:3, 2:4] = (255, 0, 0, 255)
    rgba[3, 0] = (9, 9, 9, 127)
    crop = READERS["bitmask"]({"imageDataURL": png(rgba)}, (4, 5))
    np.testing.assert_array_equal(full(crop, (4, 5)), filled((4, 5), (1, 3), (2, 4)))


def test_a_written_bitmask_is_a_picture_that_pillow_reads():
    mask = np.eye(5, 7, dtype=bool)
    url = png_url(mask)
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as picture:
        assert (picture.mode, picture.size) == ("RGBA", (7, 5))
        np.testing.assert_array_equal(np.asarray(picture)[..., 3], mask * np.uint8(255))
    np.testing.assert_array_equal(full(READERS["bitmask"]({"imageDataURL": url}, (5, 7)), (5, 7)), mask)


def test_bitmasks_that_are_none_are_refused():
    good = png(np.zeros((4, 5, 4), np.uint8))
    cases = [
        (None, "its image is 'None'"),
        ("data:image/png;base64,@@", "expected data:image/png"),
        ("data:image/png;base64,AAAA", "expected data:image/png"),
        (good[:-40], "no whole PNG"),
        (png(np.zeros((4, 5, 3), np.uint8)), "no whole PNG with an alpha channel"),
        (png(np.zeros((5, 4, 4), np.uint8)), "is 4 x 5 px; expected 5 x 4"),
    ]
    for url, says in cases:
        with pytest.raises(LabelError, match=says):
            READERS["bitmask"]({"imageDataURL": url}, (4, 5))
