"""The shapes of Label Studio's regions: percent of the image (0..100) there, pixels here, one reader for each kind.

A reader takes a region's `value` and the image's (H, W) and gives the pixels whose centres the shape covers, None where
there are none. What it cannot read it refuses with LabelError, a ring of less than three points with ShapeError.
"""

import base64
import binascii
import math
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from loop.errors import LabelError
from loop.labelstudio.rle import decode_brush
from loop.rings import Crop, PointArray, crop_mask, fill_rings
from loop.types import BoolArray

_PNG_URL = "data:image/png;base64,"
_PNG_SIZE_AT = slice(16, 24)  # width and height in the header, big-endian
_ALPHA_PAINTED = 128  # strokes have soft edges
_ELLIPSE_POINTS = 360
_FARTHEST_PERCENT = 1e6


def to_percent(points_xy: PointArray, shape: tuple[int, int]) -> list[list[float]]:
    """Points (K, 2) x, y px inside the image as [x, y] in 0..100 of its (H, W), to six decimals, never above 100."""
    percent: list[list[float]] = np.round(points_xy * 100 / (shape[1], shape[0]), 6).tolist()
    return percent


def to_pixels(percent: Any, shape: tuple[int, int]) -> PointArray:
    """(K, 2) float64 px of K pairs in percent, to 1/1000 px: rings of `to_percent` come back exactly.

    Raises:
        LabelError: these are no pairs of finite numbers, or they lie absurdly far from the image.
    """
    try:
        points = np.asarray(percent, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise LabelError(f"its points are {str(percent)[:60]}; expected pairs of numbers") from error
    if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) < _FARTHEST_PERCENT).all():
        raise LabelError(f"its points are {str(percent)[:60]}; expected pairs of numbers 0..100")
    return np.asarray(np.round(points * (shape[1], shape[0]) / 100, 3), np.float64)


def number(value: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The finite number under `key`, or `default` where the key is missing.

    Raises:
        LabelError: there is something else, or nothing and no default.
    """
    given = value.get(key, default)
    if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= sys.float_info.max:
        raise LabelError(f"its {key} is {str(given)[:60]}; expected a number")
    return float(given)


def rectangle_ring(value: Mapping[str, Any], shape: tuple[int, int]) -> PointArray:
    """(4, 2) corners px. Label Studio turns a rectangle around its top left corner, clockwise on the screen."""
    corner, size = to_pixels(
        [[number(value, "x"), number(value, "y")], [number(value, "width"), number(value, "height")]], shape
    )
    sides = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    return np.asarray(corner + sides @ _turn(value))


def png_url(mask: BoolArray) -> str:
    """A bitmask region's `imageDataURL`: (H, W) bool as an RGBA picture, 255 in all channels inside, 0 outside."""
    rgba = np.repeat(mask[..., None].astype(np.uint8) * 255, 4, axis=2)
    return _PNG_URL + base64.b64encode(cv2.imencode(".png", rgba)[1].tobytes()).decode("ascii")


def _turn(value: Mapping[str, Any]) -> PointArray:
    """(2, 2) matrix that turns row vectors x, y by `rotation` degrees, clockwise where y points down."""
    angle = math.radians(number(value, "rotation", 0.0))
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _read_polygon(value: Mapping[str, Any], shape: tuple[int, int]) -> Crop | None:
    return fill_rings([to_pixels(value.get("points"), shape)], shape)[0]


def _read_rectangle(value: Mapping[str, Any], shape: tuple[int, int]) -> Crop | None:
    return fill_rings([rectangle_ring(value, shape)], shape)[0]


def _read_ellipse(value: Mapping[str, Any], shape: tuple[int, int]) -> Crop | None:
    centre, radii = to_pixels(
        [[number(value, "x"), number(value, "y")], [number(value, "radiusX"), number(value, "radiusY")]], shape
    )
    # 360 chords stay within radius / 26000 of the arc.
    angles = np.linspace(0, 2 * np.pi, _ELLIPSE_POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return fill_rings([centre + (circle * radii) @ _turn(value)], shape)[0]


def _read_brush(value: Mapping[str, Any], shape: tuple[int, int]) -> Crop | None:
    return decode_brush(value.get("rle", ()), shape)


def _read_bitmask(value: Mapping[str, Any], shape: tuple[int, int]) -> Crop | None:
    url = str(value.get("imageDataURL"))
    try:
        png = base64.b64decode(url.removeprefix(_PNG_URL), validate=True)
        width, height = struct.unpack(">II", png[_PNG_SIZE_AT])
    except (binascii.Error, struct.error) as error:
        raise LabelError(f"its image is {url[:40]!r}; expected {_PNG_URL}...") from error
    if (height, width) != tuple(shape):  # known before anything is unpacked
        raise LabelError(f"its image is {width} x {height} px; expected {shape[1]} x {shape[0]}")
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 4:
        raise LabelError("its image is no whole PNG with an alpha channel")
    return crop_mask(pixels[..., 3] >= _ALPHA_PAINTED)


READERS: dict[str, Callable[[Mapping[str, Any], tuple[int, int]], Crop | None]] = {
    "polygon": _read_polygon,
    "brush": _read_brush,
    "bitmask": _read_bitmask,
    "rectangle": _read_rectangle,
    "ellipse": _read_ellipse,
}
