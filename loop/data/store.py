"""The only reader and writer of image files: whatever a microscope writes in, 8-bit pixels and PNG out.

Which formats are read, and how a stack or 16 bits become one 8-bit picture, is written at the top of
loop/data/decode.py. Originals are only ever read; what is written appears whole or not at all.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from loop.data.decode import MAX_BYTES, Kind, decode, kind_of, probe_png, to_uint8
from loop.errors import ImageError, LabelError, LoopError, ShapeError
from loop.types import ImageRef, IntArray, UInt8Array

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_SOURCE_KEY = "celloop-source"
EYES_PCT, DIM, BRIGHT = 99.8, 128.0, 220.0
"""An image whose 99.8th percentile lies below 128 is shown with that percentile at 220."""


class StoredImage(NamedTuple):
    """An upright 8-bit image and the raw intensities that became 0 and 255.

    `pixels` is (H, W, C) uint8, C in {1, 3}; `low` and `high` are 0 and 255 where the file was 8-bit already.
    """

    pixels: UInt8Array
    low: float
    high: float


def read_image(path: Path) -> StoredImage:
    """The pixels of an image file, upright and 8-bit; loop/data/decode.py says how each kind is read.

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt, of a kind that is not read, holds NaN or infinity,
            or is larger than 2**28 px; the text names the file and the reason.
    """
    data = _load(path)
    with _naming(path):
        return _decode(data, kind_of(data))


def describe(path: Path, **meta: Any) -> ImageRef:
    """What is known of an image without keeping its pixels; `image_id` is the file's stem.

    An 8-bit PNG is checked by its header and checksums, every other file by decoding it.

    Args:
        path: an image file.
        **meta: further fields of ImageRef (group, split, modality, label_path, extra).

    Raises:
        ImageError: as `read_image`.
    """
    data = _load(path)
    with _naming(path):
        kind = kind_of(data)
        shape, low, high = probe_png(data) if kind == "png" else None, 0.0, 255.0
        if shape is None:
            pixels, low, high = _decode(data, kind)
            shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
    return ImageRef(
        image_id=path.stem,
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        height=shape[0],
        width=shape[1],
        channels=shape[2],
        low=low,
        high=high,
        **meta,
    )


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


def write_display(path: Path, target_png: Path, *, sha256: str = "") -> bool:
    """Writes the upright 8-bit PNG that Label Studio shows; the original is only read.

    A dim image (99.8th percentile below 128) is made brighter by one factor for all channels, so that people see its
    cells; the models' own normalisation takes no notice of such a factor. The PNG carries the hash of its original,
    so a second call finds it up to date and leaves it alone.

    Args:
        path: the original.
        target_png: where the PNG goes; its folder is made.
        sha256: the original's hash where it is known; otherwise it is computed.

    Returns:
        Whether a file was written.

    Raises:
        ImageError: the original cannot be read (see `read_image`), or the PNG cannot be written.
    """
    origin = sha256 or file_sha256(path)
    if _source_of(target_png) == origin:
        return False
    info = PngImagePlugin.PngInfo()
    info.add_text(_SOURCE_KEY, origin)
    write_png(_for_eyes(read_image(path).pixels), target_png, info=info)
    return True


def _for_eyes(pixels: UInt8Array) -> UInt8Array:
    high = float(np.percentile(pixels, EYES_PCT))
    if high <= 0 or high >= DIM:
        return pixels
    return np.clip(pixels.astype(np.float32) * (BRIGHT / high), 0, 255).astype(np.uint8)


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
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
        scratch = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getbuffer())
        scratch.chmod(0o644)
        scratch.replace(target)
    except OSError as error:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        raise ImageError(f"{target} cannot be written: {error.strerror}; check the disk's space and rights") from error


def read_label_image(path: Path) -> IntArray:
    """A label image as it lies in a file: (H, W) int32, 0 = background, upright.

    PNG (grey or palette, up to 16 bit), BMP and TIFF (whole numbers, one plane) are read; a palette's indices are the
    labels. JPEG is refused: it changes the numbers.

    Raises:
        LabelError: the file holds colours, fractions, negative numbers or several planes, or is a JPEG.
        ImageError: the file cannot be read (see `read_image`).
    """
    data = _load(path)
    with _naming(path):
        kind = kind_of(data)
        if kind == "jpeg":
            raise LabelError("a JPEG changes label numbers; give a PNG or TIFF label image")
        raw = decode(data, kind, as_labels=True)
        if raw.ndim != 2 or raw.dtype.kind not in "buif":
            raise LabelError(f"it is {raw.shape} {raw.dtype}; expected one plane of whole numbers, 0 = background")
        with np.errstate(invalid="ignore"):
            labels = raw.astype(np.int32)
        if not np.array_equal(labels, raw) or labels.min() < 0:
            raise LabelError("it holds negative numbers, fractions or numbers from 2**31 on; expected 0, 1, 2, ...")
    return labels


def label_shape(path: Path) -> tuple[int, int]:
    """(H, W) of a label image; a grey PNG is checked by its header and checksums, every other file by decoding it.

    Raises:
        LabelError, ImageError: as `read_label_image`; what the numbers of a grey PNG are is not looked at.
    """
    data = _load(path)
    with _naming(path):
        quick = probe_png(data, bits=16) if kind_of(data) == "png" else None
    if quick is not None and quick[2] == 1:
        return quick[:2]
    height, width = read_label_image(path).shape
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


def _decode(data: bytes, kind: Kind) -> StoredImage:
    pixels, low, high = to_uint8(decode(data, kind))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.shape[2] == 2:
        pixels = np.pad(pixels, [(0, 0), (0, 0), (0, 1)])
    return StoredImage(np.ascontiguousarray(pixels), low, high)


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
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a refusal; whatever else a decoder raises on a bad file becomes an ImageError."""
    try:
        yield
    except LoopError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ImageError(f"{path}: corrupt, truncated or not readable ({reason}); copy or export it again") from error


def _source_of(target_png: Path) -> str:
    """The hash of the original that a display PNG was made from; "" where there is no such PNG."""
    try:
        with target_png.open("rb") as file:
            return str(PngImagePlugin.PngImageFile(file).info.get(_SOURCE_KEY, ""))
    except (OSError, SyntaxError, ValueError):
        return ""
