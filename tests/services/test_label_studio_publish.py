"""Publishing into a real Label Studio: what is published is what a person is served, however often it was killed."""

import uuid
from typing import Any

import httpx
import pytest

from label_studio_cases import add_tasks, cell, ranked
from loop.adapters.label_studio_api import LabelStudio, TaskPrediction
from loop.adapters.label_studio_http import Connection
from loop.errors import InputError, NonFiniteError, RefusedError

pytestmark = pytest.mark.services


class KilledError(Exception):
    """Stands for the death of the program."""


def state(studio: LabelStudio, project: int, tasks: list[int]) -> dict[str, Any]:
    """All that publishing is to settle."""
    return {
        "version": studio.project(project)["model_version"],
        "predictions": {
            task: [(p.model_version, round(p.score or 0, 6), p.result) for p in studio.predictions(task)]
            for task in tasks
        },
    }


def serve_and_submit(studio: LabelStudio, project: int, n: int, person: httpx.Client) -> list[int]:
    """Works `n` tasks off as the editor does and returns which ones were served."""
    served = []
    for _ in range(n):
        task = studio.next_task(project)
        assert task is not None
        by_other_door = person.get(f"/api/projects/{project}/next")
        assert by_other_door.json()["id"] == task["id"]
        (prediction,) = task["predictions"]
        served.append(task["id"])
        studio.submit(
            task["id"],
            prediction["result"],
            lead_time_s=2.5,
            unique_id=uuid.uuid4(),
            parent_prediction=prediction["id"],
        )
    return served


def test_person_is_served_each_round_in_the_published_order(studio, project, person):
    tasks = add_tasks(studio, project, 12)
    first_order = [7, 2, 11, 0, 5, 9, 1, 10, 4, 3, 8, 6]
    report = studio.publish(project, "cells-v1-r1", ranked(tasks, first_order), chunk=5)
    assert (report.created, report.kept, report.replaced_versions) == (12, 0, ())
    assert serve_and_submit(studio, project, 4, person) == [tasks[i] for i in first_order[:4]]

    second_order = [6, 10, 1, 3, 9, 8, 5, 4]
    report = studio.publish(project, "cells-v2-r2", ranked(tasks, second_order), chunk=5)
    assert (report.created, report.kept, report.replaced_versions) == (8, 0, ("cells-v1-r1",))
    for position in second_order:
        (prediction,) = studio.predictions(tasks[position])
        assert prediction.model_version == "cells-v2-r2"
    assert all(studio.predictions(tasks[i]) == [] for i in first_order[:4])
    assert serve_and_submit(studio, project, 8, person) == [tasks[i] for i in second_order]
    assert studio.next_task(project) is None


def test_publishing_again_changes_nothing_and_a_new_score_is_written_over(studio, project):
    tasks = add_tasks(studio, project, 4)
    studio.publish(project, "v1", ranked(tasks, [3, 1, 0, 2]))
    before = state(studio, project, tasks)
    steps: list[tuple[int, int]] = []
    report = studio.publish(project, "v1", ranked(tasks, [3, 1, 0, 2]), progress=lambda *step: steps.append(step))
    assert (report.created, report.kept, report.updated) == (0, 4, 0)
    assert steps == [(4, 4)]
    assert state(studio, project, tasks) == before
    report = studio.publish(project, "v1", ranked(tasks, [3, 1, 2, 0]))
    assert (report.created, report.kept, report.updated) == (0, 4, 2)
    assert studio.predictions(tasks[2])[0].score == pytest.approx(3 / 5)
    assert len(studio.predictions(tasks[2])) == 1


@pytest.mark.parametrize("reached", [False, True], ids=["before the server", "after the server"])
def test_killed_at_any_request_and_run_again_gives_the_same_state(
    studio, project, label_studio_server, monkeypatch, reached
):
    tasks = add_tasks(studio, project, 5)
    wanted = ranked(tasks, [4, 0, 3, 1, 2])
    deaths = 0
    for fatal in range(1, 20):
        studio.publish(project, "old", ranked(tasks, [0, 1, 2, 3, 4]))
        dying = LabelStudio(label_studio_server.url, label_studio_server.token)
        _die_at(monkeypatch, dying._connection, fatal, reached)
        try:
            dying.publish(project, "new", wanted, chunk=2)
        except KilledError:
            deaths += 1
            studio.publish(project, "new", wanted, chunk=2)
        assert state(studio, project, tasks) == {
            "version": "new",
            "predictions": {p.task_id: [("new", round(p.score, 6), p.result)] for p in wanted},
        }
        if deaths < fatal:
            break
    assert deaths == 5  # three imports, the switch, the deletion


def _die_at(monkeypatch: pytest.MonkeyPatch, connection: Connection, fatal: int, reached: bool) -> None:
    """The `fatal`-th request that writes kills the program, before or after Label Studio has done it."""
    send = connection._client.send
    written = 0

    def mortal(request: httpx.Request, **rest: Any) -> httpx.Response:
        nonlocal written
        written += request.method != "GET"
        if request.method == "GET" or written != fatal:
            return send(request, **rest)
        if reached:
            send(request, **rest)
        raise KilledError

    monkeypatch.setattr(connection._client, "send", mortal)


def test_killed_in_progress_and_run_again_keeps_what_was_there(studio, project):
    tasks = add_tasks(studio, project, 6)
    wanted = ranked(tasks, [5, 4, 3, 2, 1, 0])

    def die_at_four(done: int, total: int) -> None:
        if done == 4:
            raise KilledError

    with pytest.raises(KilledError):
        studio.publish(project, "v1", wanted, chunk=2, progress=die_at_four)
    report = studio.publish(project, "v1", wanted, chunk=2)
    assert (report.created, report.kept) == (2, 4)
    assert all(len(studio.predictions(task)) == 1 for task in tasks)


def test_request_of_a_dead_run_that_lands_late_leaves_no_duplicates(studio, project, label_studio_server):
    tasks = add_tasks(studio, project, 4)
    wanted = ranked(tasks, [3, 2, 1, 0])
    late = Connection(label_studio_server.url, label_studio_server.token)

    def land(done: int, total: int) -> None:
        if done == total:
            body = [{"task": p.task_id, "result": p.result, "score": p.score, "model_version": "v1"} for p in wanted]
            late.send("POST", f"/api/projects/{project}/import/predictions", body=body)

    studio.publish(project, "v1", wanted, progress=land)
    assert [len(studio.predictions(task)) for task in tasks] == [1, 1, 1, 1]


def test_invalid_region_is_found_and_its_task_named(studio, project):
    tasks = add_tasks(studio, project, 3)
    wanted = [TaskPrediction(task, [cell()], 0.1 * i) for i, task in enumerate(tasks)]
    wanted[1] = TaskPrediction(tasks[1], [cell(), cell(label="Mitochondrion", region_id="b")], 0.5)
    with pytest.raises(RefusedError, match=rf"stored 2 of 3.*dropped the one of task {tasks[1]} "):
        studio.publish(project, "v1", wanted)
    assert studio.project(project)["model_version"] == ""
    wanted[1] = TaskPrediction(tasks[1], [cell()], 0.5)
    report = studio.publish(project, "v1", wanted)
    assert (report.created, report.kept) == (1, 2)


def test_task_that_is_gone_is_named(studio, project):
    tasks = add_tasks(studio, project, 3)
    gone = max(tasks) + 1000
    wanted = [TaskPrediction(task, [cell()], 0.5) for task in [*tasks, gone]]
    with pytest.raises(RefusedError, match=rf"no task {gone} any more"):
        studio.publish(project, "v1", wanted)


def test_numbers_that_are_none_and_empty_orders_are_refused(studio, project):
    (task,) = add_tasks(studio, project, 1)
    with pytest.raises(NonFiniteError, match=f"score of task {task} is nan"):
        studio.publish(project, "v1", [TaskPrediction(task, [], float("nan"))])
    with pytest.raises(NonFiniteError, match=f"region of task {task}"):
        studio.publish(project, "v1", [TaskPrediction(task, [cell(float("inf"))], 0.5)])
    with pytest.raises(InputError, match="two predictions"):
        studio.publish(project, "v1", [TaskPrediction(task, [], 0.5)] * 2)
    with pytest.raises(InputError, match="no version"):
        studio.publish(project, " ", [TaskPrediction(task, [], 0.5)])
    with pytest.raises(InputError, match="0 tasks a request"):
        studio.publish(project, "v1", [TaskPrediction(task, [], 0.5)], chunk=0)
    assert studio.publish(project, "v1", []).created == 0
    assert studio.predictions(task) == []


def test_task_opens_with_the_prediction_to_correct(studio, project):
    (task,) = add_tasks(studio, project, 1)
    studio.publish(project, "v1", [TaskPrediction(task, [cell()], 0.5)])
    served = studio.next_task(project)
    assert served is not None
    assert served["predictions"][0]["result"] == [cell()]
    assert served["predictions"][0]["score"] == 0.5
