"""From the image value of a task to pixels: local files below one directory, everything else from Label Studio."""

import hashlib
import math
import posixpath
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit

import tifffile
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin
from PIL import ImageFile as PillowFile

from backend.download import LabelStudioDownloads, shown
from backend.hashes import Hashes
from loop.data.decode import MAX_PIXELS, kind_of
from loop.data.store import file_sha256, read_image
from loop.errors import ImageError
from loop.types import UInt8Array

LOCAL_FILES = "/data/local-files/"


def claimed_pixels(file: BinaryIO) -> int:
    """How many pixels an image file says that it holds, from its header; of a TIFF all planes of the first series.

    Nothing is decompressed: a file of a few bytes may claim more than fits into memory.

    Raises:
        ImageError: no PNG, JPEG, TIFF or BMP. The readers raise errors of their own where a header is damaged.
    """
    kind = kind_of(file.read(8))
    file.seek(0)
    if kind == "tiff":
        with tifffile.TiffFile(file) as tiff:
            if not tiff.series:
                raise ImageError("there is no image in this TIFF")
            series = tiff.series[0]
            return int(math.prod(series.shape) // max(1, series.keyframe.samplesperpixel))
    # Not Image.open: its own limit is a global setting, and any other format would be let in.
    readers: dict[str, Callable[[BinaryIO], PillowFile.ImageFile]] = {
        "png": PngImagePlugin.PngImageFile,
        "jpeg": JpegImagePlugin.JpegImageFile,
        "bmp": BmpImagePlugin.BmpImageFile,
    }
    return math.prod(readers[kind](file).size)


@dataclass(frozen=True)
class ImageFile:
    """A readable file with a task's image: where it lies now, the hash of its bytes, and the value it came from."""

    path: Path
    sha256: str
    value: str
    max_pixels: int = MAX_PIXELS

    def pixels(self) -> UInt8Array:
        """The upright image (H, W, C) uint8, C 1 or 3.

        Raises:
            ImageError: it says in its header that it has more than `max_pixels` (then it is not decoded), or it cannot
                be decoded, or it is no longer the one of this hash, under which others would get what is seen in it;
                the text names the task's value, not a path of this machine.
        """
        name = shown(self.value)
        try:
            self._check_claim(name)
            pixels = read_image(self.path).pixels
            if file_sha256(self.path) != self.sha256:
                raise ImageError(f"{name} was replaced just now; ask again")
            return pixels
        except ImageError as error:
            raise ImageError(str(error).replace(str(self.path), name)) from error

    def _check_claim(self, name: str) -> None:
        try:
            with self.path.open("rb") as file:
                claimed = claimed_pixels(file)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
        except Exception as error:  # whatever a reader makes of a damaged header
            raise ImageError(f"{name}: damaged header ({type(error).__name__}); copy or export it again") from error
        if claimed > self.max_pixels:
            raise ImageError(
                f"{name} claims {claimed} px, more than {self.max_pixels}; cut it into tiles, or start the backend "
                "with a larger CELLOOP_BACKEND_MAX_IMAGE_PIXELS"
            )


class ImageSource:
    """Opens the images of tasks.

    Args:
        display_root: what `/data/local-files/?d=` is relative to; None: such files are fetched from Label Studio.
        downloads: for everything that is not a local file.
        max_bytes: a larger local file is refused.
        max_pixels: an image that claims more is not decoded.

    Symbolic links out of the directory are refused. A hard link cannot be told from the file itself: who may make one
    inside the directory may also copy the file there.
    """

    def __init__(
        self,
        display_root: Path | None,
        downloads: LabelStudioDownloads,
        *,
        max_bytes: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._root = display_root
        self._hashes = Hashes()
        self._downloads = downloads
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels

    @contextmanager
    def open(self, value: object) -> Iterator[ImageFile]:
        """The file of a task's image value; a download is gone after the block.

        Raises:
            ImageError: the value is no text, leads out of the directory or to another host, or there is no such file.
            RefusedError: Label Studio does not give it.
            UnreachableError: Label Studio does not answer.
        """
        if not isinstance(value, str) or not value:
            raise ImageError(f"the task's image is {str(value)[:80]!r}; expected an address or a path")
        if self._root is not None and value.startswith(LOCAL_FILES):
            path = self.local_path(value)
            try:
                sha256 = self._hashes.of(path)
            except ImageError as error:
                raise ImageError(f"{shown(value)} cannot be read; was it moved or deleted just now?") from error
            yield ImageFile(path, sha256, value, self._max_pixels)
            return
        with tempfile.TemporaryDirectory(prefix="celloop-image-") as directory:
            path = Path(directory) / "image"
            digest = hashlib.sha256()
            with path.open("wb") as file:
                for piece in self._downloads.stream(value):
                    digest.update(piece)
                    file.write(piece)
            yield ImageFile(path, digest.hexdigest(), value, self._max_pixels)

    def local_path(self, value: str) -> Path:
        """The file that `/data/local-files/?d=PATH` names, links resolved.

        Raises:
            ImageError: outside of the directory (also by a link), missing, no regular file, or too large.
        """
        root = (self._root or Path()).resolve()
        name = parse_qs(urlsplit(value).query).get("d", [""])[0]
        relative = posixpath.normpath(name).lstrip("/")
        if not name or "\0" in name or relative in {"", "."} or relative.split("/")[0] == "..":
            raise ImageError(
                f"{shown(value)} names no file below the image directory; expected {LOCAL_FILES}?d=FOLDER/FILE"
            )
        try:
            path = (root / relative).resolve()
            if not path.is_relative_to(root):
                raise ImageError(f"{shown(value)} leads out of the image directory; it is not read")
            if not path.is_file():
                raise ImageError(f"{shown(value)}: no such file below CELLOOP_DISPLAY_ROOT; was it moved or deleted?")
            size = path.stat().st_size
        except (OSError, RuntimeError) as error:
            raise ImageError(f"{shown(value)} cannot be read: {type(error).__name__}") from error
        if size > self._max_bytes:
            raise ImageError(f"{shown(value)} is {size} bytes, over {self._max_bytes}; tile it before importing")
        return path
