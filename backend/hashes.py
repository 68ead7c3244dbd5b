"""The content hash of local files, read again only when a file has changed."""

import threading
import time
from collections import OrderedDict
from pathlib import Path

from loop.data.store import file_sha256
from loop.errors import ImageError

MAX_FILES = 4096
SETTLED_NS = 2_000_000_000

_Stamp = tuple[int, int, int, int]


class Hashes:
    """SHA-256 by path; what was asked for last is kept for 4096 files. Safe to use from several threads.

    A file counts as unchanged while inode, size and both times stay the same. One that changed in the last two seconds
    is read each time: its times may not tell a second change in the same tick of the clock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Path, tuple[_Stamp, str]] = OrderedDict()

    def of(self, path: Path) -> str:
        """The hash of the file's bytes, 64 hex digits.

        Raises:
            ImageError: the file is missing or cannot be read; the text names it without its folder.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise ImageError(f"{path.name} cannot be read: {error.strerror}; was it moved or deleted?") from error
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        with self._lock:
            known = self._known.get(path)
            if known is not None and known[0] == stamp:
                self._known.move_to_end(path)
                return known[1]
        try:
            digest = file_sha256(path)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), path.name)) from error
        if time.time_ns() - max(stamp[2:]) > SETTLED_NS:
            with self._lock:
                self._known[path] = (stamp, digest)
                while len(self._known) > MAX_FILES:
                    self._known.popitem(last=False)
        return digest
