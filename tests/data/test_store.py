import logging
import struct
import zlib
from io import BytesIO

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from loop.data import decode, display, store
from loop.errors import ImageError, LabelError, ShapeError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = RNG.integers(300, 3000, (20, 30), dtype=np.uint16)
TIFF = {"photometric": "minisblack", "metadata": None}


def _tiff(path, array, **options):
    tifffile.imwrite(path, array, **options)
    return path


def _scaled(raw, low, high):
    return np.floor(np.clip((raw.astype(float) - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bit_pixels_come_back_as_they_are(tmp_path, suffix, pixels):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    image = store.read_image(path)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous
    np.testing.assert_array_equal(image.pixels, pixels.reshape(20, 30, -1))
    assert (image.low, image.high) == (0, 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_read_close_to_what_was_written(tmp_path, mode):
    smooth = np.fromfunction(lambda y, x: 5 * y + 4 * x, (20, 30)).astype(np.uint8)
    Image.fromarray(smooth).convert("RGB").convert(mode).save(tmp_path / "a.jpg", quality=95)
    pixels = store.read_image(tmp_path / "a.jpg").pixels
    assert pixels.shape == (20, 30, 1 if mode == "L" else 3)
    assert np.abs(pixels.astype(int) - smooth[:, :, None]).max() <= 8


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path, format="BMP")
    np.testing.assert_array_equal(store.read_image(path).pixels[:, :, 0], GREY)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path, mode):
    base = COLOUR if mode == "RGBA" else GREY
    alpha = RNG.integers(0, 256, (20, 30, 1), dtype=np.uint8)
    Image.fromarray(np.dstack([base, alpha])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(store.read_image(tmp_path / "a.png").pixels, base.reshape(20, 30, -1))


def test_palette_and_one_bit_png(tmp_path):
    index = Image.fromarray((GREY // 64).astype(np.uint8)).convert("P")
    index.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    index.save(tmp_path / "p.png")
    table = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120], np.uint8).reshape(4, 3)
    np.testing.assert_array_equal(store.read_image(tmp_path / "p.png").pixels, table[GREY // 64])
    np.testing.assert_array_equal(store.read_label_image(tmp_path / "p.png"), GREY // 64)
    Image.fromarray(GREY > 127).save(tmp_path / "b.png")
    np.testing.assert_array_equal(store.read_image(tmp_path / "b.png").pixels[:, :, 0], np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("colour", [False, True])
def test_sixteen_bit_is_scaled_once_by_its_percentiles(tmp_path, suffix, colour):
    raw = np.dstack([DEEP, DEEP // 2, DEEP // 3]) if colour else DEEP
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        path.write_bytes(imagecodecs.png_encode(raw))
    else:
        _tiff(path, raw, photometric="rgb" if colour else "minisblack")
    image = store.read_image(path)
    low, high = np.percentile(raw, [0.1, 99.9])
    assert (image.low, image.high) == pytest.approx((low, high), abs=1e-9)
    np.testing.assert_array_equal(image.pixels, _scaled(raw, low, high).reshape(20, 30, -1))


def test_sixteen_bit_png_with_alpha(tmp_path):
    rgba = np.dstack([DEEP, DEEP // 2, DEEP // 3, np.full_like(DEEP, 65535)])
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(rgba))
    assert store.read_image(tmp_path / "a.png").high == pytest.approx(np.percentile(rgba[:, :, :3], 99.9))
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(rgba[:, :, [0, 3]])))
    image = store.read_image(tmp_path / "b.png")
    assert image.pixels.shape == (20, 30, 1)
    assert image.high == pytest.approx(np.percentile(DEEP, 99.9))


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.int32, np.float16, np.float32, np.float64])
def test_any_number_type_of_a_tiff_is_scaled(tmp_path, dtype):
    raw = DEEP.astype(dtype) - dtype(1000) if np.dtype(dtype).kind != "u" else DEEP.astype(dtype)
    image = store.read_image(_tiff(tmp_path / "a.tif", raw, **TIFF))
    low, high = np.percentile(raw, [0.1, 99.9])
    assert (image.low, image.high) == pytest.approx((float(low), float(high)), rel=1e-3)
    expected = _scaled(raw, image.low, image.high)
    assert np.abs(image.pixels[:, :, 0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_constant_deep_image_is_black_and_a_rare_mark_is_not_lost(tmp_path, dtype):
    flat = np.full((40, 50), 700, dtype)
    image = store.read_image(_tiff(tmp_path / "flat.tif", flat, **TIFF))
    assert not image.pixels.any()
    assert (image.low, image.high) == (700, 700)
    flat[3, 4] = 900
    image = store.read_image(_tiff(tmp_path / "mark.tif", flat, **TIFF))
    assert (image.low, image.high) == (700, 900)
    assert image.pixels[3, 4, 0] == 255
    assert image.pixels.sum() == 255


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, {"compression": "deflate", "tile": (16, 16)}])
def test_compressed_and_tiled_tiffs(tmp_path, options):
    path = _tiff(tmp_path / "a.tif", COLOUR, photometric="rgb", **options)
    np.testing.assert_array_equal(store.read_image(path).pixels, COLOUR)


def test_tiff_with_alpha_palette_inverted_grey_and_bits(tmp_path):
    rgba = np.dstack([COLOUR, GREY])
    path = _tiff(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(store.read_image(path).pixels, COLOUR)
    path = _tiff(tmp_path / "white.tif", GREY, photometric="miniswhite")
    np.testing.assert_array_equal(store.read_image(path).pixels[:, :, 0], 255 - GREY)
    table = RNG.integers(0, 65536, (3, 256), dtype=np.uint16)
    path = _tiff(tmp_path / "table.tif", GREY, photometric="palette", colormap=table)
    np.testing.assert_array_equal(store.read_image(path).pixels, np.moveaxis(table[:, GREY] >> 8, 0, -1))
    path = _tiff(tmp_path / "bits.tif", GREY > 99, photometric="minisblack")
    np.testing.assert_array_equal(store.read_image(path).pixels[:, :, 0], np.where(GREY > 99, 255, 0))


STACK = RNG.integers(0, 256, (5, 20, 30), dtype=np.uint8)
PLANES = {
    "pages without a name: maximum": (STACK, TIFF, STACK.max(0)[:, :, None]),
    "depth: maximum": (STACK, {"imagej": True, "metadata": {"axes": "ZYX"}}, STACK.max(0)[:, :, None]),
    "time: first": (STACK, {"imagej": True, "metadata": {"axes": "TYX"}}, STACK[0][:, :, None]),
    "five channels: first three": (
        STACK,
        {"imagej": True, "metadata": {"axes": "CYX"}},
        np.moveaxis(STACK[:3], 0, -1),
    ),
    "two channels: red and green": (
        STACK[:2],
        {"imagej": True, "metadata": {"axes": "CYX"}},
        np.dstack([STACK[0], STACK[1], np.zeros_like(STACK[0])]),
    ),
    "one channel: grey": (STACK[:1], {"ome": True, "metadata": {"axes": "CYX"}}, STACK[0][:, :, None]),
    "depth and channels": (
        np.stack([STACK, STACK[::-1] // 2], axis=1),
        {"imagej": True, "metadata": {"axes": "ZCYX"}},
        np.dstack([STACK.max(0), (STACK // 2).max(0), np.zeros_like(STACK[0])]),
    ),
    "planar colour": (STACK[:3], {"photometric": "rgb", "planarconfig": "separate"}, np.moveaxis(STACK[:3], 0, -1)),
    "colour as pages of rows": (COLOUR, {"photometric": "minisblack"}, COLOUR),
}


@pytest.mark.parametrize("name", PLANES)
def test_planes_of_a_tiff_become_one_picture(tmp_path, name):
    array, options, expected = PLANES[name]
    np.testing.assert_array_equal(store.read_image(_tiff(tmp_path / "a.tif", array, **options)).pixels, expected)


def _marked():
    """A picture with a mark in its top left quarter, and where its centroid (row, col) must land."""
    picture = np.zeros((24, 36), np.uint8)
    picture[2:6, 4:10] = 250
    return picture, (3.5, 6.5)


def _centroid(pixels):
    rows, cols = np.nonzero(pixels[:, :, 0] > 125)
    return rows.mean(), cols.mean()


# How a camera stores an upright picture, by orientation: the inverse of the transform that a viewer applies (EXIF 2.3,
# table 4: where row 0 and column 0 of the stored picture lie in the upright one).
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_mark_lands_where_a_viewer_shows_it(tmp_path, suffix, orientation):
    upright, centre = _marked()
    stored = np.ascontiguousarray(STORED[orientation](upright))
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    if suffix == "tif":
        _tiff(path, stored, extratags=[(274, "H", 1, orientation, True)], **TIFF)
    else:
        Image.fromarray(stored).save(path, exif=exif)
    image = store.read_image(path)
    assert image.pixels.shape == (24, 36, 1)
    assert _centroid(image.pixels) == pytest.approx(centre, abs=0.3)
    ref = store.describe(path)
    assert (ref.height, ref.width, ref.channels) == (24, 36, 1)
    display.write_display(path, tmp_path / "display.png")
    shown = Image.open(tmp_path / "display.png")
    assert not shown.getexif()
    assert _centroid(np.asarray(shown)[:, :, None]) == pytest.approx(centre, abs=0.3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    np.testing.assert_array_equal(store.read_image(tmp_path / "a.png").pixels, expected)


def _chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _bomb():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _bytes_of(kind, pixels=COLOUR):
    buffer = BytesIO()
    if kind == "TIFF":
        tifffile.imwrite(buffer, pixels, photometric="rgb")
    elif kind == "TIFF lzw":
        tifffile.imwrite(buffer, pixels, photometric="rgb", compression="lzw")
    else:
        Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _cut(data):
    return data[: len(data) * 2 // 3]


BROKEN = {
    "empty.png": (b"", "empty"),
    "text.png": (b"this is no image at all", "no PNG, JPEG, TIFF or BMP"),
    "picture.gif": (b"GIF89a" + b"\0" * 20, "no PNG, JPEG, TIFF or BMP"),
    "cut.png": (_cut(_bytes_of("PNG")), "truncated"),
    "header.png": (_bytes_of("PNG")[:20], "corrupt"),
    "flipped.png": (_bytes_of("PNG")[:200] + b"\x00\xff" + _bytes_of("PNG")[202:], "corrupt"),
    "cut.jpg": (_cut(_bytes_of("JPEG")), "truncated"),
    "cut.bmp": (_cut(_bytes_of("BMP")), "truncated"),
    "cut.tif": (_bytes_of("TIFF")[:-200], "truncated"),
    "cut_lzw.tif": (_bytes_of("TIFF lzw")[:-200], "truncated"),
    "header.tif": (_bytes_of("TIFF")[:6], "corrupt"),
    "bomb.png": (_bomb(), "100000 x 100000"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("reader", [store.read_image, store.describe])
def test_a_bad_file_is_named_with_its_reason(tmp_path, caplog, name, reader):
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with caplog.at_level(logging.CRITICAL), pytest.raises(ImageError, match=reason) as refusal:
        reader(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)
    assert str(refusal.value).count(name) == 1


def test_a_missing_file_a_folder_and_a_huge_file(tmp_path, monkeypatch):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            store.read_image(path)
    with pytest.raises(ImageError, match="cannot be read"):
        store.file_sha256(tmp_path / "none.png")
    Image.fromarray(GREY).save(tmp_path / "a.png")
    monkeypatch.setattr(store, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match="more than 10"):
        store.read_image(tmp_path / "a.png")


def test_a_tiff_that_cannot_be_a_picture(tmp_path, monkeypatch):
    raw = DEEP.astype(np.float32)
    raw[2, 3] = np.nan
    with pytest.raises(ImageError, match=r"nan\.tif.*NaN or infinity in 1 places"):
        store.read_image(_tiff(tmp_path / "nan.tif", raw, **TIFF))
    with pytest.raises(ImageError, match="complex64"):
        store.read_image(_tiff(tmp_path / "complex.tif", DEEP.astype(np.complex64), **TIFF))
    lab = _tiff(tmp_path / "lab.tif", COLOUR, photometric="cielab")
    with pytest.raises(ImageError, match="grey or RGB"):
        store.read_image(lab)
    stack = _tiff(tmp_path / "stack.tif", STACK, **TIFF)
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    with pytest.raises(ImageError, match="stack"):
        store.read_image(stack)


def test_describe_knows_the_file_without_its_pixels(tmp_path):
    path = tmp_path / "well A1.png"
    Image.fromarray(COLOUR).save(path)
    ref = store.describe(path, group="g", split="pool", modality="m", extra={"k": "v"})
    assert (ref.image_id, ref.path, ref.height, ref.width, ref.channels) == ("well A1", path, 20, 30, 3)
    assert (ref.group, ref.split, ref.modality, ref.extra, ref.low, ref.high) == (
        "g",
        "pool",
        "m",
        {"k": "v"},
        0,
        255,
    )
    assert ref.sha256 == store.file_sha256(path)
    assert len(ref.sha256) == 64


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_describe_agrees_with_read_image(tmp_path, mode):
    path = tmp_path / "a.png"
    image = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(COLOUR).convert(mode)
    image.save(path)
    ref, read = store.describe(path), store.read_image(path)
    assert (ref.height, ref.width, ref.channels, ref.low, ref.high) == (*read.pixels.shape, read.low, read.high)


def test_display_is_eight_bit_made_once_and_leaves_the_original_alone(tmp_path):
    original, target = tmp_path / "a.tif", tmp_path / "display" / "p" / "a.png"
    _tiff(original, DEEP, **TIFF)
    before = original.read_bytes()
    assert display.write_display(original, target) is True
    shown = Image.open(target)
    assert shown.mode == "L"
    np.testing.assert_array_equal(np.asarray(shown), store.read_image(original).pixels[:, :, 0])
    assert original.read_bytes() == before
    stamp = target.stat().st_mtime_ns
    assert display.write_display(original, target) is False
    assert display.write_display(original, target, sha256=store.file_sha256(original)) is False
    assert target.stat().st_mtime_ns == stamp
    _tiff(original, DEEP[::-1], **TIFF)
    assert display.write_display(original, target) is True
    np.testing.assert_array_equal(np.asarray(Image.open(target)), store.read_image(original).pixels[:, :, 0])
    target.write_bytes(b"half a")
    assert display.write_display(original, target) is True
    assert [p.name for p in target.parent.iterdir()] == ["a.png"]


def test_a_display_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match="cannot be written"):
        display.write_display(tmp_path / "a.png", tmp_path / "file" / "a.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(ImageError, match="No space left"):
        display.write_display(tmp_path / "a.png", tmp_path / "out" / "a.png")
    assert list((tmp_path / "out").iterdir()) == []


def test_write_png_refuses_other_arrays(tmp_path):
    for wrong in (np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.float32), np.zeros((4, 4, 3), np.uint16)):
        with pytest.raises(ShapeError, match="expected uint8"):
            store.write_png(wrong, tmp_path / "a.png")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([5, 300, 65535]))
def test_label_images_survive_the_disk(tmp_path_factory, seed, highest):
    labels = np.random.default_rng(seed).integers(0, highest + 1, (9, 13)).astype(np.int32)
    path = tmp_path_factory.mktemp("labels") / "a.png"
    store.write_label_image(labels, path)
    back = store.read_label_image(path)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.float32, np.bool_])
def test_tiff_labels_of_any_type_that_holds_whole_numbers(tmp_path, dtype):
    labels = np.zeros((9, 13), dtype)
    labels[2:4, 5:7] = 1
    options = {} if dtype == np.bool_ else TIFF
    np.testing.assert_array_equal(store.read_label_image(_tiff(tmp_path / "a.tif", labels, **options)), labels)
    np.testing.assert_array_equal(store.read_label_image(_tiff(tmp_path / "b.tif", labels[None], **options)), labels)


def test_what_is_no_label_image(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.jpg")
    with pytest.raises(LabelError, match=r"a\.jpg: a JPEG changes label numbers"):
        store.read_label_image(tmp_path / "a.jpg")
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    with pytest.raises(LabelError, match="one plane"):
        store.read_label_image(tmp_path / "a.png")
    for bad in (DEEP.astype(np.int16) - 2000, DEEP.astype(np.float32) + 0.5, DEEP.astype(np.float32) * np.nan):
        with pytest.raises(LabelError, match="expected 0, 1, 2"):
            store.read_label_image(_tiff(tmp_path / "a.tif", bad, **TIFF))
    with pytest.raises(LabelError, match="one plane"):
        store.read_label_image(_tiff(tmp_path / "s.tif", STACK, **TIFF))
    with pytest.raises(LabelError, match="16 bits hold"):
        store.write_label_image(np.array([[70000]], np.int32), tmp_path / "b.png")


def test_a_dim_image_is_shown_brighter_and_a_bright_one_as_it_is(tmp_path):
    dim = np.zeros((20, 20, 3), np.uint8)
    dim[5:15, 5:15] = (10, 18, 4)
    bright = dim * 12
    for name, pixels in {"dim": dim, "bright": bright}.items():
        store.write_png(pixels, tmp_path / f"{name}.png")
        display.write_display(tmp_path / f"{name}.png", tmp_path / "shown" / f"{name}.png")
    shown = store.read_image(tmp_path / "shown" / "dim.png").pixels
    assert tuple(shown[10, 10]) == (122, 220, 48)  # 220 / 18 = 12.2 for every channel
    np.testing.assert_array_equal(store.read_image(tmp_path / "shown" / "bright.png").pixels, bright)
    np.testing.assert_array_equal(store.read_image(tmp_path / "dim.png").pixels, dim)
