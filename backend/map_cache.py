"""What the model sees in the images that people click in: the last used ones, up to a number of bytes."""

import threading
from collections import OrderedDict

from loop.models.click import Scene

Key = tuple[str, str]


class MapCache:
    """Least recently used scenes are dropped first; safe to use from several threads.

    Args:
        limit_bytes: at most this much is kept, >= 0; a scene larger than that is not kept at all.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._maps: OrderedDict[Key, Scene] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """What is kept now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._maps)

    def get(self, key: Key) -> Scene | None:
        """The scene of (content hash, model label), or None; it becomes the last used. Not to be written to."""
        with self._lock:
            maps = self._maps.get(key)
            if maps is not None:
                self._maps.move_to_end(key)
            return maps

    def put(self, key: Key, maps: Scene) -> None:
        """Keeps `maps`, dropping the least recently used ones that no longer fit."""
        if maps.nbytes > self._limit:
            return
        with self._lock:
            old = self._maps.pop(key, None)
            self._bytes += maps.nbytes - (old.nbytes if old is not None else 0)
            self._maps[key] = maps
            while self._bytes > self._limit:
                _, dropped = self._maps.popitem(last=False)
                self._bytes -= dropped.nbytes
