"""From the bytes of an image file to an array: what each format holds, made upright but not yet 8-bit.

What is read, by content and not by the file's name:

- PNG (1 to 16 bit; palette; grey, colour), JPEG (grey, colour, CMYK), BMP, TIFF (1 to 64 bit, whole numbers or floats).
- Alpha is dropped. EXIF and TIFF orientation is applied: pixels are upright.
- A TIFF of several planes becomes one picture, from its first series at full resolution: a stack in depth (axis Z), or
  of pages without a name, becomes its maximum along the stack; of time points and every other axis the first is taken;
  of channels (axis C, or samples beyond grey) the first three become red, green and blue; of two the blue stays 0.
- What is not 8-bit is scaled once, all channels alike: the 0.1 and 99.9 percentiles become 0 and 255, values beyond
  are clipped. Where the two percentiles are the same, minimum and maximum take their place; one value becomes 0.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any, Literal, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import BmpImagePlugin, ImageFile, JpegImagePlugin, PngImagePlugin

from loop.data.preprocess import percentiles_of_counts
from loop.errors import ImageError
from loop.types import UInt8Array

Raw = npt.NDArray[Any]
Kind = Literal["png", "jpeg", "bmp", "tiff"]

MAX_PIXELS = 2**28
MAX_BYTES = 2**32
LOWER, UPPER = 0.1, 99.9

_ORIENTATION = 0x0112
_SIGNATURES: dict[bytes, Kind] = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"BM": "bmp",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
    b"II+\x00": "tiff",
    b"MM\x00+": "tiff",
}
_UPRIGHT: dict[int, Callable[[Raw], Raw]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def kind_of(data: bytes) -> Kind:
    """The format of a file, from its first bytes.

    Raises:
        ImageError: it is none of the four that are read.
    """
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    raise ImageError(f"no PNG, JPEG, TIFF or BMP (it starts with {data[:8]!r}); convert it to PNG or TIFF")


def decode(data: bytes, kind: Kind, *, as_labels: bool = False) -> Raw:
    """Upright raw pixels of an image file.

    Args:
        data: the whole file.
        kind: as `kind_of` says.
        as_labels: a label image: a palette's indices are not turned into colours, planes are not joined and grey
            values not inverted.

    Returns:
        (H, W), (H, W, 2) or (H, W, 3) in the file's own dtype; with `as_labels` whatever number of axes the file has.

    Raises:
        ImageError: too large, truncated, or stored in a way that is not read. Decoders raise errors of their own too.
    """
    raw, orientation = _read_tiff(data, as_labels) if kind == "tiff" else _read_pillow(data, kind, as_labels)
    return _UPRIGHT[orientation](raw) if orientation in _UPRIGHT else raw


def probe_png(data: bytes, *, bits: int = 8) -> tuple[int, int, int] | None:
    """(H, W, C) of a sound PNG without orientation, from header and checksums; None: it has to be decoded.

    Args:
        data: the whole file.
        bits: a PNG of more bits a channel than this has to be decoded.

    Raises:
        ImageError: too large. Pillow's own errors (OSError, SyntaxError) where it is truncated or a checksum is wrong.
    """
    if len(data) < 26 or data[24] > bits or any(word in data for word in (b"eXIf", b"exif", b"Orientation")):
        return None
    image = _open_pillow(data, "png")
    width, height = image.size
    channels = 1 if image.mode in ("1", "L", "LA", "I;16") else 3
    image.verify()
    return height, width, channels


def to_uint8(raw: Raw, between: tuple[float, float] | None = None) -> tuple[UInt8Array, float, float]:
    """8-bit pixels of the same shape, and the raw intensities that became 0 and 255 (0 and 255 for 8-bit and 1-bit).

    Args:
        raw: pixels in the file's own dtype.
        between: the raw intensities that are to become 0 and 255, as those of a larger image that this is a part of;
            None = the image's own.

    Raises:
        ImageError: NaN, infinity or complex numbers.
    """
    if raw.dtype.kind not in "buif":
        raise ImageError(f"its pixels are {raw.dtype}; expected whole numbers or floats")
    wrong = raw.size - np.count_nonzero(np.isfinite(raw)) if raw.dtype.kind == "f" else 0
    if wrong:
        raise ImageError(f"it holds NaN or infinity in {wrong} places; replace them by numbers")
    if raw.dtype == np.bool_:
        raw = raw.astype(np.uint8) * np.uint8(255)
    if between is not None:
        return _scaled(raw.astype(np.float64), *between), *between
    if raw.dtype == np.uint8:
        return raw, 0.0, 255.0
    if raw.dtype == np.uint16:
        counts = np.zeros(65536, dtype=np.int64)
        for rows in np.array_split(raw, max(1, raw.size // 2**22)):
            counts += np.bincount(rows.ravel(), minlength=65536)
        low, high = percentiles_of_counts(counts, (LOWER, UPPER))
    else:
        low, high = (float(v) for v in np.percentile(raw, (LOWER, UPPER)))
    if low == high:
        low, high = float(raw.min()), float(raw.max())
    if raw.dtype == np.uint16:
        return _scaled(np.arange(65536, dtype=np.float64), low, high)[raw], low, high
    return _scaled(raw.astype(np.float64), low, high), low, high


def _scaled(values: npt.NDArray[np.float64], low: float, high: float) -> UInt8Array:
    if low == high:
        return np.zeros(values.shape, dtype=np.uint8)
    return (np.clip((values - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"the image is {height} x {width} px; expected at least one pixel")
    if height * width > MAX_PIXELS:
        raise ImageError(f"the image is {height} x {width} px, more than {MAX_PIXELS} in all; cut it into smaller ones")


def _open_pillow(data: bytes, kind: Kind) -> ImageFile.ImageFile:
    # Not Image.open: its own size check warns through a global setting, and any other format would be let in.
    image: ImageFile.ImageFile
    if kind == "png":
        image = PngImagePlugin.PngImageFile(BytesIO(data))
    elif kind == "jpeg":
        image = JpegImagePlugin.JpegImageFile(BytesIO(data))
    else:
        image = BmpImagePlugin.BmpImageFile(BytesIO(data))
    _check_size(image.size[1], image.size[0])
    return image


def _read_pillow(data: bytes, kind: Kind, as_labels: bool) -> tuple[Raw, int]:
    """Raw pixels as they lie in the file, and the orientation still to be applied."""
    image = _open_pillow(data, kind)
    image.load()
    orientation = int(image.getexif().get(_ORIENTATION, 1))
    if kind == "png" and data[24] == 16 and image.mode != "I;16":
        deep: Raw = imagecodecs.png_decode(data)
        return (deep[:, :, :3] if deep.shape[2] >= 3 else deep[:, :, 0]), orientation
    if image.mode in ("L", "I;16", "1") or (image.mode == "P" and as_labels):
        return np.asarray(image), orientation
    return np.asarray(image.convert("L" if image.mode == "LA" else "RGB")), orientation


class Layout(NamedTuple):
    """How the planes of a TIFF's first series are stored.

    `axes` names the planes' axes, `alpha` is the number of opacity samples, `photometric` and `colormap` are those of
    tifffile, `orientation` is still to be applied.
    """

    axes: str
    alpha: int
    photometric: int
    colormap: Raw | None
    orientation: int


def layout_of(series: Any, n_bytes: int) -> Layout:
    """The layout of a series of a TIFF of `n_bytes` bytes.

    Raises:
        ImageError: its pixels reach beyond the file's end, or its colours are stored in a way that is not read.
    """
    page = series.keyframe
    _check_stored(series, n_bytes)
    tag = page.tags.get(_ORIENTATION)
    return Layout(
        _axes(series),
        sum(int(extra) in (1, 2) for extra in page.extrasamples),
        page.photometric,
        page.colormap,
        int(tag.value) if tag is not None else 1,
    )


def to_picture(raw: Raw, layout: Layout) -> Raw:
    """(H, W) or (H, W, 2 or 3) of planes with named axes, not yet upright; the module's text gives the rule.

    Every pixel comes from the planes' values at its own place, so a part of the planes gives that part of the picture.
    """
    plane = _one_picture(raw, layout.axes, layout.alpha)
    if layout.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        return -plane if plane.dtype.kind == "f" else ~plane
    if layout.photometric == tifffile.PHOTOMETRIC.PALETTE and layout.colormap is not None:
        return np.moveaxis(np.asarray(layout.colormap)[:, plane] >> 8, 0, -1).astype(np.uint8)
    return plane


def _read_tiff(data: bytes, as_labels: bool) -> tuple[Raw, int]:
    """As `_read_pillow`, of the first series."""
    with tifffile.TiffFile(BytesIO(data)) as file:
        if not file.series:
            raise ImageError("there is no image in this TIFF")
        series = file.series[0]
        layout = layout_of(series, len(data))
        _check_size(series.shape[layout.axes.index("Y")], series.shape[layout.axes.index("X")])
        if series.nbytes > MAX_BYTES:
            raise ImageError(f"its {layout.axes} stack of {series.shape} is larger than {MAX_BYTES} bytes; cut it up")
        raw = np.asarray(series.asarray())
    if as_labels:
        single = tuple(i for i, axis in enumerate(layout.axes) if axis not in "YX" and raw.shape[i] == 1)
        return raw.squeeze(single), layout.orientation
    return to_picture(raw, layout), layout.orientation


def _axes(series: Any) -> str:
    """The series' axes; a colour image that was written as pages of its rows is seen for what it is."""
    axes, shape = str(series.axes), series.shape
    if axes[-3:] in ("QYX", "IYX") and 2 <= shape[-1] <= 4 < min(shape[-3], shape[-2]):
        return axes[:-3] + "YXS"
    return axes


def _check_stored(series: Any, n_bytes: int) -> None:
    page, known = series.keyframe, tifffile.PHOTOMETRIC
    if series.dataoffset is not None:
        end = series.dataoffset + series.nbytes
    else:
        pages = [p for p in series.pages if p is not None]
        end = max(o + c for p in pages for o, c in zip(p.dataoffsets, p.databytecounts, strict=True))
    if end > n_bytes:
        raise ImageError(f"its pixels reach to byte {end} but it ends at byte {n_bytes}: truncated; copy it again")
    jpeg = page.compression == tifffile.COMPRESSION.JPEG
    if page.photometric not in (known.MINISWHITE, known.MINISBLACK, known.RGB, known.PALETTE) and not (
        jpeg and page.photometric == known.YCBCR
    ):
        raise ImageError(f"its colours are stored as {page.photometric!r}; write it as grey or RGB")


def _one_picture(raw: Raw, axes: str, alpha: int) -> Raw:
    """(H, W) or (H, W, 2 or 3) of planes with named axes."""
    colour = "S" if "S" in axes else "C"
    for place in reversed(range(raw.ndim)):
        axis = axes[place]
        if axis in ("Y", "X", colour):
            continue
        raw = raw.max(axis=place) if axis in "ZQI" else raw.take(0, axis=place)
        axes = axes[:place] + axes[place + 1 :]
    if colour not in axes:
        return raw
    raw = np.moveaxis(raw, axes.index(colour), -1)
    n = raw.shape[-1] - (alpha if colour == "S" else 0)
    return raw[..., 0] if n <= 1 else raw[..., : min(n, 3)]
