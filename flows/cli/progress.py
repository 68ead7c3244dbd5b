"""Progress on a terminal as bars, elsewhere as plain lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flows.cli.console import console, say

LINE_EVERY_S = 15.0
WORDS = {
    "images": "preparing images",
    "tasks": "creating tasks",
    "train": "training (seconds)",
    "predict": "predicting images",
    "publish": "publishing predictions",
    "annotator": "simulated annotator labels",
}


class Teller:
    """Called as teller(step, done, total) by long work; see `telling`."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        """Shows that `done` of `total` units of `step` are done; a step that starts again starts a new bar."""
        words = WORDS.get(step, step)
        if self._bars is not None:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(words, total=total)
            self._bars.update(self._tasks[step], completed=done, total=total)
            if done >= total:
                del self._tasks[step]
            return
        now = time.monotonic()
        if done >= total or now - self._last.get(step, -LINE_EVERY_S) >= LINE_EVERY_S:
            self._last[step] = now
            say(f"{words}: {done} of {total}")


@contextmanager
def telling() -> Iterator[Teller]:
    """A teller for long work: bars on a terminal, a line every 15 s where standard error is a file or a pipe."""
    if not console().is_terminal:
        yield Teller(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console()) as bars:
        yield Teller(bars)
