"""One model call at a time, clicks before batches: a person who clicks waits for one image, never for a whole batch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock with two ranks. Held for one image; a batch takes it anew for each of its images."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._busy = False
        self._clicks_waiting = 0

    @contextmanager
    def take(self, *, click: bool = False) -> Iterator[None]:
        """Waits for the turn, clicks first, and gives it back at the end of the block."""
        with self._condition:
            self._clicks_waiting += click
            try:
                self._condition.wait_for(lambda: not self._busy and (click or not self._clicks_waiting))
                self._busy = True
            finally:
                self._clicks_waiting -= click
        try:
            yield
        finally:
            with self._condition:
                self._busy = False
                self._condition.notify_all()
