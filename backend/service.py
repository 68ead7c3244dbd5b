"""From a request to the bytes of its reply: the work of /predict, without any HTTP framework. Runs in worker threads.

One request takes the champion and the version string once, at its start; a swap in between changes neither.
"""

import hashlib
import logging
import time
from dataclasses import dataclass

import numpy as np
import orjson

from backend.clicks import Clicks
from backend.errors import MAX_DETAIL, BusyError, NoModelError
from backend.images import ImageSource
from backend.map_cache import MapCache
from backend.metrics import Metrics
from backend.model_slot import Champion, ModelSlot
from backend.project_settings import ProjectSettings
from backend.projects import Projects, version_string
from backend.schemas import PredictRequest, Task, prediction_item
from backend.tasks import image_id, image_value, interface_of
from backend.turns import Rank, Turns
from loop.config import PublishConfig
from loop.errors import LoopError, NonFiniteError
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import to_results

logger = logging.getLogger(__name__)

MAX_UNCERTAINTY = float(np.log(2.0))
REPLY_BYTES = 32 * 2**20
"""Finished predictions that are kept, for tasks that are opened again."""
ENTRY_BYTES = 400
"""What keeping one costs beside its text."""


@dataclass(frozen=True)
class _Job:
    """What one batch is answered with, from its start to its end; `label_config` is what `interface` was read from."""

    project: str
    champion: Champion
    version: str
    interface: Interface
    label_config: str
    publish: PublishConfig

    def key(self, task: Task, sha256: str) -> bytes:
        """Of the same key a task has the same prediction. A digest: whoever calls may send names of any length."""
        ours = (self.champion.label, self.version, self.label_config, self.publish)
        return hashlib.sha256(repr((self.project, task.id, image_id(task), sha256, *ours)).encode()).digest()


class Service:
    """Answers batches of all projects with their champions, and hands clicks on.

    Args:
        projects: Label Studio id -> project.
        settings: project -> its settings.
        slot: project -> champion.
        images: task value -> image file.
        clicks: who answers them.
        turns: models work one at a time.
        metrics: predictions and failures are counted there.
    """

    def __init__(
        self,
        projects: Projects,
        settings: ProjectSettings,
        *,
        slot: ModelSlot,
        images: ImageSource,
        clicks: Clicks,
        turns: Turns,
        metrics: Metrics,
    ) -> None:
        self._projects = projects
        self._settings = settings
        self._slot = slot
        self._images = images
        self._clicks = clicks
        self._turns = turns
        self._metrics = metrics
        self._replies: MapCache[bytes, orjson.Fragment] = MapCache(REPLY_BYTES, size=_size)
        self._stopped = False

    def stop(self) -> None:
        """Ends batches after the image they are at, so that the process can end."""
        self._stopped = True

    def click(self, request: PredictRequest) -> bytes:
        """The reply to a click; see `backend.clicks.Clicks.answer`."""
        return self._clicks.answer(request)

    def predict(self, request: PredictRequest, *, deadline: float) -> bytes:
        """The reply to a batch: {"results": one entry a task, in order}.

        A task that cannot be predicted gets the empty list, of which Label Studio stores nothing (an empty prediction
        would say "no cells here"); "errors" says why, for other callers. Likewise the tasks that are not reached
        before `deadline` (time.monotonic()): Label Studio asks for them again when they are opened.

        Raises:
            UnknownProjectError, NoModelError, LabelError: nothing can be predicted.
            LoopError: of the first task, where none at all could be predicted.
        """
        job = self._prepare(request)
        rank = Rank.OPEN if len(request.tasks) == 1 else Rank.BATCH
        results: list[object] = []
        failed: list[tuple[Task, Exception]] = []
        for task in request.tasks:
            try:
                if self._stopped or time.monotonic() > deadline:
                    raise BusyError(f"{task.name} was not reached in time; ask again, or for fewer tasks at once")
                results.append(self._predict_task(task, job, rank))
            except Exception as error:
                results.append([])
                failed.append((task, error))
                if not isinstance(error, BusyError):
                    _log_failure(request, task, error)
        late = sum(isinstance(fault, BusyError) for _, fault in failed)
        if late:
            total, project = len(results), request.project
            logger.warning("%d of %d tasks of Label Studio project %d were not reached in time", late, total, project)
        done = len(results) - len(failed)
        self._metrics.predictions.labels(job.project).inc(done)
        for _, fault in failed[0 if done else 1 :]:  # the one that is raised is counted where it is answered
            self._metrics.failed(type(fault).__name__)
        if failed and not done:
            raise failed[0][1]
        reply: dict[str, object] = {"results": results}
        if failed:
            reply["errors"] = [{"task": task.id, "error": type(fault).__name__} for task, fault in failed]
        return orjson.dumps(reply)

    def _prepare(self, request: PredictRequest) -> _Job:
        row = self._projects.recent(request.project)
        champion = self._slot.get(row.name)
        if champion is None:
            self._slot.wake()
            raise NoModelError(f"project {row.name!r} has no model in service yet; `celloop round` makes the first one")
        config = self._settings.of(row.name)
        interface = interface_of(request, row, config)
        label_config = request.label_config or row.label_config
        version = version_string(row, champion.label)
        return _Job(row.name, champion, version, interface, label_config, config.publish)

    def _predict_task(self, task: Task, job: _Job, rank: Rank) -> orjson.Fragment:
        """One prediction as JSON; kept for when the task is opened again and neither image nor model has changed."""
        with self._images.open(image_value(task, job.interface)) as file:
            key = job.key(task, file.sha256)
            kept = self._replies.get(key)
            if kept is not None:
                return kept
            pixels = file.pixels()
        with self._turns.take(rank):
            kept = self._replies.get(key)
            if kept is not None:
                return kept
            prediction = job.champion.segmenter.predict(pixels, image_id=image_id(task))
        regions = to_results(
            prediction.instances,
            job.interface,
            tolerance_px=job.publish.tolerance_px,
            max_points=job.publish.max_points,
        )
        item = prediction_item(regions, confidence(prediction.uncertainty), job.version)
        self._replies.put(key, item)
        return item


def _size(item: orjson.Fragment) -> int:
    return ENTRY_BYTES + len(orjson.dumps(item))


def _log_failure(request: PredictRequest, task: Task, error: Exception) -> None:
    logger.warning(
        "%s of Label Studio project %d is not predicted: %s: %s",
        task.name,
        request.project,
        type(error).__name__,
        str(error)[:MAX_DETAIL],
        exc_info=None if isinstance(error, LoopError) else error,
    )


def confidence(uncertainty: float) -> float:
    """An uncertainty in [0, ln 2] as Label Studio's score in [0, 1]: small = most informative.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if not np.isfinite(uncertainty):
        raise NonFiniteError(f"uncertainty {uncertainty}; the prediction is not sent")
    return float(np.clip(1.0 - uncertainty / MAX_UNCERTAINTY, 0.0, 1.0))
