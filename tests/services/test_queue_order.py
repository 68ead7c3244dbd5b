"""The queue on a real Label Studio: what verify_queue finds, an interrupted publish, and two people at it at once."""

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from flows.queue import verify_queue
from label_studio_cases import CONFIG, cell
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import LabelStudio, TaskPrediction
from loop.adapters.label_studio_http import Connection

pytestmark = pytest.mark.services


class KilledError(Exception):
    """Stands for the death of the program."""


@pytest.fixture(scope="module")
def second(label_studio_server: Any) -> Iterator[LabelStudio]:
    """Somebody else, who has signed up."""
    with httpx.Client(base_url=label_studio_server.url, follow_redirects=True, timeout=60) as browser:
        browser.get("/user/signup/")
        email = f"queue-{uuid.uuid4().hex[:8]}@example.com"
        form = {"email": email, "password": "a-long-word", "csrfmiddlewaretoken": browser.cookies["csrftoken"]}
        browser.post("/user/signup/", data=form).raise_for_status()
        token = browser.get("/api/current-user/token").json()["token"]
    adapter = LabelStudio(label_studio_server.url, token)
    yield adapter
    adapter.close()


@dataclass
class Stage:
    """Tasks in Label Studio with their rows in the index; `order` publishes and notes an order as a round does."""

    index: Index
    studio: LabelStudio
    number: int
    tasks: list[int]

    def order(self, version: str, positions: list[int], batch: int, studio: LabelStudio | None = None) -> None:
        n = len(positions)
        entries = [
            TaskPrediction(self.tasks[i], [cell(10.0 + i)], rank / (n + 1)) for rank, i in enumerate(positions, start=1)
        ]
        (studio or self.studio).publish(self.number, version, entries, chunk=4)
        self.index.set_published("cells", version, "model")
        ranks: dict[int, int | None] = {i: None for i in range(len(self.tasks))}
        ranks |= {i: rank for rank, i in enumerate(positions[:batch], start=1)}
        self.index.set_images("cells", {f"i{i}": {"rank": rank, "score": 0.5} for i, rank in ranks.items()})

    def verify(self) -> tuple[str, ...]:
        context: Any = SimpleNamespace(index=self.index, label_studio=self.studio, project_name="cells")
        return verify_queue(context).lines

    def next_of(self, who: LabelStudio) -> int | None:
        served = who.next_task(self.number)
        return None if served is None else self.tasks.index(served["id"])

    def done(self, who: LabelStudio, position: int, **more: Any) -> None:
        who.submit(self.tasks[position], [], lead_time_s=1.0, unique_id=uuid.uuid4(), **more)


@pytest.fixture
def stage(studio: LabelStudio, project: int, tmp_path: Path) -> Iterator[Stage]:
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    row = index.add_project("cells", ls_project_id=project, root=tmp_path, label_config=CONFIG)
    rows = [ImageRow(row.id, f"i{n}", "0" * 64, f"i{n}.png", f"/data/i{n}.png", height=48, width=64) for n in range(10)]
    data = [{"data": {"image": image.display, "celloop_id": image.image_id}} for image in rows]
    tasks = studio.import_tasks(project, data)
    index.add_images("cells", [replace(image, task_id=task) for image, task in zip(rows, tasks, strict=True)])
    yield Stage(index, studio, project, tasks)
    index.close()


FIRST = [7, 2, 9, 0, 5, 4, 1, 8, 3, 6]
LATER = [6, 3, 8, 1, 4, 5, 0, 9, 2, 7]


def test_a_published_queue_is_whole_and_each_fault_of_it_is_named(stage: Stage, studio: LabelStudio) -> None:
    assert stage.verify() == ()
    stage.order("v-r1", FIRST, batch=4)
    assert stage.verify() == ()
    stage.done(studio, 7)
    assert stage.verify() == (), "what was labelled meanwhile is no fault"
    connection, tasks = studio._connection, stage.tasks

    studio.update_project(stage.number, sampling="Sequential sampling", model_version="")
    found = stage.verify()
    assert "names no version and not 'v-r1'" in found[0]
    assert "set to 'Sequential sampling'" in found[1]
    studio.update_project(stage.number, sampling="Uncertainty sampling", model_version="v-r1")

    predictions = connection.sdk.predictions
    predictions.create(task=tasks[3], result=[], score=0.95, model_version="v-r1")
    predictions.create(task=tasks[3], result=[], score=0.9, model_version="old-r0")
    missing, wrong = studio.predictions(tasks[1])[0], studio.predictions(tasks[2])[0]
    predictions.delete(missing.id)
    predictions.update(wrong.id, task=tasks[2], result=[], score=0.99)
    found = stage.verify()
    assert len(found) == 4
    assert "not published: 1 of 'old-r0'" in found[0]
    assert f"several predictions of one version in task {tasks[3]} (i3)" in found[1]
    assert f"no prediction with a score in task {tasks[1]} (i1)" in found[2]
    assert f"not served by rank: task {tasks[9]} (i9)" in found[3]


def test_a_publish_killed_before_it_is_complete_leaves_the_old_order(
    stage: Stage, label_studio_server: Any, second: LabelStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each writing request in turn: three imports, then the PATCH of the version, then the deletion."""
    stage.order("old-r1", FIRST, batch=4)
    stage.index.open_round("cells")
    stage.index.update_round("cells", 0, status="done")
    stage.index.open_round("cells")
    for killed_at in ("1st import", "2nd import", "3rd import", "PATCH", "DELETE"):
        dying = LabelStudio(label_studio_server.url, label_studio_server.token)
        # what was imported stays, so each attempt comes one request further
        _die_at(monkeypatch, dying._connection, 1 if killed_at == "1st import" else 2)
        with pytest.raises(KilledError):
            stage.order("new-r1", LATER, batch=4, studio=dying)
        complete = killed_at == "DELETE"
        assert stage.studio.project(stage.number)["model_version"] == ("new-r1" if complete else "old-r1")
        if not complete:
            assert stage.verify() == ()
        state = stage.studio.queue(stage.number, first=10)
        assert [stage.tasks.index(task.id) for task in state.first] == (LATER if complete else FIRST)
    assert ["interrupted" in line for line in stage.verify()] == [True]
    assert stage.next_of(second) == LATER[0], "the next request of a person follows the complete order"
    stage.order("new-r1", LATER, batch=4)
    assert stage.verify() == ()


def test_a_person_is_served_the_old_order_while_the_new_one_is_half_there(
    stage: Stage, label_studio_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.order("old-r1", FIRST, batch=4)
    dying = LabelStudio(label_studio_server.url, label_studio_server.token)
    _die_at(monkeypatch, dying._connection, 4)
    with pytest.raises(KilledError):
        stage.order("new-r2", LATER, batch=4, studio=dying)
    served = []
    for _ in range(4):
        position = stage.next_of(stage.studio)
        assert position is not None
        served.append(position)
        stage.done(stage.studio, position)
    assert served == FIRST[:4]


def _die_at(monkeypatch: pytest.MonkeyPatch, connection: Connection, fatal: int) -> None:
    """The `fatal`-th request that writes kills the program before Label Studio has seen it."""
    send = connection._client.send
    written = 0

    def mortal(request: httpx.Request, **rest: Any) -> httpx.Response:
        nonlocal written
        written += request.method != "GET"
        if request.method != "GET" and written == fatal:
            raise KilledError
        return send(request, **rest)

    monkeypatch.setattr(connection._client, "send", mortal)


def test_two_people_in_turn_share_the_order_and_a_reserved_task_outlives_a_new_round(
    stage: Stage, studio: LabelStudio, second: LabelStudio
) -> None:
    stage.order("v-r1", FIRST, batch=10)
    served = []
    for _ in range(2):
        mine, theirs = stage.next_of(studio), stage.next_of(second)
        assert mine is not None
        assert theirs is not None
        assert (stage.next_of(studio), stage.next_of(second)) == (mine, theirs), "reserved until it is submitted"
        served += [mine, theirs]
        stage.done(studio, mine)
        stage.done(second, theirs)
    assert served == FIRST[:4]
    held = [stage.next_of(studio), stage.next_of(second)]
    assert held == FIRST[4:6]

    left = [i for i in LATER if i not in served]
    stage.index.set_images("cells", {f"i{i}": {"state": "labelled"} for i in served})
    stage.order("v-r2", left, batch=6)
    assert stage.verify() == ()
    assert [stage.next_of(studio), stage.next_of(second)] == held
    stage.done(studio, FIRST[4])
    stage.done(second, FIRST[5])
    then = [i for i in left if i not in FIRST[4:6]]
    assert [stage.next_of(studio), stage.next_of(second)] == then[:2]


@dataclass
class Served:
    """What one request for the next task gave, and from when to when it ran."""

    position: int
    asked: float
    answered: float


def test_two_people_at_the_same_time_label_the_whole_batch_in_order(
    stage: Stage, studio: LabelStudio, second: LabelStudio
) -> None:
    """Label Studio reserves a task at the end of a request, so two that run at the same time may be given the same one.

    That is the only way to get a task that somebody else has, and then both labels are kept.
    """
    stage.order("v-r1", FIRST, batch=10)
    log: dict[str, list[Served]] = {"mine": [], "theirs": []}
    start = threading.Barrier(2)

    def work(name: str, who: LabelStudio) -> None:
        start.wait()
        while True:
            asked = time.monotonic()
            position = stage.next_of(who)
            if position is None:
                return
            log[name].append(Served(position, asked, time.monotonic()))
            stage.done(who, position)

    people = [threading.Thread(target=work, args=pair) for pair in (("mine", studio), ("theirs", second))]
    for person in people:
        person.start()
    for person in people:
        person.join()
    for served in log.values():
        places = [FIRST.index(one.position) for one in served]
        assert places == sorted(set(places)), "by rank, and nothing twice"
    assert {one.position for served in log.values() for one in served} == set(FIRST)
    both = [(one, other) for one in log["mine"] for other in log["theirs"] if one.position == other.position]
    for one, other in both:
        assert one.asked < other.answered
        assert other.asked < one.answered
        assert len(studio.annotations(stage.tasks[one.position])) == 2
    assert len(log["mine"]) + len(log["theirs"]) == 10 + len(both)


def test_a_skipped_task_goes_to_the_other_one_and_is_no_label(
    stage: Stage, studio: LabelStudio, second: LabelStudio
) -> None:
    stage.order("v-r1", FIRST, batch=4)
    assert stage.next_of(studio) == FIRST[0]
    stage.done(studio, FIRST[0], was_cancelled=True)
    assert stage.next_of(studio) == FIRST[1], "not offered again to the one who skipped it"
    assert stage.next_of(second) == FIRST[0], "but to others"
    (task,) = [task for task in studio.tasks(stage.number) if task.id == stage.tasks[FIRST[0]]]
    assert (task.is_labeled, task.total_annotations, task.cancelled_annotations) == (False, 0, 1)
    assert stage.verify() == ()


def test_a_draft_outlives_a_new_round(stage: Stage, studio: LabelStudio) -> None:
    stage.order("v-r1", FIRST, batch=4)
    assert stage.next_of(studio) == FIRST[0]
    task = stage.tasks[FIRST[0]]
    (prediction,) = studio.predictions(task)
    drawn = [*prediction.result, cell(70.0, region_id="mine")]
    body = {"result": drawn, "lead_time": 3.0, "parent_prediction": prediction.id, "was_postponed": False}
    studio._connection.send("POST", f"/api/tasks/{task}/drafts", body=body)
    stage.order("v-r2", LATER, batch=4)
    assert stage.verify() == ()
    served = studio.next_task(stage.number)
    assert served is not None
    assert served["id"] == task
    assert [draft["result"] for draft in served["drafts"]] == [drawn]
    assert [p["model_version"] for p in served["predictions"]] == ["v-r2"]
    assert not any(found.is_labeled for found in studio.tasks(stage.number))
