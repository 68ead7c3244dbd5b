"""From the image value of a task to pixels: local files below one directory, everything else from Label Studio."""

import hashlib
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from backend.download import LabelStudioDownloads
from loop.data.store import file_sha256, read_image
from loop.errors import ImageError
from loop.types import UInt8Array

LOCAL_FILES = "/data/local-files/"


@dataclass(frozen=True)
class ImageFile:
    """A readable file with a task's image: where it lies now, the hash of its bytes, and the value it came from."""

    path: Path
    sha256: str
    value: str

    def pixels(self) -> UInt8Array:
        """The upright image (H, W, C) uint8, C 1 or 3.

        Raises:
            ImageError: it cannot be decoded; the text names the task's value, not a path of this machine.
        """
        try:
            return read_image(self.path).pixels
        except ImageError as error:
            raise ImageError(str(error).replace(str(self.path), self.value)) from error


class ImageSource:
    """Opens the images of tasks.

    Args:
        display_root: what `/data/local-files/?d=` is relative to; None: such files are fetched from Label Studio.
        downloads: for everything that is not a local file.
        max_bytes: a larger local file is refused.
    """

    def __init__(self, display_root: Path | None, downloads: LabelStudioDownloads, *, max_bytes: int) -> None:
        self._root = display_root
        self._downloads = downloads
        self._max_bytes = max_bytes

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
            yield ImageFile(path, file_sha256(path), value)
            return
        with tempfile.TemporaryDirectory(prefix="celloop-image-") as directory:
            path = Path(directory) / "image"
            digest = hashlib.sha256()
            with path.open("wb") as file:
                for piece in self._downloads.stream(value):
                    digest.update(piece)
                    file.write(piece)
            yield ImageFile(path, digest.hexdigest(), value)

    def local_path(self, value: str) -> Path:
        """The file that `/data/local-files/?d=PATH` names, links resolved.

        Raises:
            ImageError: outside of the directory (also by a link), missing, no regular file, or too large.
        """
        root = (self._root or Path()).resolve()
        name = parse_qs(urlsplit(value).query).get("d", [""])[0]
        relative = posixpath.normpath(name).lstrip("/")
        if not name or "\0" in name or relative in {"", "."} or relative.split("/")[0] == "..":
            raise ImageError(f"{value!r} names no file below the image directory; expected {LOCAL_FILES}?d=FOLDER/FILE")
        try:
            path = (root / relative).resolve()
            if not path.is_relative_to(root):
                raise ImageError(f"{value!r} leads out of the image directory; it is not read")
            if not path.is_file():
                raise ImageError(f"{value!r}: no such file below CELLOOP_DISPLAY_ROOT; was it moved or deleted?")
            size = path.stat().st_size
        except (OSError, RuntimeError) as error:
            raise ImageError(f"{value!r} cannot be read: {type(error).__name__}") from error
        if size > self._max_bytes:
            raise ImageError(f"{value!r} is {size} bytes, over {self._max_bytes}; tile it before importing")
        return path
