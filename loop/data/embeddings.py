"""Encoded images on disk, so that none is encoded twice by the same model: written by flows and backend.

One file an image and model, DIRECTORY/MODEL/SHA256.safetensors, named by the content of the image that is shown. The
arrays are kept as they come, which is in half precision (`Embedding.to_arrays`): about 2 MB an image for SAM.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from loop.data.intensity import stretch
from loop.types import UInt8Array

logger = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]

_ABANDONED_S = 3600.0
"""A file that is being written for longer than this was left by a process that died."""


def to_encode(pixels: UInt8Array) -> UInt8Array:
    """What SAM is shown of an image that people click in: stretched to the full range, in its own colours.

    Whoever encodes for an `EmbeddingStore` encodes this.

    Args:
        pixels: (H, W, C) uint8, C in {1, 3}, of the image that Label Studio shows.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ShapeError: another shape, or an empty one.
    """
    return stretch(pixels, 3, dark_background=False)


class _File(NamedTuple):
    used_ns: int
    size: int
    path: Path


class EmbeddingStore:
    """Encoded images below a directory that several threads and processes may use at once.

    Files appear whole or not at all. When there are more than `limit_bytes` of them, those that were asked for the
    longest ago go first, whichever model or project they are of.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """Takes the directory, which is made when something is put, and the limit, >= 0; 0 keeps nothing."""
        self._directory = directory
        self._limit = limit_bytes

    def get(self, sha256: str, model: str) -> Arrays | None:
        """What was put for this image and model, or None. It is now the last one asked for.

        A damaged file is named in the log, removed and counts as none. So does one that cannot be read, which stays.
        """
        path = self._path(sha256, model)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("encoded image %s cannot be read (%s); it is made again", path.name, error.strerror)
            return None
        try:
            found: Arrays = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("encoded image %s is damaged (%s); it is made again", path.name, error)
            _quietly(path.name, lambda: path.unlink(missing_ok=True))
            return None
        _quietly(path.name, lambda: _touch(path))
        return found

    def put(self, sha256: str, model: str, arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Keeps `arrays`, in place of earlier ones, and makes room; False where they are not kept.

        That is so for arrays over the whole limit, and where the disk does not take them, which the log says: what
        could not be kept is only made again.
        """
        data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
        if len(data) > self._limit:
            return False
        path = self._path(sha256, model)
        try:
            _write(path, data)
            self._make_room()
        except OSError as error:
            logger.warning("encoded image %s is not kept: %s", path.name, error)
            return False
        return True

    def _path(self, sha256: str, model: str) -> Path:
        return self._directory / quote(model, safe="") / f"{quote(sha256, safe='')}.safetensors"

    def _make_room(self) -> None:
        files = _files(self._directory)
        held = sum(file.size for file in files)
        for file in sorted(files):
            if held <= self._limit:
                break
            file.path.unlink(missing_ok=True)
            held -= file.size


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")  # not of tempfile: other users' processes are to read it
    try:
        with temporary.open("xb") as file:
            file.write(data)
        _touch(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Says that the file was asked for now, finer than the system's own clock of files."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _quietly(name: str, step: Callable[[], None]) -> None:
    """Does what nobody's answer depends on; a folder of another user may not allow it."""
    try:
        step()
    except OSError as error:
        logger.debug("encoded image %s: %s", name, error)


def _files(directory: Path) -> list[_File]:
    """The files that are there now; those that other processes remove meanwhile, and abandoned ones, are not."""
    found = []
    oldest = time.time_ns() - int(_ABANDONED_S * 1e9)
    for path in directory.glob("*/*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.suffix == ".safetensors":
            found.append(_File(status.st_mtime_ns, status.st_size, path))
        elif path.suffix == ".tmp" and status.st_mtime_ns < oldest:
            path.unlink(missing_ok=True)
    return found
