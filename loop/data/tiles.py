"""Tiles of a large or crowded image: which there are, and their files. A tile is an image of its own.

Each tile has its own part of the image, and shows a halo around it that its neighbours show as well. The own parts are
the image, nothing twice; `loop.models.stitch.merge_windows` makes cells of the whole of what people drew in the tiles.
"""

import math
from collections.abc import Mapping
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

from loop.data.decode import Raw
from loop.data.preprocess import Window
from loop.data.store import file_sha256, naming, write_png, write_whole
from loop.data.windows import check_window, open_windows
from loop.errors import InputError

_MARK = ".t"


class Tile(NamedTuple):
    """One tile: its row and column among the others, its own part of the image, and the window that it shows."""

    row: int
    column: int
    own: Window
    window: Window


class TileFile(NamedTuple):
    """Where a tile's pixels lie, and the hash of that file."""

    path: Path
    sha256: str


def cut(shape: tuple[int, int], side: int, halo: int) -> tuple[Tile, ...]:
    """The tiles of an image, row by row.

    Their own parts are as equal as whole pixels allow, so that none is a sliver, and together are the image, each pixel
    once. A window is the own part and `halo` px around it as far as the image goes.

    Args:
        shape: (H, W) px, both at least 1.
        side: no own part is longer, px, at least 1.
        halo: px, at least 0.

    Returns:
        At least one; exactly one for an image that is no longer than `side`.

    Raises:
        InputError: a number is out of its range.
    """
    if min(shape) < 1 or side < 1 or halo < 0:
        raise InputError(f"shape={shape}, side={side}, halo={halo}; expected at least 1 px, side >= 1 and halo >= 0")
    height, width = shape
    tiles = []
    for row, (y0, y1) in enumerate(_parts(height, side)):
        for column, (x0, x1) in enumerate(_parts(width, side)):
            window = Window(max(y0 - halo, 0), max(x0 - halo, 0), min(y1 + halo, height), min(x1 + halo, width))
            tiles.append(Tile(row, column, Window(y0, x0, y1, x1), window))
    return tuple(tiles)


def _parts(size: int, side: int) -> list[tuple[int, int]]:
    n = math.ceil(size / side)
    return [(size * i // n, size * (i + 1) // n) for i in range(n)]


def tile_id(image_id: str, tile: Tile) -> str:
    """The id of a tile of an image, as "slide.t0002-0011": row 2, column 11, counted from 0."""
    return f"{image_id}{_MARK}{tile.row:04d}-{tile.column:04d}"


def cut_from(tile: str) -> str:
    """The id of the image (or of the tile) that a tile of this id was cut from."""
    return tile.rpartition(_MARK)[0]


def write_tiles(image: Path, directory: Path, windows: Mapping[str, Window]) -> dict[str, TileFile]:
    """Writes windows of an image as files of their own, in one pass from top to bottom; the image is only read.

    A file holds the image's raw pixels as they are, all bits and channels (planes of a stack joined as
    loop/data/decode.py says): STEM.png of 8 bits, STEM.tif of others. It appears whole or not at all, and the same
    pixels give the same bytes. At once in memory: windows of the same rows, where the format allows, else the image.

    Args:
        image: the file.
        directory: where the tiles go; made if missing.
        windows: by stem.

    Raises:
        ImageError: the image cannot be read, or a tile cannot be written.
        InputError: a window leaves the image.
    """
    made: dict[str, TileFile] = {}
    order = sorted(windows.items(), key=lambda item: item[1])
    with naming(image), open_windows(image) as whole:
        for (y0, y1), group in groupby(order, key=lambda item: (item[1].y0, item[1].y1)):
            row = list(group)
            left, right = min(window.x0 for _, window in row), max(window.x1 for _, window in row)
            band = Window(y0, left, y1, right)
            check_window(whole.shape, band)
            pixels = whole.read(band)
            for stem, window in row:
                path = _write_raw(pixels[:, window.x0 - left : window.x1 - left], directory / stem)
                made[stem] = TileFile(path, file_sha256(path))
    return made


def _write_raw(raw: Raw, stem: Path) -> Path:
    """A PNG of 8 bits or a TIFF of any others, named by its stem; returns its path."""
    if raw.dtype == np.uint8 and (raw.ndim == 2 or raw.shape[2] == 3):
        path = stem.with_name(f"{stem.name}.png")
        write_png(raw, path)
        return path
    path, buffer = stem.with_name(f"{stem.name}.tif"), BytesIO()
    native = np.ascontiguousarray(raw, raw.dtype.newbyteorder("="))
    if raw.ndim == 3 and raw.shape[2] == 2:
        planes, axes, colours = np.moveaxis(native, -1, 0), "CYX", "minisblack"
    else:
        planes, axes, colours = native, "YXS" if raw.ndim == 3 else "YX", "rgb" if raw.ndim == 3 else "minisblack"
    with tifffile.TiffWriter(buffer) as file:
        file.write(
            planes,
            photometric=colours,
            compression="zlib",
            compressionargs={"level": 1},
            rowsperstrip=64,
            metadata={"axes": axes},
        )
    write_whole(path, buffer)
    return path
