"""Holds the SAMs that answer clicks, one for each set of weights that a project's settings ask for.

A thread looks every few seconds at the projects and their settings and loads what is missing; no request ever waits for
it. Where there are no weights, or they cannot be used, the champion answers clicks, and the log says why.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from backend.metrics import Metrics
from backend.project_settings import ProjectSettings
from backend.projects import ProjectIndex
from loop.config import LoopConfig
from loop.errors import CheckpointError, LoopError
from loop.models.sam import Sam
from loop.models.sam_weights import checkpoint_path, load_sam

logger = logging.getLogger(__name__)


class Weights(NamedTuple):
    """Which weights: the kind of SAM and its file, "" for the published one."""

    kind: str
    checkpoint: str


LoadSam = Callable[[Weights], Sam]
_Stamp = tuple[int, int, int]


def load_weights(weights: Weights, *, device: str = "auto") -> Sam:
    """The SAM of these weights.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    return load_sam(weights.kind, weights.checkpoint, device=device)


def _wanted(config: LoopConfig) -> Weights | None:
    """The weights that the settings ask for; None where the champion is to answer."""
    if config.click.model == "champion":
        return None
    return Weights(config.pseudo.sam.kind, config.pseudo.sam.checkpoint)


class SamSlot:
    """The SAMs by project name.

    Args:
        index: says which projects there are.
        settings: the projects' settings.
        metrics: failures are counted there, and which SAMs are held.
        load: from weights to a SAM.
        poll_s: seconds between two looks at the projects.
        retry_s: seconds after which weights that could not be loaded are tried again.
    """

    def __init__(
        self,
        index: ProjectIndex,
        settings: ProjectSettings,
        metrics: Metrics,
        *,
        load: LoadSam = load_weights,
        poll_s: float = 3.0,
        retry_s: float = 60.0,
    ) -> None:
        self._index = index
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._held: dict[Weights, Sam] = {}
        self._read: dict[Weights, _Stamp | None] = {}
        self._given_up: dict[Weights, float] = {}
        self._told: dict[object, str] = {}
        self._looking = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def of(self, project: str) -> Sam | None:
        """The SAM that answers clicks of a project now; None: the champion does. Never waits, never fails."""
        weights = _wanted(self._settings.of(project))
        return None if weights is None else self._held.get(weights)

    def start(self) -> None:
        """Begins to look, in a thread of its own; the first look is at once."""
        self._thread = threading.Thread(target=self._run, name="celloop-sams", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread; one that is loading weights at this moment is left to the end of the process."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def refresh(self) -> None:
        """One look at all projects; loads what is missing and lets go what nobody asks for any more. Never raises.

        Called by the thread; a test may call it too.
        """
        with self._looking:
            try:
                names = [row.name for row in self._index.projects()]
                asked = {name: _wanted(self._settings.of(name)) for name in names}
            except Exception as error:
                self._failed("index", "it is not looked up which SAM answers clicks", error)
                return
            self._told.pop("index", None)
            self._hold({weights: sam for weights, sam in self._held.items() if weights in asked.values()})
            for weights in dict.fromkeys(filter(None, asked.values())):
                if not self._ended.is_set():
                    self._look(weights, [name for name in names if asked[name] == weights])

    def _run(self) -> None:
        self.refresh()
        while not self._ended.wait(self._poll_s):
            self.refresh()

    def _look(self, weights: Weights, projects: list[str]) -> None:
        """Loads the weights that some projects ask for where that is due; until then an earlier SAM serves."""
        if time.monotonic() < self._given_up.get(weights, 0.0):
            return
        held = self._held.get(weights)
        named = f"clicks in {', '.join(projects)} are answered by"
        try:
            self._fetch(weights, held, named, all(self._settings.of(name).click.model == "auto" for name in projects))
        except Exception as error:
            self._given_up[weights] = time.monotonic() + self._retry_s
            by = "the champion instead of SAM" if held is None else f"SAM {held.version} still, not by the new file"
            self._failed(weights, f"{named} {by}", error)

    def _fetch(self, weights: Weights, held: Sam | None, named: str, optional: bool) -> None:
        """Loads a file of weights that is new; raises what is wrong with it, but not that an optional one is absent."""
        try:
            status = checkpoint_path(weights.kind, weights.checkpoint).stat()
            stamp: _Stamp | None = (status.st_ino, status.st_size, status.st_mtime_ns)
        except (CheckpointError, FileNotFoundError) as error:
            if held is None and optional:
                self._tell(logging.INFO, weights, f"{named} the champion: {error}")
                return
            stamp = None
        if held is not None and stamp in (None, self._read[weights]):
            return
        sam = self._load(weights)
        self._read[weights] = stamp
        self._hold({**self._held, weights: sam})
        self._tell(logging.INFO, weights, f"{named} SAM {sam.version}")

    def _hold(self, held: dict[Weights, Sam]) -> None:
        if held != self._held:
            self._held = held
            self._metrics.sam.clear()
            for sam in held.values():
                self._metrics.sam.labels(sam.version).set(1)

    def _failed(self, about: object, what: str, error: Exception) -> None:
        self._metrics.failed(type(error).__name__)
        self._tell(logging.WARNING, about, f"{what}: {type(error).__name__}: {error}", error)

    def _tell(self, level: int, about: object, text: str, error: Exception | None = None) -> None:
        """Logs what is new about something; the same text again is not."""
        if self._told.get(about) != text:
            self._told[about] = text
            logger.log(level, "%s", text, exc_info=None if isinstance(error, LoopError) else error)
