"""Progress on a terminal as bars, elsewhere as plain lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flows.cli.console import console, say

LINE_EVERY_S = 15.0
WORDS = {
    "images": "preparing images",
    "tasks": "creating tasks",
    "train": "training (seconds)",
    "predict": "predicting images",
    "looks": "describing what images look like",
    "estimate": "comparing with random choice (models)",
    "replay": "replaying (trainings)",
    "publish": "publishing predictions",
    "annotator": "simulated annotator labels",
    "megabytes": "downloading (MB)",
}


class Teller:
    """Called as teller(step, done, total) by long work; see `telling`."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __call__(self, step: str, done: int, total: int, *, note: str = "", seconds_left: float | None = None) -> None:
        """Shows that `done` of `total` units of `step` are done; a step that starts again starts a new bar.

        Args:
            step: a key of WORDS, or words.
            done: units that are done, 0 .. total.
            total: all units.
            note: a few words of how it goes, such as the loss.
            seconds_left: until the step ends, where the work knows better than its speed so far tells.
        """
        words = WORDS.get(step, step)
        if self._bars is not None:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(words, total=total, note="", seconds_left=None)
            self._bars.update(self._tasks[step], completed=done, total=total, note=note, seconds_left=seconds_left)
            if done >= total:
                del self._tasks[step]
            return
        now = time.monotonic()
        if done >= total or now - self._last.get(step, -LINE_EVERY_S) >= LINE_EVERY_S:
            self._last[step] = now
            left = "" if seconds_left is None else f"{clock(seconds_left)} left"
            say(", ".join(part for part in (f"{words}: {done} of {total}", note, left) if part))


def clock(seconds: float) -> str:
    """A span of time as people read it: 0:00:07; below 0 counts as 0."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class _TimeLeft(TimeRemainingColumn):
    """The time left that the work itself tells, else what its speed so far makes likely."""

    def render(self, task: Task) -> Text:
        told = task.fields.get("seconds_left")
        return super().render(task) if told is None else Text(clock(told), style="progress.remaining")


@contextmanager
def telling() -> Iterator[Teller]:
    """A teller for long work: bars on a terminal, a line every 15 s where standard error is a file or a pipe."""
    if not console().is_terminal:
        yield Teller(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _TimeLeft(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console()) as bars:
        yield Teller(bars)
