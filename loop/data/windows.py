"""Parts of a large image without the whole of it in memory, where its format allows that.

A TIFF whose pages are stored uncompressed, in tiles or in strips gives a window by reading just the parts that it lies
in. Every other image (PNG, JPEG, BMP; a TIFF that is turned, of separate samples, of JPEG colours, of planes behind
each other without a directory each, or compressed in strips of more than 16 million px) is decoded once and kept until
it is closed.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tifffile

from loop.data.decode import LOWER, UPPER, Layout, Raw, decode, kind_of, layout_of, to_picture
from loop.data.preprocess import Window, percentiles_of_counts
from loop.errors import ImageError, InputError

EYES_PCT, DIM, BRIGHT = 99.8, 128.0, 220.0
"""An image whose 99.8th percentile lies below 128 is shown with that percentile at 220."""

_BAND_PX = 2**24
_SAMPLE = 2**22


@dataclass(frozen=True)
class Windows:
    """An open image: `shape` (H, W) upright, and `read`, which gives a window as the raw pixels of `decode`.

    `bounded` says that a window costs memory for itself and little more; False: the whole image is in memory. 1-bit
    pixels come as 0 and 255.
    """

    shape: tuple[int, int]
    read: Callable[[Window], Raw]
    bounded: bool

    @property
    def bands(self) -> list[Window]:
        """Windows of the full width, about 16 million px each, that are the image from top to bottom."""
        height, width = self.shape
        rows = max(1, _BAND_PX // width)
        return [Window(y, 0, min(y + rows, height), width) for y in range(0, height, rows)]


class Intensities(NamedTuple):
    """Raw intensities of a whole image: `low` and `high` become 0 and 255 for a network, as `read_image` has it.

    `shown` is what the eye sees as 255 and 0 stays `low`: less than `high` where the image is dim.
    """

    low: float
    high: float
    shown: float


@contextmanager
def open_windows(path: Path) -> Iterator[Windows]:
    """The image of a file, window by window; what the decoders raise passes through.

    Raises:
        ImageError: no image of a kind that is read, truncated, or too large for one that has to be decoded as a whole.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(16)
    kind = kind_of(start)
    if kind != "tiff":
        yield _whole(path)
        return
    with tifffile.TiffFile(path) as file:
        if not file.series:
            raise ImageError("there is no image in this TIFF")
        series = file.series[0]
        layout = layout_of(series, path.stat().st_size)
        streamed = _streamed(series, layout)
        if streamed is not None:
            yield streamed
    if streamed is None:
        yield _whole(path)


def intensities(image: Windows) -> Intensities:
    """The range of an image's intensities, in one pass over it.

    Of 8 and 16 bits every pixel counts. Of other numbers a grid of about four million values is taken, every pixel of
    smaller images; their smallest and largest are exact.

    Raises:
        ImageError: NaN, infinity or complex numbers.
    """
    counts: npt.NDArray[np.int64] | None = None
    some: list[Raw] = []
    step = math.ceil(math.sqrt(max(1.0, image.shape[0] * image.shape[1] / _SAMPLE)))
    least, most, wrong = math.inf, -math.inf, 0
    for band in image.bands:
        raw = image.read(band)
        if raw.dtype in (np.uint8, np.uint16):
            counts = _add_counts(counts, raw)
        elif raw.dtype.kind in "uif":
            wrong += raw.size - int(np.count_nonzero(np.isfinite(raw)))
            least, most = min(least, float(raw.min())), max(most, float(raw.max()))
            some.append(raw[-band.y0 % step :: step, ::step].copy())
        else:
            raise ImageError(f"its pixels are {raw.dtype}; expected whole numbers or floats")
    if wrong:
        raise ImageError(f"it holds NaN or infinity in {wrong} places; replace them by numbers")
    if counts is not None:
        low, high, bright = percentiles_of_counts(counts, (LOWER, UPPER, EYES_PCT))
        (values,) = np.nonzero(counts)
        least, most = float(values[0]), float(values[-1])
        if len(counts) == 256:
            low, high, least, most = 0.0, 255.0, 0.0, 255.0
    else:
        low, high, bright = (
            float(v) for v in np.percentile(np.concatenate([part.ravel() for part in some]), (LOWER, UPPER, EYES_PCT))
        )
    if low == high:
        low, high = least, most
    return Intensities(low, high, _shown(low, high, bright))


def _add_counts(counts: npt.NDArray[np.int64] | None, raw: Raw) -> npt.NDArray[np.int64]:
    """How often each value occurs, up to now and in `raw`, uint8 or uint16."""
    size = np.iinfo(raw.dtype).max + 1
    total = np.zeros(size, np.int64) if counts is None else counts
    for rows in np.array_split(raw, max(1, raw.size // _SAMPLE)):
        total = total + np.bincount(rows.ravel(), minlength=size)
    return total


def _shown(low: float, high: float, bright: float) -> float:
    """The intensity that is shown as 255 where the image's EYES_PCT percentile is `bright`."""
    if high <= low:
        return high
    seen = 255 * (min(bright, high) - low) / (high - low)
    return high if seen <= 0 or seen >= DIM else low + (high - low) * seen / BRIGHT


def _whole(path: Path) -> Windows:
    data = path.read_bytes()
    pixels = _bytes_of_bits(decode(data, kind_of(data)))

    def read(window: Window) -> Raw:
        y0, x0, y1, x1 = window
        return pixels[y0:y1, x0:x1]

    return Windows((pixels.shape[0], pixels.shape[1]), read, bounded=False)


def _streamed(series: Any, layout: Layout) -> Windows | None:
    """The windows of a TIFF that can be read in parts; None where it has to be decoded as a whole."""
    page = series.keyframe
    plain = page.axes in ("YX", "YXS") and layout.axes == series.axes and layout.axes.endswith(page.axes)
    if not plain or layout.orientation != 1 or page.photometric == tifffile.PHOTOMETRIC.YCBCR:
        return None
    if not page.is_memmappable and math.prod(page.chunks[:2]) > _BAND_PX:
        return None
    leading = series.shape[: -len(page.axes)]
    if len(series.pages) != math.prod(leading) or any(one is None for one in series.pages):
        return None

    def read(window: Window) -> Raw:
        planes = [_read_page(one, window) for one in series.pages]
        return _bytes_of_bits(to_picture(np.stack(planes).reshape(*leading, *planes[0].shape), layout))

    return Windows((page.imagelength, page.imagewidth), read, bounded=True)


def _read_page(page: Any, window: Window) -> Raw:
    """A window of one page of axes YX or YXS."""
    y0, x0, y1, x1 = window
    if page.is_memmappable:
        return np.array(page.asarray(out="memmap")[y0:y1, x0:x1])
    first = page.keyframe
    height, width = first.chunks[:2]
    per_row = first.chunked[1]
    numbers = [
        row * per_row + column
        for row in range(y0 // height, (y1 - 1) // height + 1)
        for column in range(x0 // width, (x1 - 1) // width + 1)
    ]
    samples = first.shape[2:]
    found: Raw = np.full((y1 - y0, x1 - x0, *samples), first.nodata, first.dtype)
    offsets, sizes = ([where[i] for i in numbers] for where in (page.dataoffsets, page.databytecounts))
    stored = page.parent.filehandle.read_segments(offsets, sizes, indices=numbers)
    for data, number in stored:
        segment = first.decode(data, number, jpegtables=page.jpegtables)[0]
        if segment is None:
            continue
        part = segment[0].reshape(segment.shape[1:] if samples else segment.shape[1:3])
        top, left = number // per_row * height, number % per_row * width
        a, b = max(top, y0), max(left, x0)
        part = part[a - top : max(y1 - top, 0), b - left : max(x1 - left, 0)]
        found[a - y0 : a - y0 + part.shape[0], b - x0 : b - x0 + part.shape[1]] = part
    return found


def _bytes_of_bits(raw: Raw) -> Raw:
    return raw.astype(np.uint8) * np.uint8(255) if raw.dtype == np.bool_ else raw


def check_window(shape: tuple[int, int], window: Window) -> None:
    """Refuses a window that is empty or leaves the image.

    Raises:
        InputError: names both.
    """
    y0, x0, y1, x1 = window
    if not (0 <= y0 < y1 <= shape[0] and 0 <= x0 < x1 <= shape[1]):
        raise InputError(f"{window} is no part of an image of {shape} (H, W); the file has changed: restore it")
