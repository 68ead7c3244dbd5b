"""One model call at a time, people first: who clicks waits for a piece of an image, never for a whole batch.

A rank says how pressing a call is. The turn is held for one image; a long call offers it back between its pieces
(`Turn.give_way`), and whoever is of a higher rank goes in between.

Not every call needs the turn. The answer to a click whose image is encoded already takes 40 ms, while a batch holds the
turn for an image: such a click is answered beside whoever holds it (`Turns.beside`), at the price of sharing the
processor with him. Measured on two busy cores beside a batch of 250 ms a task: 95 ms a click, 200 ms if it waited
(benchmarks/bench_click.py). Batches begin no new image meanwhile, for a while.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import TracebackType

from backend.errors import BusyError

PATIENCE_S = 0.25
"""A batch waits no longer than this for clicks that are answered beside it, so that many people do not stop it."""


class Rank(IntEnum):
    """Who goes first."""

    CLICK = 0
    """Somebody clicked and looks at the screen."""
    OPEN = 1
    """Somebody opens a single task."""
    BATCH = 2
    """Many tasks at once."""
    AHEAD = 3
    """Nobody asked yet; begins nothing while people click."""


class Turns:
    """Hands the turn to the highest rank, within a rank to whoever came first.

    Args:
        quiet_s: rank AHEAD waits until nobody has clicked for so long.
    """

    def __init__(self, quiet_s: float = 2.0) -> None:
        self._quiet_s = quiet_s
        self._changed = threading.Condition()
        self._holder: Turn | None = None
        self._waiting: list[Turn] = []
        self._beside = 0
        self._last_click = -float("inf")
        self._stopped = False

    def take(self, rank: Rank) -> "Turn":
        """A turn to be waited for and held by `with`."""
        return Turn(self, rank)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Held while a click is answered without the turn."""
        with self._changed:
            self._beside += 1
            self._last_click = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._beside -= 1
                self._last_click = time.monotonic()
                self._changed.notify_all()

    def waiting(self, rank: Rank) -> int:
        """How many of a rank wait now."""
        with self._changed:
            return sum(turn.rank == rank for turn in self._waiting)

    def stop(self) -> None:
        """Rank AHEAD gets no turn any more; who waits with it, or offers his back, raises BusyError."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait(self, turn: "Turn", place: int) -> None:
        """Returns when the turn is held; `place` in the list decides among equals. The condition is held."""
        self._waiting.insert(place, turn)
        try:
            turn.since = time.monotonic()
            while (left := self._left(turn)) != 0:
                self._changed.wait(left)
            self._holder = turn
        finally:
            self._waiting.remove(turn)

    def _left(self, turn: "Turn") -> float | None:
        """Seconds until a waiting turn may go if nothing changes: 0 now, None not before something does."""
        if turn.rank is Rank.AHEAD and self._stopped:
            raise BusyError("the backend stops; nothing more is prepared")
        first = min(self._waiting, key=lambda other: other.rank)
        return self._held_back(turn) if self._holder is None and first is turn else None

    def _held_back(self, turn: "Turn") -> float:
        """Seconds for which clicks keep this turn from beginning, if no more of them come; 0: they do not."""
        left = 0.0
        if turn.rank is Rank.AHEAD:
            left = self._last_click + self._quiet_s - time.monotonic()
        elif turn.rank is Rank.BATCH and self._beside:
            left = turn.since + PATIENCE_S - time.monotonic()
        return max(left, 0.0)

    def _free(self) -> None:
        self._holder = None
        self._changed.notify_all()


class Turn:
    """One caller's place; held inside `with`. Used once."""

    def __init__(self, turns: Turns, rank: Rank) -> None:
        self._turns = turns
        self.rank = rank
        self.since = 0.0

    def __enter__(self) -> "Turn":
        with self._turns._changed:
            self._turns._wait(self, len(self._turns._waiting))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turns._changed:
            if self._turns._holder is self:
                self._turns._free()

    def give_way(self) -> None:
        """Lets those of a higher rank go first; called by the holder between two pieces of his work.

        Raises:
            BusyError: of rank AHEAD, when the backend stops.
        """
        turns = self._turns
        with turns._changed:
            self.since = time.monotonic()
            others_first = any(other.rank < self.rank for other in turns._waiting)
            stopped = self.rank is Rank.AHEAD and turns._stopped
            if others_first or stopped or turns._held_back(self):
                turns._free()
                turns._wait(self, 0)

    def hurry(self, rank: Rank) -> None:
        """Somebody of a higher rank waits for this work too: from now on it is of that rank."""
        with self._turns._changed:
            self.rank = min(self.rank, rank)
            self._turns._changed.notify_all()
