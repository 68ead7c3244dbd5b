"""Prepares the images that people will see next while nobody clicks, so that the first click in each is quick too."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from backend.answerers import Answerer
from backend.clicks import Clicks
from backend.images import ImageSource
from backend.metrics import Metrics
from backend.project_settings import ProjectSettings
from backend.projects import ProjectIndex
from backend.turns import Rank, Turns
from loop.adapters.index import ImageRow, ProjectRow
from loop.errors import LoopError

logger = logging.getLogger(__name__)

Prepared = tuple[str, str]
"""Id of the image, name of the model."""


class ImageIndex(ProjectIndex, Protocol):
    """What is needed of the index (loop.adapters.index.Index)."""

    def images(self, project: str, *, state: str | None = None) -> Sequence[ImageRow]:
        """The project's images of a state."""


def upcoming(rows: Sequence[ImageRow], number: int) -> list[ImageRow]:
    """The images that people see next: by their rank, then the most doubtful ones, which have the highest score."""
    order = sorted(rows, key=lambda row: (row.rank is None, row.rank or 0, -(row.score or 0.0), row.image_id))
    return [row for row in order if row.task_id is not None][:number]


class Ahead:
    """A thread that looks at the next images of each project in the rank AHEAD, below everything that people ask for.

    An image is prepared once for each model: SAM encodes it into memory and onto the disk, or the champion's maps of it
    are kept in memory. What fails is left to the click. Nothing here raises; the log has one line for each cause.

    Args:
        index: projects and their images.
        settings: `click.ahead` says how many images.
        clicks: who answers them.
        images: task value -> image file.
        turns: who goes first; stopping is told there too.
        metrics: prepared images are counted there.
        budget_bytes: of a project no more is prepared than so much of memory holds; more would push out itself.
        pause_s: between two looks at the projects.
        again_s: between two looks at the images of a project of which nothing else has changed.
    """

    def __init__(
        self,
        index: ImageIndex,
        settings: ProjectSettings,
        *,
        clicks: Clicks,
        images: ImageSource,
        turns: Turns,
        metrics: Metrics,
        budget_bytes: int,
        pause_s: float = 2.0,
        again_s: float = 30.0,
    ) -> None:
        self._index = index
        self._settings = settings
        self._clicks = clicks
        self._images = images
        self._turns = turns
        self._metrics = metrics
        self._budget_bytes = budget_bytes
        self._pause_s = pause_s
        self._again_s = again_s
        self._done: dict[str, dict[Prepared, int]] = {}
        self._looked: dict[str, tuple[object, float]] = {}
        self._told: set[tuple[str, str]] = set()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to prepare, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="celloop-ahead", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread; an image that is being encoded is given up between two pieces of the work."""
        self._ended.set()
        self._turns.stop()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def prepare(self) -> int:
        """One look at all projects; returns how many images were prepared. Never raises.

        Called by the thread; a test may call it too.
        """
        try:
            rows = self._index.projects()
        except Exception as error:
            self._tell("the projects", error)
            return 0
        count = 0
        for row in rows:
            try:
                count += self._prepare_project(row)
            except Exception as error:
                self._tell(row.name, error)
        return count

    def _run(self) -> None:
        while not self._ended.is_set():
            self.prepare()
            self._ended.wait(self._pause_s)

    def _prepare_project(self, row: ProjectRow) -> int:
        number = self._settings.of(row.name).click.ahead
        by = self._clicks.answered_by(row.name)
        if not number or by is None:
            return 0
        state = (row.published_version, row.published_model, by.name, number)
        before, until = self._looked.get(row.name, (None, 0.0))
        if state == before and time.monotonic() < until:
            return 0
        rows = self._index.images(row.name, state="open")
        wanted = {(image.image_id, by.name): image for image in upcoming(rows, number)}
        done = self._done[row.name] = {
            key: nbytes for key, nbytes in self._done.get(row.name, {}).items() if key in wanted
        }
        count = 0
        for key, image in wanted.items():
            if self._ended.is_set() or sum(done.values()) > self._budget_bytes:
                break
            if self._clicks.answered_by(row.name) != by:  # another model took over: its own list is made at once
                return count
            if key not in done:
                done[key] = self._prepare_image(row, image, by)
                count += done[key] > 0
        self._looked[row.name] = (state, time.monotonic() + self._again_s)
        return count

    def _prepare_image(self, row: ProjectRow, image: ImageRow, by: Answerer) -> int:
        """How much memory the prepared image takes, bytes; 0 where it could not be prepared."""
        try:
            with self._images.open(image.display) as file:
                nbytes = by.look(file, Rank.AHEAD).nbytes
        except Exception as error:
            if not self._ended.is_set():
                self._tell(row.name, error)
            return 0
        self._metrics.prepared.labels(row.name, by.kind).inc()
        return nbytes

    def _tell(self, about: str, error: Exception) -> None:
        cause = (about, type(error).__name__)
        if cause not in self._told:
            self._told.add(cause)
            logger.warning(
                "not every next image of %s is prepared for clicks: %s: %s",
                *(about, type(error).__name__, error),
                exc_info=None if isinstance(error, LoopError) else error,
            )
