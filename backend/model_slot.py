"""Holds the champion of each project and takes a new one into service without a stop.

A thread asks the registry every few seconds. A new champion is loaded and tried beside the old one and then put in its
place in one assignment; whoever got the old one keeps it to the end of his request. While MLflow is away, or when the
new model cannot be loaded, the old one stays; after a start without MLflow it is the one that made what is published.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backend.metrics import Metrics
from backend.projects import ProjectIndex
from loop.adapters.index import ProjectRow
from loop.errors import CheckpointError, LoopError, UnreachableError
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)

TRIAL_SIDE = 64


class Version(Protocol):
    """What the slot needs of a registered model version."""

    @property
    def label(self) -> str:
        """The version's name everywhere, "celloop-<project>-v<N>"."""


class ChampionSource(Protocol):
    """What the slot needs of a project's registry (loop.adapters.mlflow_registry.Registry)."""

    def champion(self) -> Version | None:
        """The version that the alias `champion` names, or None."""

    def download(self, version: Any, cache_dir: Path) -> Path:
        """The directory `cache_dir`/LABEL with the version's checkpoint."""


OpenRegistry = Callable[[str], ChampionSource]
LoadSegmenter = Callable[[Path, str], Segmenter]


@dataclass(frozen=True)
class Champion:
    """A model in service: the registry's label of its version, and what predicts with it."""

    label: str
    segmenter: Segmenter


def load_segmenter(directory: Path, label: str, *, device: str = "auto") -> Segmenter:
    """The segmenter of a checkpoint directory, tried on an empty image.

    Raises:
        CheckpointError: the checkpoint is damaged, or the model gives NaN.
    """
    checkpoint = load_checkpoint(directory, device=device)
    segmenter = Segmenter(
        checkpoint.net, checkpoint.model_config, checkpoint.instance_config, device=device, model_version=label
    )
    channels = checkpoint.model_config.in_channels
    if not np.isfinite(segmenter.maps(np.zeros((TRIAL_SIDE, TRIAL_SIDE, channels), np.uint8))).all():
        raise CheckpointError(f"{label} gives NaN for an empty image; it is not taken into service")
    return segmenter


class ModelSlot:
    """The champions by project name.

    Args:
        index: says which projects there are.
        open_registry: project name -> its registry.
        cache_dir: where checkpoints are kept.
        metrics: model info, swaps and failures are counted there.
        load: checkpoint directory and label -> segmenter.
        poll_s: seconds between two looks at the registry.
        retry_s: seconds after which a model that could not be loaded is tried again.
    """

    def __init__(
        self,
        index: ProjectIndex,
        open_registry: OpenRegistry,
        cache_dir: Path,
        metrics: Metrics,
        *,
        load: LoadSegmenter = load_segmenter,
        poll_s: float = 3.0,
        retry_s: float = 60.0,
    ) -> None:
        self._index = index
        self._open_registry = open_registry
        self._cache_dir = cache_dir
        self._metrics = metrics
        self._load = load
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._held: dict[str, Champion] = {}
        self._registries: dict[str, ChampionSource] = {}
        self._given_up: dict[str, tuple[str, float]] = {}
        self._complaints: dict[str, str] = {}
        self._looking = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def get(self, project: str) -> Champion | None:
        """The model in service; hold on to the returned object for the whole of a request."""
        return self._held.get(project)

    def labels(self) -> dict[str, str]:
        """Project name -> label of the model in service."""
        return {project: champion.label for project, champion in self._held.items()}

    def start(self) -> None:
        """Begins to look, in a thread of its own; the first look is at once."""
        self._thread = threading.Thread(target=self._run, name="celloop-champions", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread; one that is loading a model at this moment is left to the end of the process."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def wake(self) -> None:
        """Looks now instead of at the next turn."""
        self._wake.set()

    def refresh(self) -> None:
        """One look at every project's champion; loads what is new. Failures are logged once and counted, never raised.

        Called by the thread; a test may call it too.
        """
        with self._looking:
            try:
                rows = self._index.projects()
            except Exception as error:
                self._complain("the index", error)
                return
            self._settled("the index")
            for row in rows:
                try:
                    self._refresh_project(row)
                except Exception as error:
                    self._complain(row.name, error)
                else:
                    self._settled(row.name)
                if self._stopped:
                    return

    def _run(self) -> None:
        while not self._stopped:
            self.refresh()
            self._wake.wait(self._poll_s)
            self._wake.clear()

    def _refresh_project(self, row: ProjectRow) -> None:
        project = row.name
        registry = self._registries.get(project)
        if registry is None:
            registry = self._registries[project] = self._open_registry(project)
        held = self._held.get(project)
        try:
            version = registry.champion()
        except UnreachableError:
            kept = self._cache_dir / row.published_model
            if held is None and row.published_model and kept.is_dir():
                self._take(project, row.published_model, self._load(kept, row.published_model))
            raise
        if version is None or (held is not None and held.label == version.label):
            self._given_up.pop(project, None)
            return
        label, until = self._given_up.get(project, ("", 0.0))
        if label == version.label and time.monotonic() < until:
            return
        try:
            segmenter = self._load(registry.download(version, self._cache_dir), version.label)
        except Exception:
            self._given_up[project] = (version.label, time.monotonic() + self._retry_s)
            raise
        self._given_up.pop(project, None)
        self._take(project, version.label, segmenter)

    def _take(self, project: str, label: str, segmenter: Segmenter) -> None:
        held = self._held.get(project)
        self._held = {**self._held, project: Champion(label, segmenter)}
        self._metrics.holds(project, label, held.label if held else None)
        logger.info("project %s: %s takes over from %s", project, label, held.label if held else "nothing")

    def _complain(self, about: str, error: Exception) -> None:
        self._metrics.failed(type(error).__name__)
        text = f"{type(error).__name__}: {error}"
        if self._complaints.get(about) != text:
            self._complaints[about] = text
            held = self._held.get(about)
            logger.warning(
                "champion of %s not looked up: %s; staying with %s",
                about,
                text,
                held.label if held else "what is held",
                exc_info=None if isinstance(error, LoopError) else error,
            )

    def _settled(self, about: str) -> None:
        if self._given_up.get(about) is None and self._complaints.pop(about, None) is not None:
            logger.info("champion of %s can be looked up again", about)
