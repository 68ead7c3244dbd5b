"""Predictions into Label Studio so that the next task a person opens is the one with the lowest score.

Label Studio orders a project by the predictions whose version is `project.model_version` and shows only those, so a new
version is imported in full first, then named as the project's, and only then are the older ones deleted. Whoever dies
between two of these steps runs `publish` again: it looks at what is there and does what is left.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from loop.adapters.label_studio_http import Connection, StatusError, delete, encode
from loop.adapters.label_studio_tasks import LISTED, list_tasks
from loop.errors import InputError, NonFiniteError, RefusedError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

REQUEST_BYTES = 32_000_000
"""A request is no longer than this: some 350 tasks of 100 polygons, 6 s of Label Studio's time on a slow machine."""


@dataclass(frozen=True)
class TaskPrediction:
    """One task's prediction: Label Studio result items and a finite score, the lowest of which is served first."""

    task_id: int
    result: list[dict[str, Any]]
    score: float


@dataclass(frozen=True)
class Prediction:
    """A prediction as Label Studio holds it."""

    id: int
    task_id: int
    model_version: str
    score: float | None
    result: list[dict[str, Any]]
    created_at: datetime


@dataclass(frozen=True)
class PublishReport:
    """What `publish` found and did: tasks whose prediction is new, was there, or was there with another score."""

    created: int
    kept: int
    replaced_versions: tuple[str, ...]
    updated: int = 0


def publish(
    connection: Connection,
    project_id: int,
    version: str,
    predictions: Sequence[TaskPrediction],
    *,
    chunk: int = 500,
    progress: Progress | None = None,
) -> PublishReport:
    """Makes `version` the one prediction of each task given, the project's version, and the only version there.

    Predictions of `version` that are there already are kept, duplicates among them deleted, and a changed score is
    written over. Without predictions nothing is changed, for a project's version must have one.

    Args:
        connection: to Label Studio.
        project_id: Label Studio's number of the project.
        version: a name that no other set of predictions has; not that of an attached backend.
        predictions: one for each task; result items that Label Studio's label config knows.
        chunk: tasks a request at most. Each request makes Label Studio count anew in all tasks of the project, so few
            large ones are faster: 2000 tasks take 47 s in requests of 50 and 18 s in requests of 200.
        progress: called as `progress(done, total)` in tasks, after each request.

    Raises:
        InputError: no version, chunk < 1, or a task given twice.
        NonFiniteError: a score or a coordinate is NaN or infinite; names the task.
        RefusedError: Label Studio dropped a prediction as invalid, or a task is gone; names the tasks.
        UnreachableError: no answer; run it again.

    Cost: about 17 ms for a task of 100 polygons; on a run that finds some of the work done, one small request more a
    task (15 ms).
    """
    _check(version, predictions, chunk)
    if not predictions:
        return PublishReport(0, 0, ())
    report = progress or _silent
    kept, updated = _take_stock(connection, project_id, version, predictions)
    report(len(kept), len(predictions))
    missing = [p for p in predictions if p.task_id not in kept]
    strangers = stored_versions(connection, project_id).get(version, 0) - len(kept)
    done = len(kept)
    for tasks, content in _requests(version, missing, chunk):
        _import(connection, project_id, version, tasks, content)
        done += len(tasks)
        report(done, len(predictions))
    if stored_versions(connection, project_id).get(version, 0) != len(predictions) + strangers:
        # a request of a run that died earlier was still at work inside Label Studio
        _take_stock(connection, project_id, version, predictions)
    replaced = _switch(connection, project_id, version)
    logger.info("project %s shows %s: %d predictions new, %d kept", project_id, version, len(missing), len(kept))
    return PublishReport(len(missing), len(kept), replaced, updated)


def predictions_of(connection: Connection, task_id: int) -> list[Prediction]:
    """All predictions of a task, every version, oldest first; does not open the task, so no backend is asked."""
    found = [
        Prediction(
            id=int(item.id),
            task_id=int(item.task),
            model_version=item.model_version or "",
            score=item.score,
            result=item.result,
            created_at=item.created_at,
        )
        for item in connection.sdk.predictions.list(task=task_id)
    ]
    return sorted(found, key=lambda prediction: prediction.id)


def stored_versions(connection: Connection, project_id: int) -> dict[str, int]:
    """How many predictions there are of each version, which the SDK cannot ask; those without one stand under ""."""
    found = connection.get(f"/api/projects/{project_id}/model-versions/", extended="true")
    return {item["model_version"] or "": int(item["count"]) for item in found["static"]}


def delete_version(connection: Connection, project_id: int, version: str) -> int:
    """Deletes all predictions of a version, which the SDK cannot; returns how many.

    Where it is the project's own version, the project has none afterwards.
    """
    path = f"/api/projects/{project_id}/model-versions/"
    answer: dict[str, Any] = connection.send("DELETE", path, body={"model_version": version}).body
    return int(answer["deleted_predictions"])


def existing_tasks(connection: Connection, project_id: int, task_ids: Sequence[int]) -> set[int]:
    """Those of `task_ids` that the project has."""
    found: set[int] = set()
    for start in range(0, len(task_ids), LISTED):
        selected = {"all": False, "included": list(task_ids[start : start + LISTED])}
        found.update(int(task.id) for task in list_tasks(connection, project_id, selectedItems=selected))
    return found


def _check(version: str, predictions: Sequence[TaskPrediction], chunk: int) -> None:
    if not version.strip():
        raise InputError("no version to publish predictions under was given; expected a name like cells-v3-r4")
    if chunk < 1:
        raise InputError(f"{chunk} tasks a request were asked for; expected 1 or more")
    seen: set[int] = set()
    for prediction in predictions:
        if prediction.task_id in seen:
            raise InputError(f"task {prediction.task_id} has two predictions of {version}; give one for each task")
        seen.add(prediction.task_id)
        if not math.isfinite(prediction.score):
            raise NonFiniteError(
                f"the score of task {prediction.task_id} is {prediction.score}; expected a finite number"
            )


def _silent(done: int, total: int) -> None:
    pass


def _take_stock(
    connection: Connection, project_id: int, version: str, predictions: Sequence[TaskPrediction]
) -> tuple[set[int], int]:
    """Tasks that have `version`, each now once and with the wanted score, and how many scores had to be changed."""
    if not stored_versions(connection, project_id).get(version):
        return set(), 0
    kept: set[int] = set()
    updated = 0
    for wanted in predictions:
        there = [p for p in predictions_of(connection, wanted.task_id) if p.model_version == version]
        for duplicate in there[1:]:
            delete(connection.sdk.predictions.delete, duplicate.id)
        if not there:
            continue
        kept.add(wanted.task_id)
        if there[0].score is None or not math.isclose(there[0].score, wanted.score, abs_tol=1e-9):
            connection.sdk.predictions.update(
                there[0].id, task=wanted.task_id, result=wanted.result, score=wanted.score
            )
            updated += 1
    return kept, updated


def _requests(version: str, predictions: Sequence[TaskPrediction], chunk: int) -> Iterator[tuple[list[int], bytes]]:
    """The predictions as bodies of import requests, each with the tasks in it; encoded once, a request at a time."""
    tasks: list[int] = []
    items: list[bytes] = []
    size = 0
    for p in predictions:
        try:
            item = encode({"task": p.task_id, "result": p.result, "score": p.score, "model_version": version})
        except ValueError as error:
            raise NonFiniteError(
                f"a region of task {p.task_id} holds NaN or infinity; expected finite coordinates and scores"
            ) from error
        if tasks and (len(tasks) == chunk or size + len(item) > REQUEST_BYTES):
            yield tasks, b"[" + b",".join(items) + b"]"
            tasks, items, size = [], [], 0
        tasks.append(p.task_id)
        items.append(item)
        size += len(item)
    if tasks:
        yield tasks, b"[" + b",".join(items) + b"]"


def _import(connection: Connection, project_id: int, version: str, tasks: Sequence[int], content: bytes) -> None:
    """One request of our own: the SDK takes five times as long to encode it, and its length is to be known before."""
    path = f"/api/projects/{project_id}/import/predictions"
    try:
        created = int(connection.send("POST", path, content=content).body["created"])
    except StatusError as error:
        if error.status != 400:
            raise
        gone = set(tasks) - existing_tasks(connection, project_id, tasks)
        if gone:
            raise RefusedError(
                f"project {project_id} has no task {_listed(gone)} any more, so nothing of these {len(tasks)} "
                "predictions was stored; sync, so that deleted tasks leave the pool, then publish again"
            ) from error
        raise RefusedError(f"Label Studio took none of {len(tasks)} predictions: {str(error.body)[:600]}") from error
    if created != len(tasks):
        dropped = [t for t in tasks if not any(p.model_version == version for p in predictions_of(connection, t))]
        raise RefusedError(
            f"Label Studio stored {created} of {len(tasks)} predictions and dropped the one of task "
            f"{_listed(dropped)} without a word; a region there names a control or a label that the project's label "
            "config lacks, or lies outside 0..100 %. Mend the label config or the result, then publish again"
        )


def _listed(tasks: Sequence[int] | set[int]) -> str:
    shown = ", ".join(str(task) for task in sorted(tasks)[:20])
    return shown if len(tasks) <= 20 else f"{shown} and {len(tasks) - 20} more"


def _switch(connection: Connection, project_id: int, version: str) -> tuple[str, ...]:
    """Names `version` as the project's and deletes every other one, in this order; returns the deleted names."""
    projects = connection.sdk.projects
    projects.update(project_id, model_version=version)
    others = [name for name in stored_versions(connection, project_id) if name != version]
    for name in others:
        if name:
            delete_version(connection, project_id, name)
    if "" in others:
        logger.warning("project %s has predictions without a version; Label Studio cannot delete these", project_id)
    if projects.get(project_id).model_version != version:
        # deleting any version also unsets the project's when a backend's title is that name
        projects.update(project_id, model_version=version)
    return tuple(sorted(name for name in others if name))
