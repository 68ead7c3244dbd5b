"""What was used last, up to a number of bytes: what models see in images that people click in, finished predictions."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def _nbytes(value: Any) -> int:
    return int(value.nbytes)


class MapCache(Generic[K, V]):
    """Values by key; the least recently used are dropped first. Safe to use from several threads.

    Args:
        limit_bytes: at most this much is kept, >= 0; a value larger than that is not kept at all.
        size: bytes of a value; by default what it says itself by `nbytes`.
    """

    def __init__(self, limit_bytes: int, *, size: Callable[[V], int] = _nbytes) -> None:
        self._limit = limit_bytes
        self._size = size
        self._bytes = 0
        self._lock = threading.Lock()
        self._maps: OrderedDict[K, V] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """What is kept now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._maps)

    def __contains__(self, key: K) -> bool:
        """Whether there is a value; it does not count as used."""
        return key in self._maps

    def get(self, key: K) -> V | None:
        """The value, or None; it becomes the last used. Not to be written to."""
        with self._lock:
            value = self._maps.get(key)
            if value is not None:
                self._maps.move_to_end(key)
            return value

    def put(self, key: K, value: V) -> None:
        """Keeps `value`, dropping the least recently used ones that no longer fit."""
        size = self._size(value)
        if size > self._limit:
            return
        with self._lock:
            old = self._maps.pop(key, None)
            self._bytes += size - (self._size(old) if old is not None else 0)
            self._maps[key] = value
            while self._bytes > self._limit:
                _, dropped = self._maps.popitem(last=False)
                self._bytes -= self._size(dropped)
