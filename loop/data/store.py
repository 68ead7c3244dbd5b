"""The only reader and writer of image files: whatever a microscope writes in, 8-bit pixels and PNG out.

Which formats are read, and how a stack or 16 bits become one 8-bit picture, is written at the top of
loop/data/decode.py. Originals are only ever read; what is written appears whole or not at all.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, PngImagePlugin

from loop.data.decode import MAX_BYTES, Kind, decode, kind_of, probe_png, to_uint8
from loop.data.preprocess import Window
from loop.data.windows import intensities, open_windows
from loop.errors import ImageError, LabelError, LoopError, ShapeError
from loop.types import ImageRef, IntArray, UInt8Array

LayerArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_ORIENTATION = 0x0112
_TIFF_SUFFIXES = (".tif", ".tiff")
_LARGE_BYTES = 2**26


class StoredImage(NamedTuple):
    """An upright 8-bit image and the raw intensities that became 0 and 255.

    `pixels` is (H, W, C) uint8, C in {1, 3}; `low` and `high` are 0 and 255 where the file was 8-bit already.
    """

    pixels: UInt8Array
    low: float
    high: float


def read_image(path: Path, between: tuple[float, float] | None = None) -> StoredImage:
    """The pixels of an image file, upright and 8-bit; loop/data/decode.py says how each kind is read.

    Args:
        path: the file.
        between: the raw intensities that are to become 0 and 255; None = the image's own.

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt, of a kind that is not read, holds NaN or infinity,
            or is larger than 2**28 px; the text names the file and the reason.
    """
    data = _load(path)
    with naming(path):
        return _decode(data, kind_of(data), between)


def describe(path: Path, **meta: Any) -> ImageRef:
    """What is known of an image without keeping its pixels; `image_id` is the file's stem.

    An 8-bit PNG is checked by its header and checksums, every other file by decoding it; a large TIFF part by part,
    which may have more pixels than `read_image` takes.

    Args:
        path: an image file.
        **meta: further fields of ImageRef (group, split, modality, label_path, extra).

    Raises:
        ImageError: as `read_image`.
    """
    probed = _probe_large(path)
    if probed is not None:
        (shape, low, high), sha256 = probed, file_sha256(path)
    else:
        data = _load(path)
        sha256 = hashlib.sha256(data).hexdigest()
        with naming(path):
            shape, low, high = _probe(data, kind_of(data))
    return ImageRef(
        image_id=path.stem,
        path=path,
        sha256=sha256,
        height=shape[0],
        width=shape[1],
        channels=shape[2],
        low=low,
        high=high,
        **meta,
    )


_Probed = tuple[tuple[int, int, int], float, float]


def _probe(data: bytes, kind: Kind) -> _Probed:
    """(H, W, C), and the intensities that become 0 and 255."""
    shape = probe_png(data) if kind == "png" else None
    if shape is not None:
        return shape, 0.0, 255.0
    pixels, low, high = _decode(data, kind)
    return (pixels.shape[0], pixels.shape[1], pixels.shape[2]), low, high


def _probe_large(path: Path) -> _Probed | None:
    """As `_probe` of a large TIFF, read part by part; None for files that are small or not to be read so."""
    if not path.is_file() or path.stat().st_size < _LARGE_BYTES or path.suffix.lower() not in _TIFF_SUFFIXES:
        return None
    with naming(path), open_windows(path) as image:
        if not image.bounded:
            return None
        low, high, _ = intensities(image)
        corner = image.read(Window(0, 0, 1, 1))
        return (*image.shape, 1 if corner.ndim == 2 else 3), low, high


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hex digits.

    Raises:
        ImageError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def write_png(pixels: npt.NDArray[Any], target: Path, *, info: PngImagePlugin.PngInfo | None = None) -> None:
    """Writes a PNG whole or not at all, over an older one.

    Args:
        pixels: (H, W), (H, W, 1) or (H, W, 3) uint8, or (H, W) uint16.
        target: the file; its folder is made.
        info: text to be kept in the file.

    Raises:
        ShapeError: `pixels` is of another shape or dtype.
        ImageError: the file cannot be written (no right, disk full).
    """
    flat = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    grey, colour = flat.ndim == 2, flat.ndim == 3 and flat.shape[2] == 3
    if not (grey and flat.dtype in (np.uint8, np.uint16)) and not (colour and flat.dtype == np.uint8):
        raise ShapeError(f"a PNG of {pixels.shape} {pixels.dtype}; expected uint8 (H, W[, 1 or 3]) or uint16 (H, W)")
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(flat)).save(buffer, "PNG", compress_level=1, pnginfo=info)
    write_whole(target, buffer)


def read_label_image(path: Path) -> IntArray:
    """A label image as it lies in a file: (H, W) int32, 0 = background, upright.

    PNG (grey or palette, up to 16 bit), BMP and TIFF (whole numbers, one plane) are read; a palette's indices are the
    labels. JPEG is refused: it changes the numbers.

    Raises:
        LabelError: the file holds colours, fractions, negative numbers or several planes, or is a JPEG.
        ImageError: the file cannot be read (see `read_image`).
    """
    data = _load(path)
    with naming(path):
        return _one_plane(data)


def read_label_layers(path: Path) -> LayerArray:
    """The layers of a label file, (L, H, W), 0 = background: one for each page of a TIFF, else one.

    A value is one cell, on whichever page it lies; cells of different pages may overlap. A file of one page is read as
    `read_label_image` reads it. Reduced copies of a page (previews) are no layers.

    Returns:
        uint16, or uint32 where a value lies above 65535; L >= 1.

    Raises:
        LabelError: as `read_label_image`; pages of different sizes, of colour or with an orientation; a value that
            lies on two pages.
        ImageError: the file cannot be read, or some of its pages are missing.
    """
    data = _load(path)
    with naming(path):
        pages = _tiff_pages(data) if kind_of(data) == "tiff" else []
        layers = np.stack(pages) if len(pages) > 1 else _one_plane(data)[None]
        _check_values(layers)
    return layers.astype(np.uint16) if layers.max() <= 65535 else layers.astype(np.uint32)


def label_shape(path: Path) -> tuple[int, int]:
    """(H, W) of a label file; a grey PNG is checked by its header and checksums, every other file by decoding it.

    Raises:
        LabelError, ImageError: as `read_label_layers`; what the numbers of a grey PNG are is not looked at.
    """
    data = _load(path)
    with naming(path):
        quick = probe_png(data, bits=16) if kind_of(data) == "png" else None
    if quick is not None and quick[2] == 1:
        return quick[:2]
    _, height, width = read_label_layers(path).shape
    return height, width


def write_label_image(labels: IntArray, target_png: Path) -> None:
    """Writes a label image as 16-bit PNG, whole or not at all.

    Args:
        labels: (H, W) whole numbers in 0 .. 65535.
        target_png: the file; its folder is made.

    Raises:
        LabelError: a label does not fit into 16 bits.
        ImageError: the file cannot be written.
    """
    if labels.size and (labels.min() < 0 or labels.max() > 65535):
        raise LabelError(f"labels from {labels.min()} to {labels.max()} for {target_png}; 16 bits hold 0 to 65535")
    write_png(labels.astype(np.uint16), target_png)


def write_label_layers(layers: npt.NDArray[np.integer], target_tif: Path) -> None:
    """Writes layers as a TIFF with one compressed page each, 16-bit or, for values above 65535, 32-bit; whole or not.

    Args:
        layers: (L, H, W) whole numbers in 0 .. 2**31 - 1, L, H, W >= 1; a value lies on one page only.
        target_tif: the file; its folder is made.

    Raises:
        LabelError: another shape, a value out of the range, or one that lies on two pages.
        ImageError: the file cannot be written.
    """
    with naming(target_tif):
        if layers.ndim != 3 or not layers.size or layers.min() < 0 or layers.max() >= 2**31:
            raise LabelError(f"layers of shape {layers.shape}; expected (L, H, W) with values from 0 to 2**31 - 1")
        _check_values(layers)
    buffer, dtype = BytesIO(), np.uint16 if layers.max() <= 65535 else np.uint32
    with tifffile.TiffWriter(buffer) as file:
        for page in layers.astype(dtype):
            file.write(page, photometric="minisblack", compression="zlib", metadata=None)
    write_whole(target_tif, buffer)


def _decode(data: bytes, kind: Kind, between: tuple[float, float] | None = None) -> StoredImage:
    pixels, low, high = to_uint8(decode(data, kind), between)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.shape[2] == 2:
        pixels = np.pad(pixels, [(0, 0), (0, 0), (0, 1)])
    return StoredImage(np.ascontiguousarray(pixels), low, high)


def _one_plane(data: bytes) -> IntArray:
    kind = kind_of(data)
    if kind == "jpeg":
        raise LabelError("a JPEG changes label numbers; give a PNG or TIFF label image")
    return _whole_numbers(decode(data, kind, as_labels=True))


def _whole_numbers(raw: npt.NDArray[Any]) -> IntArray:
    """One plane of labels as int32; LabelError where it is anything else."""
    if raw.ndim != 2 or raw.dtype.kind not in "buif":
        raise LabelError(f"it is {raw.shape} {raw.dtype}; expected one plane of whole numbers, 0 = background")
    with np.errstate(invalid="ignore"):
        labels = raw.astype(np.int32)
    if not np.array_equal(labels, raw) or labels.min() < 0:
        raise LabelError("it holds negative numbers, fractions or numbers from 2**31 on; expected 0, 1, 2, ...")
    return labels


def _tiff_pages(data: bytes) -> list[IntArray]:
    """The pages of a TIFF of labels; [] where there is one only, which `read_label_image` reads."""
    _check_chain(data)
    with tifffile.TiffFile(BytesIO(data)) as file:
        pages = [page for page in file.pages if not page.is_reduced]
        if len(pages) < 2:
            return []
        shapes = list(dict.fromkeys(page.shape for page in pages))
        colour = next((shape for shape in shapes if len(shape) != 2), None)
        if colour is not None:
            raise LabelError(f"a page is {colour}, as colours are; expected label pages (H, W), 0 = background")
        if len(shapes) > 1:
            sizes = ", ".join(f"{height} x {width}" for height, width in shapes)
            raise LabelError(f"its pages differ in size ({sizes} px); each layer must have the image's size")
        if len(pages) * int(np.prod(shapes[0])) * 4 > MAX_BYTES:
            raise LabelError(f"{len(pages)} pages of {shapes[0]} px are too large; cut the image up")
        for page in pages:
            end = max(start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=True))
            if end > len(data):
                raise ImageError(
                    f"a page reaches to byte {end}, the file ends at {len(data)}: truncated; copy it again"
                )
            if (tag := page.tags.get(_ORIENTATION)) is not None and int(tag.value) != 1:
                raise LabelError("a page has an orientation; write the layers upright, without that tag")
        return [_whole_numbers(np.asarray(page.asarray())) for page in pages]


def _check_chain(data: bytes) -> None:
    """ImageError where the list of a TIFF's pages leads out of the file; tifffile would only read fewer pages."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    offset_format, count_format, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    place, seen = 8 if big else 4, set[int]()
    try:
        while (offset := struct.unpack_from(order + offset_format, data, place)[0]) and offset not in seen:
            seen.add(offset)
            (count,) = struct.unpack_from(order + count_format, data, offset)
            place = offset + struct.calcsize(order + count_format) + count * entry
    except struct.error as error:
        raise ImageError(
            f"page {len(seen)} lies behind the file's end at byte {len(data)}: truncated; copy it again"
        ) from error


def _check_values(layers: npt.NDArray[np.integer]) -> None:
    """LabelError where a value other than 0 lies on two pages."""
    if len(layers) < 2:
        return
    found = [np.unique(layer) for layer in layers]
    values, pages = np.unique(np.concatenate([values[values > 0] for values in found]), return_counts=True)
    shared = values[pages > 1]
    if len(shared):
        some = ", ".join(str(value) for value in shared[:5]) + (", ..." if len(shared) > 5 else "")
        raise LabelError(f"value {some} lies on more than one page; a value is one cell, on one page: renumber it")


def write_whole(target: Path, content: BytesIO) -> None:
    """Makes a file appear with all of its content, or not at all; its folder is made.

    Raises:
        ImageError: the file cannot be written (no right, disk full).
    """
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
        scratch = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content.getbuffer())
        scratch.chmod(0o644)
        scratch.replace(target)
    except OSError as error:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        raise ImageError(f"{target} cannot be written: {error.strerror}; check the disk's space and rights") from error


def _load(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(f"{path} has {size} bytes, more than {MAX_BYTES}; cut it into smaller images")
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not data:
        raise ImageError(f"{path} is empty (0 bytes); copy or export it again")
    return data


def _unreadable(path: Path, error: OSError) -> ImageError:
    return ImageError(f"{path} cannot be read: {error.strerror}; check that it exists and may be read")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a refusal; whatever else a decoder raises on a bad file becomes an ImageError.

    Raises:
        LoopError: as raised inside.
        ImageError: for every other error inside.
    """
    try:
        yield
    except LoopError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ImageError(f"{path}: corrupt, truncated or not readable ({reason}); copy or export it again") from error
