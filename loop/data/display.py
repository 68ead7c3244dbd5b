"""The 8-bit PNGs that people see in Label Studio, made from originals that are only read."""

from pathlib import Path

import numpy as np
from PIL import PngImagePlugin

from loop.data.store import file_sha256, read_image, write_png
from loop.data.windows import BRIGHT, DIM, EYES_PCT
from loop.types import UInt8Array

_SOURCE_KEY = "celloop-source"


def write_display(
    path: Path, target_png: Path, *, sha256: str = "", between: tuple[float, float] | None = None
) -> bool:
    """Writes the upright 8-bit PNG that Label Studio shows; the original is only read.

    A dim image (99.8th percentile below 128) is made brighter by one factor for all channels, so that people see its
    cells; the models' own normalisation takes no notice of such a factor. The PNG carries the hash of its original,
    so a second call finds it up to date and leaves it alone.

    Args:
        path: the original.
        target_png: where the PNG goes; its folder is made.
        sha256: the original's hash where it is known; otherwise it is computed.
        between: for a part of a larger image, the raw intensities of the whole that are shown as 0 and 255, so that
            neighbouring parts look alike; None = the image's own.

    Returns:
        Whether a file was written.

    Raises:
        ImageError: the original cannot be read (see `read_image`), or the PNG cannot be written.
    """
    origin = sha256 or file_sha256(path)
    if between is not None:
        origin = f"{origin} {between[0]:g} {between[1]:g}"
    if _source_of(target_png) == origin:
        return False
    info = PngImagePlugin.PngInfo()
    info.add_text(_SOURCE_KEY, origin)
    pixels = read_image(path, between).pixels
    write_png(pixels if between else _for_eyes(pixels), target_png, info=info)
    return True


def _for_eyes(pixels: UInt8Array) -> UInt8Array:
    high = float(np.percentile(pixels, EYES_PCT))
    if high <= 0 or high >= DIM:
        return pixels
    return np.clip(pixels.astype(np.float32) * (BRIGHT / high), 0, 255).astype(np.uint8)


def _source_of(target_png: Path) -> str:
    """The hash of the original that a display PNG was made from; "" where there is no such PNG."""
    try:
        with target_png.open("rb") as file:
            return str(PngImagePlugin.PngImageFile(file).info.get(_SOURCE_KEY, ""))
    except (OSError, SyntaxError, ValueError):
        return ""
