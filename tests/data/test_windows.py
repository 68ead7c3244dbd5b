import numpy as np
import pytest
import tifffile
from PIL import Image

from loop.data import store, windows
from loop.data.decode import decode, kind_of
from loop.data.display import write_display
from loop.data.preprocess import Window
from loop.data.windows import intensities, open_windows
from loop.errors import ImageError, InputError

RNG = np.random.default_rng(3)
DEEP = RNG.integers(300, 3000, (50, 70), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)
STACK = RNG.integers(0, 4000, (4, 50, 70), dtype=np.uint16)
TILED = {"tile": (16, 32), "photometric": "minisblack"}
WINDOWS = [
    Window(0, 0, 50, 70),
    Window(0, 0, 1, 1),
    Window(15, 31, 17, 33),
    Window(33, 5, 50, 70),
    Window(7, 64, 41, 70),
]

FILES = {
    "tiled": (DEEP, {**TILED, "compression": "zlib"}),
    "tiled with a predictor": (DEEP, {**TILED, "compression": "lzw", "predictor": True}),
    "tiled, not compressed": (DEEP, TILED),
    "strips": (DEEP, {"rowsperstrip": 7, "compression": "zlib", "photometric": "minisblack"}),
    "as it is": (DEEP, {"photometric": "minisblack"}),
    "the other byte order": (DEEP, {"photometric": "minisblack", "byteorder": ">", "rowsperstrip": 9}),
    "the other byte order, tiled": (DEEP, {**TILED, "byteorder": ">", "compression": "zlib"}),
    "large offsets": (DEEP, {**TILED, "bigtiff": True}),
    "colour": (COLOUR, {"photometric": "rgb", "tile": (32, 16), "compression": "zlib"}),
    "opacity": (np.dstack([COLOUR, COLOUR[..., 0]]), {"photometric": "rgb", "extrasamples": [2], "tile": (16, 16)}),
    "white is zero": (DEEP, {"photometric": "miniswhite", "tile": (16, 16), "compression": "zlib"}),
    "one bit": (DEEP > 1500, {"photometric": "minisblack", "rowsperstrip": 8}),
    "fractions": (DEEP / np.float32(7), TILED),
    "depth": (STACK, {**TILED, "compression": "zlib", "metadata": {"axes": "ZYX"}}),
    "depth, as it is": (STACK, {"photometric": "minisblack", "metadata": {"axes": "ZYX"}}),
    "two channels": (STACK[:2], {**TILED, "metadata": {"axes": "CYX"}}),
    "times": (STACK, {**TILED, "metadata": {"axes": "TYX"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_window_of_a_tiff_is_that_part_of_the_picture_and_nothing_else_is_read(tmp_path, name):
    array, options = FILES[name]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, **options)
    data = path.read_bytes()
    expected = decode(data, kind_of(data))
    if expected.dtype == bool:
        expected = expected.astype(np.uint8) * np.uint8(255)
    with open_windows(path) as image:
        assert image.bounded
        assert image.shape == expected.shape[:2]
        for y0, x0, y1, x1 in WINDOWS:
            np.testing.assert_array_equal(image.read(Window(y0, x0, y1, x1)), expected[y0:y1, x0:x1])


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (COLOUR, {"photometric": "rgb", "planarconfig": "separate", "tile": (16, 16)}),
        (DEEP, {**TILED, "extratags": [(274, "H", 1, 6)]}),
        (STACK, {"photometric": "minisblack", "metadata": {"axes": "ZYX"}, "truncate": True}),
    ],
    ids=["separate samples", "turned", "one directory"],
)
def test_a_tiff_of_another_order_is_decoded_as_a_whole(tmp_path, array, options):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.moveaxis(array, -1, 0) if array is COLOUR else array, **options)
    data = path.read_bytes()
    expected = decode(data, kind_of(data))
    with open_windows(path) as image:
        assert not image.bounded
        assert image.shape == expected.shape[:2]
        np.testing.assert_array_equal(image.read(Window(3, 4, 40, 45)), expected[3:40, 4:45])


def test_a_png_is_decoded_once(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    with open_windows(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(image.read(Window(3, 4, 40, 45)), COLOUR[3:40, 4:45])


@pytest.mark.parametrize("name", FILES)
def test_the_range_is_that_of_read_image(tmp_path, name, monkeypatch):
    array, options = FILES[name]
    monkeypatch.setattr(windows, "_BAND_PX", 70 * 16)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    whole = store.read_image(tmp_path / "a.tif")
    with open_windows(tmp_path / "a.tif") as image:
        low, high, _ = intensities(image)
    assert (low, high) == pytest.approx((whole.low, whole.high), rel=1e-6)


def test_a_dim_image_is_shown_as_bright_as_the_whole_one(tmp_path):
    dim = RNG.integers(0, 60, (50, 70), dtype=np.uint8)
    Image.fromarray(dim).save(tmp_path / "a.png")
    with open_windows(tmp_path / "a.png") as image:
        low, _, shown = intensities(image)
    write_display(tmp_path / "a.png", tmp_path / "whole.png")
    assert write_display(tmp_path / "a.png", tmp_path / "part.png", between=(low, shown))
    one, other = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("whole", "part"))
    assert np.abs(one - other).max() <= 1
    assert one.max() > 200
    assert not write_display(tmp_path / "a.png", tmp_path / "part.png", between=(low, shown))
    assert write_display(tmp_path / "a.png", tmp_path / "part.png", between=(low, 255.0))


def test_one_value_and_numbers_that_are_none(tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", np.full((20, 20), 7, np.uint16), photometric="minisblack")
    with open_windows(tmp_path / "flat.tif") as image:
        assert intensities(image) == (7, 7, 7)
    broken = np.ones((20, 20), np.float32)
    broken[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", broken, photometric="minisblack")
    with open_windows(tmp_path / "nan.tif") as image, pytest.raises(ImageError, match="NaN or infinity in 1 places"):
        intensities(image)


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1j])
def test_a_part_with_numbers_that_are_none_is_refused_as_the_whole_is(tmp_path, odd):
    broken = np.ones((20, 20), np.complex64 if odd == 1j else np.float32)
    broken[3, 4] = odd
    tifffile.imwrite(tmp_path / "a.tif", broken, photometric="minisblack")
    for between in (None, (0.0, 2.0)):
        with pytest.raises(ImageError, match=r"a\.tif: (it holds NaN or infinity|its pixels are complex64)"):
            store.read_image(tmp_path / "a.tif", between)


@pytest.mark.parametrize("name", FILES)
def test_the_images_own_range_changes_nothing(tmp_path, name):
    array, options = FILES[name]
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    pixels, low, high = store.read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(store.read_image(tmp_path / "a.tif", (low, high)).pixels, pixels)


def test_a_large_tiff_is_described_part_by_part(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", DEEP, **TILED, compression="zlib")
    expected = store.describe(tmp_path / "a.tif", group="s")
    monkeypatch.setattr(store, "_LARGE_BYTES", 1)
    monkeypatch.setattr(store, "_load", None)
    assert store.describe(tmp_path / "a.tif", group="s") == expected
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\.tif: "):
        store.describe(tmp_path / "cut.tif")


def test_a_window_that_leaves_the_image_is_refused():
    windows.check_window((50, 70), Window(0, 0, 50, 70))
    with pytest.raises(InputError, match="is no part of an image of"):
        windows.check_window((50, 70), Window(0, 0, 51, 70))
