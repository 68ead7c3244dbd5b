"""From a request to the bytes of its reply: the work of /predict, without any HTTP framework. Runs in worker threads.

One request takes the champion and the version string once, at its start; a swap in between changes neither.
"""

import logging
import time
import uuid
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import orjson

from backend.errors import BadRequestError, BusyError, NoModelError
from backend.images import ImageFile, ImageSource
from backend.map_cache import MapCache
from backend.metrics import Metrics
from backend.model_slot import Champion, ModelSlot
from backend.projects import Projects, version_string
from backend.schemas import PredictRequest, Task, prediction_item
from backend.turns import Turns
from loop.config import PublishConfig
from loop.errors import ImageError, LoopError, NonFiniteError
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import prompts_from_context, to_results
from loop.models.click import Scene, cell_at
from loop.types import Instances

logger = logging.getLogger(__name__)

MAX_UNCERTAINTY = float(np.log(2.0))
parse_interface = lru_cache(maxsize=64)(Interface.parse)


@dataclass(frozen=True)
class _Job:
    """What one request is answered with, from its start to its end."""

    project: str
    champion: Champion
    version: str
    interface: Interface


class Service:
    """Answers batches and clicks of all projects with their champions.

    Args:
        projects: Label Studio id -> project.
        slot: project -> champion.
        images: task value -> image file.
        metrics: predictions, clicks and failures are counted there.
        map_cache_bytes: how much of probability maps is kept for clicks.
    """

    def __init__(
        self, projects: Projects, slot: ModelSlot, images: ImageSource, metrics: Metrics, *, map_cache_bytes: int
    ) -> None:
        self._projects = projects
        self._slot = slot
        self._images = images
        self._metrics = metrics
        self._turns = Turns()
        self._cache = MapCache(map_cache_bytes)
        self._tolerance_px = PublishConfig().tolerance_px
        self._stopped = False

    def stop(self) -> None:
        """Ends batches after the image they are at, so that the process can end."""
        self._stopped = True

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
        results: list[object] = []
        failed: list[tuple[Task, Exception]] = []
        for task in request.tasks:
            try:
                if self._stopped or time.monotonic() > deadline:
                    raise BusyError(f"{task.name} was not reached in time; ask again, or for fewer tasks at once")
                results.append(self._predict_task(task, job, alone=len(request.tasks) == 1))
            except Exception as error:
                results.append([])
                failed.append((task, error))
                _log_failure(request, task, error)
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

    def click(self, request: PredictRequest) -> bytes:
        """The reply to a click: the cell under it as one region, or none for background.

        Raises:
            UnknownProjectError, NoModelError, LabelError: nothing can be predicted.
            ImageError, ServiceError: the image cannot be read.
            BadRequestError: not exactly one task, or no context.
        """
        if len(request.tasks) != 1 or request.params.context is None:
            raise BadRequestError(f"{len(request.tasks)} tasks with a click; expected one task and its context")
        job = self._prepare(request)
        task = request.tasks[0]
        with self._images.open(_image_value(task, job.interface)) as file:
            scene = self._scene(file, job.champion, task)
        shape = (int(scene.probs.shape[1]), int(scene.probs.shape[2]))
        prompts = prompts_from_context(request.params.context, shape)
        cells = cell_at(
            scene,
            prompts,
            job.champion.segmenter.instance_config,
            image_id=_image_id(task),
            source="model",
            model_version=job.champion.label,
        )
        self._metrics.clicks.labels(job.project, "cell" if len(cells) else "background").inc()
        score = float(cells.scores[0]) if len(cells) else 0.0
        regions = to_results(
            _labelled(cells, prompts.label, job.interface),
            job.interface,
            tolerance_px=self._tolerance_px,
            id_seed=uuid.uuid4().hex,
        )
        return orjson.dumps({"results": [prediction_item(regions, score, job.version)]})

    def _prepare(self, request: PredictRequest) -> _Job:
        row = self._projects.find(request.project)
        champion = self._slot.get(row.name)
        if champion is None:
            self._slot.wake()
            raise NoModelError(f"project {row.name!r} has no model in service yet; `celloop round` makes the first one")
        interface = parse_interface(request.label_config or row.label_config)
        return _Job(row.name, champion, version_string(row, champion.label), interface)

    def _predict_task(self, task: Task, job: _Job, *, alone: bool) -> orjson.Fragment:
        with self._images.open(_image_value(task, job.interface)) as file:
            pixels = file.pixels()
        with self._turns.take(click=alone):
            prediction = job.champion.segmenter.predict(pixels, image_id=_image_id(task))
        regions = to_results(prediction.instances, job.interface, tolerance_px=self._tolerance_px)
        return prediction_item(regions, confidence(prediction.uncertainty), job.version)

    def _scene(self, file: ImageFile, champion: Champion, task: Task) -> Scene:
        """What the champion sees in an image, from the cache where it is there already."""
        key = (file.sha256, champion.label)
        scene = self._cache.get(key)
        if scene is None:
            pixels = file.pixels()
            with self._turns.take(click=True):
                scene = self._cache.get(key)
                if scene is None:
                    scene = champion.segmenter.scene(pixels)
                    if not np.isfinite(scene.probs).all():
                        raise NonFiniteError(f"{champion.label} gives NaN for the image of {task.name}")
                    self._cache.put(key, scene)
                    self._metrics.maps.labels("miss").inc()
                    self._metrics.map_bytes.set(self._cache.size_bytes)
                    return scene
        self._metrics.maps.labels("hit").inc()
        return scene


def _log_failure(request: PredictRequest, task: Task, error: Exception) -> None:
    logger.warning(
        "%s of Label Studio project %d is not predicted: %s: %s",
        task.name,
        request.project,
        type(error).__name__,
        error,
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


def _image_value(task: Task, interface: Interface) -> object:
    key = interface.image_value_key
    if key not in task.data:
        raise ImageError(f"{task.name} has no {key!r} but {sorted(task.data)[:10]}; the label config shows ${key}")
    return task.data[key]


def _image_id(task: Task) -> str:
    """The image's id where `celloop init` made the task, else one from the task's number."""
    known = task.data.get("celloop_id")
    return known if isinstance(known, str) and known else f"task-{task.id}"


def _labelled(cells: Instances, label: str, interface: Interface) -> Instances:
    """The cells under the label that the person chose, where masks can have it, else under the first one."""
    index = interface.labels.index(label) if interface.mask_control(label) is not None else 0
    return replace(cells, labels=np.full(len(cells), index, np.int32))
