"""The adapter against a real Label Studio: projects, pictures, backend, tasks, annotations, tab; nothing done twice."""

import base64
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest

from label_studio_cases import CONFIG, Backend, add_tasks, cell, ranked, tiny_png
from loop.adapters.label_studio_api import (
    LOWEST_SCORE_FIRST,
    MOST_INFORMATIVE,
    NOT_YET_ANNOTATED,
    SECRET_HEADER,
    LabelStudio,
    TaskPrediction,
)
from loop.errors import ImageError, InputError, RefusedError, StateError

pytestmark = pytest.mark.services


@pytest.fixture
def backend() -> Iterator[Backend]:
    running = Backend()
    yield running
    running.stop()


@pytest.fixture
def moved_backend() -> Iterator[Backend]:
    running = Backend()
    yield running
    running.stop()


# connection and tokens


def test_check_names_version_and_person(studio, label_studio_server):
    info = studio.check()
    assert info.version == "1.23.2"
    assert info.email == label_studio_server.email


def test_wrong_token_is_named_but_not_shown(label_studio_server):
    wrong = "f" * 40
    with pytest.raises(RefusedError, match=r"401.*Invalid token.*Account & Settings") as caught:
        LabelStudio(label_studio_server.url, wrong).check()
    assert wrong not in str(caught.value)


def test_personal_token_works_and_legacy_tokens_switched_off_are_named(studio, label_studio_server, person):
    personal = person.post("/api/token/").json()["token"]
    with_personal = LabelStudio(label_studio_server.url, personal)
    assert with_personal.check().email == label_studio_server.email
    switch = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": False}
    assert person.post("/api/jwt/settings", json=switch).status_code == 200
    try:
        with pytest.raises(RefusedError, match="switch legacy tokens on") as caught:
            studio.check()
        assert label_studio_server.token not in str(caught.value)
        assert with_personal.check().email == label_studio_server.email
    finally:
        person.post("/api/jwt/settings", json=switch | {"legacy_api_tokens_enabled": True})
    broken = personal[:-4] + ("aaaa" if personal[-4:] != "aaaa" else "bbbb")
    with pytest.raises(RefusedError, match="personal access token with 401") as caught:
        LabelStudio(label_studio_server.url, broken).check()
    assert broken not in str(caught.value)


# projects


def test_project_is_made_once_with_the_settings_that_the_loop_needs(studio):
    title = f"once-{uuid.uuid4().hex[:8]}"
    assert studio.find_project(title) is None
    number = studio.create_project(title, CONFIG, "cells")
    studio.update_project(number, sampling="Sequential sampling")
    respaced = CONFIG.replace("\n", "\n    ")
    assert studio.create_project(title, respaced) == number
    assert studio.find_project(title) == number
    assert studio.find_project(title[:-1]) is None
    found = studio.project(number)
    assert found["description"] == "cells"
    assert found["sampling"] == "Uncertainty sampling"
    assert found["show_collab_predictions"] is True
    assert found["maximum_annotations"] == 1
    with pytest.raises(StateError, match="another label config"):
        studio.create_project(title, CONFIG.replace("Cell", "Nucleus"))
    studio.delete_project(number)
    studio.delete_project(number)
    assert studio.find_project(title) is None


@pytest.mark.parametrize("title", ["ab", "x" * 51])
def test_title_of_the_wrong_length_is_named(studio, title):
    with pytest.raises(InputError, match=rf"{len(title)} characters"):
        studio.create_project(title, CONFIG)


def test_label_config_that_label_studio_refuses_is_quoted(studio):
    with pytest.raises(RefusedError, match=r"400.*label_config"):
        studio.create_project("broken config", "<View>")


def test_project_that_is_not_there_is_refused_not_empty(studio):
    with pytest.raises(RefusedError, match=r"404.*No Project"):
        studio.next_task(999_999)


# pictures


def test_storage_is_connected_once_and_shows_pictures_without_importing_them(studio, project, label_studio_server):
    directory = label_studio_server.document_root / f"set-{project}"
    directory.mkdir()
    (directory / "a.png").write_bytes(tiny_png(7))
    address = f"{label_studio_server.url}/data/local-files/?d={directory.name}/a.png"
    headers = {"Authorization": f"Token {label_studio_server.token}"}
    assert httpx.get(address, headers=headers).status_code == 404
    number = studio.connect_storage(project, directory)
    assert studio.connect_storage(project, str(directory) + "/") == number
    assert httpx.get(address, headers=headers).content == (directory / "a.png").read_bytes()
    assert studio.project(project)["task_number"] == 0


def test_storage_outside_of_what_label_studio_may_show_is_refused(studio, project, label_studio_server):
    root = label_studio_server.document_root
    with pytest.raises(RefusedError, match="cannot be the same as LOCAL_FILES_DOCUMENT_ROOT"):
        studio.connect_storage(project, root)
    with pytest.raises(RefusedError, match="does not exist"):
        studio.connect_storage(project, root / "nowhere")
    with pytest.raises(InputError, match="is relative"):
        studio.connect_storage(project, "display")


def test_pictures_are_uploaded_once_by_content_and_make_no_tasks(studio, project, label_studio_server, tmp_path):
    paths = []
    for i, name in enumerate(["a b.png", "größe (2).png", "x" * 120 + ".png", *(f"{n:02d}.png" for n in range(22))]):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(tiny_png(i))
    addresses = studio.upload(project, paths)
    assert len(set(addresses)) == len(paths)
    assert studio.upload(project, list(reversed(paths))) == list(reversed(addresses))
    assert studio.project(project)["task_number"] == 0
    headers = {"Authorization": f"Token {label_studio_server.token}"}
    for path, address in zip(paths, addresses, strict=True):
        assert httpx.get(label_studio_server.url + address, headers=headers).content == path.read_bytes()
    paths[0].write_bytes(tiny_png(250))
    assert studio.upload(project, paths[:1]) != addresses[:1]
    with pytest.raises(ImageError, match="cannot read"):
        studio.upload(project, [tmp_path / "none.png"])


# backend and webhook


def webhooks(person: httpx.Client, project: int) -> list[dict[str, Any]]:
    return [hook for hook in person.get("/api/webhooks/", params={"project": project}).json()]


def test_backend_and_webhook_are_connected_once_and_move_with_the_backend(
    studio, project, person, backend, moved_backend
):
    tasks = add_tasks(studio, project, 2)
    studio.publish(project, "v1", ranked(tasks, [1, 0]))
    first = studio.connect_backend(project, backend.url, "celloop")
    hook = studio.connect_webhook(project, f"{backend.url}/webhook", "sesame")
    assert studio.connect_backend(project, backend.url, "celloop", user="ls", password="secret") == first
    assert studio.connect_webhook(project, f"{backend.url}/webhook", "sesame") == hook
    assert [h["url"] for h in webhooks(person, project)] == [f"{backend.url}/webhook"]
    assert studio.project(project)["model_version"] == "v1"
    credentials = base64.b64encode(b"ls:secret").decode()
    assert backend.told("/setup")[-1][0]["Authorization"] == f"Basic {credentials}"

    studio.submit(tasks[0], [cell()], lead_time_s=1.0, unique_id=uuid.uuid4())
    ((headers, body),) = backend.told("/webhook")
    assert body["action"] == "ANNOTATION_CREATED"
    assert body["project"]["id"] == project
    assert headers[SECRET_HEADER] == "sesame"

    assert studio.connect_backend(project, moved_backend.url, "celloop") == first
    assert studio.connect_webhook(project, f"{moved_backend.url}/webhook", "other") == hook
    attached = person.get("/api/ml/", params={"project": project}).json()
    assert [(b["url"], b["is_interactive"], b["auth_method"]) for b in attached] == [(moved_backend.url, True, "NONE")]
    studio.submit(tasks[1], [], lead_time_s=1.0, unique_id=uuid.uuid4())
    assert len(backend.told("/webhook")) == 1
    assert moved_backend.told("/webhook")[0][0][SECRET_HEADER] == "other"


def test_webhook_before_backend_leaves_one_hook_too(studio, project, person, backend):
    studio.connect_webhook(project, f"{backend.url}/webhook", "sesame")
    studio.connect_backend(project, backend.url, "celloop")
    (hook,) = webhooks(person, project)
    assert hook["headers"] == {SECRET_HEADER: "sesame"}
    assert studio.project(project)["model_version"] == ""


def test_backend_alone_leaves_no_webhook_behind_even_after_a_kill(studio, project, person, backend):
    number = studio.connect_backend(project, backend.url, "celloop")
    assert webhooks(person, project) == []
    # as Label Studio leaves it to a program that dies before it could tidy up
    person.post("/api/webhooks/", json={"project": project, "url": f"{backend.url}/webhook"}).raise_for_status()
    person.patch(f"/api/projects/{project}/", json={"model_version": "celloop"}).raise_for_status()
    assert studio.connect_backend(project, backend.url, "celloop") == number
    assert webhooks(person, project) == []
    assert studio.project(project)["model_version"] == ""


def test_backend_that_does_not_answer_is_refused_with_its_address(studio, project, backend):
    backend.server.socket.close()
    with pytest.raises(RefusedError, match=f"Can't connect to ML backend {backend.url}"):
        studio.connect_backend(project, backend.url, "celloop")


def test_version_survives_a_backend_of_the_same_name(studio, project, backend):
    tasks = add_tasks(studio, project, 2)
    studio.publish(project, "old", ranked(tasks, [0, 1]))
    studio.connect_backend(project, backend.url, "new")
    studio.publish(project, "new", ranked(tasks, [1, 0]))
    assert studio.project(project)["model_version"] == "new"
    assert [p.model_version for p in studio.predictions(tasks[0])] == ["new"]


# tasks


def test_tasks_are_imported_once_in_the_order_given(studio, project):
    names = [f"cell {i}" for i in range(230)]
    numbers = studio.import_tasks(project, [{"data": {"image": n, "celloop_id": n}} for n in names[:150]])
    assert numbers == sorted(set(numbers))
    mixed = [names[i] for i in (200, 3, 229, 149, 0, *range(150, 200), *range(201, 229))]
    again = studio.import_tasks(project, [{"data": {"image": n, "celloop_id": n}} for n in mixed])
    by_number = {task.id: task.data["celloop_id"] for task in studio.tasks(project)}
    assert [by_number[number] for number in again] == mixed
    assert sorted(by_number.values()) == sorted(names)
    assert list(by_number) == sorted(by_number)
    assert studio.import_tasks(project, []) == []


def test_tasks_without_a_known_identity_are_refused(studio, project):
    with pytest.raises(InputError, match="celloop_id"):
        studio.import_tasks(project, [{"data": {"image": "a"}}])
    twice = {"data": {"image": "a", "celloop_id": "a"}}
    with pytest.raises(InputError, match="several tasks have celloop_id 'a'"):
        studio.import_tasks(project, [twice, twice])
    assert studio.project(project)["task_number"] == 0


def test_task_data_is_replaced(studio, project):
    (task,) = add_tasks(studio, project, 1)
    studio.set_task_data(task, {"image": "b.png", "celloop_id": "image-000", "reason": "unsure about 4 cells"})
    (listed,) = studio.tasks(project)
    assert listed.data == {"image": "b.png", "celloop_id": "image-000", "reason": "unsure about 4 cells"}


# annotations


def test_annotations_come_back_as_they_were_submitted(studio, project):
    drawn, empty, skipped, untouched = add_tasks(studio, project, 4)
    studio.publish(project, "v1", [TaskPrediction(drawn, [cell()], 0.5)])
    (prediction,) = studio.predictions(drawn)
    unique = uuid.uuid4()
    number = studio.submit(drawn, [cell(20.0)], lead_time_s=12.5, unique_id=unique, parent_prediction=prediction.id)
    studio.submit(empty, [], lead_time_s=None, unique_id=uuid.uuid4())
    studio.submit(skipped, [cell()], lead_time_s=1.0, unique_id=uuid.uuid4(), was_cancelled=True)

    (read,) = studio.annotations(drawn)
    assert read.id == number
    assert read.result == [cell(20.0)]
    assert (read.lead_time_s, read.parent_prediction, read.was_cancelled) == (12.5, prediction.id, False)
    assert read.completed_by is not None
    (read,) = studio.annotations(empty)
    assert (read.result, read.was_cancelled, read.lead_time_s) == ([], False, None)
    (read,) = studio.annotations(skipped)
    assert (read.result, read.was_cancelled) == ([cell()], True)
    assert studio.annotations(untouched) == []

    counts = {t.id: (t.total_annotations, t.cancelled_annotations, t.is_labeled) for t in studio.tasks(project)}
    assert counts == {
        drawn: (1, 0, True),
        empty: (1, 0, True),
        skipped: (0, 1, False),
        untouched: (0, 0, False),
    }
    studio.publish(project, "v2", [TaskPrediction(untouched, [cell()], 0.5)])
    assert studio.annotations(drawn)[0].parent_prediction is None


def test_annotations_of_a_task_that_was_not_listed_before(studio, project, label_studio_server):
    (task,) = add_tasks(studio, project, 1)
    studio.submit(task, [cell()], lead_time_s=1.0, unique_id=uuid.uuid4(), was_cancelled=True)
    fresh = LabelStudio(label_studio_server.url, label_studio_server.token)
    assert [a.was_cancelled for a in fresh.annotations(task)] == [True]


def test_submitting_twice_gives_the_same_annotation(studio, project):
    first, second = add_tasks(studio, project, 2)
    unique = uuid.uuid4()
    number = studio.submit(first, [cell()], lead_time_s=1.0, unique_id=unique)
    assert studio.submit(first, [cell()], lead_time_s=1.0, unique_id=str(unique)) == number
    assert len(studio.annotations(first)) == 1
    with pytest.raises(RefusedError, match="another task"):
        studio.submit(second, [cell()], lead_time_s=1.0, unique_id=unique)
    with pytest.raises(InputError, match="no UUID"):
        studio.submit(second, [cell()], lead_time_s=1.0, unique_id="again")


def test_polling_sees_creation_change_skip_and_deletion(studio, project, person):
    tasks = add_tasks(studio, project, 3)
    studio.publish(project, "v1", ranked(tasks, [2, 1, 0]))
    mark = max(task.updated_at for task in studio.tasks(project))
    assert list(studio.tasks(project, updated_after=mark)) == []

    number = studio.submit(tasks[1], [cell()], lead_time_s=1.0, unique_id=uuid.uuid4())
    (seen,) = studio.tasks(project, updated_after=mark)
    assert (seen.id, seen.total_annotations) == (tasks[1], 1)
    mark, before = seen.updated_at, studio.annotations(tasks[1])[0].updated_at

    person.patch(f"/api/annotations/{number}/", json={"result": [cell(), cell(5.0, region_id="b")]}).raise_for_status()
    (seen,) = studio.tasks(project, updated_after=mark)
    (changed,) = studio.annotations(seen.id)
    assert len(changed.result) == 2
    assert changed.updated_at > before
    mark = seen.updated_at

    person.delete(f"/api/annotations/{number}/").raise_for_status()
    (seen,) = studio.tasks(project, updated_after=mark)
    assert (seen.id, seen.total_annotations, studio.annotations(seen.id)) == (tasks[1], 0, [])

    studio.submit(tasks[0], [], lead_time_s=1.0, unique_id=uuid.uuid4(), was_cancelled=True)
    (seen,) = studio.tasks(project, updated_after=seen.updated_at)
    assert (seen.id, seen.cancelled_annotations) == (tasks[0], 1)
    assert seen.updated_at.utcoffset() == timedelta(0)
    with pytest.raises(InputError, match="no timezone"):
        list(studio.tasks(project, updated_after=seen.updated_at.replace(tzinfo=None)))


# tab


def test_tab_is_made_once_and_lists_open_tasks_in_rank_order(studio, project, person):
    tasks = add_tasks(studio, project, 6)
    studio.publish(project, "v1", ranked(tasks, [4, 0, 5, 2, 1, 3]))
    studio.submit(tasks[0], [cell()], lead_time_s=1.0, unique_id=uuid.uuid4())
    studio.submit(tasks[5], [], lead_time_s=1.0, unique_id=uuid.uuid4(), was_cancelled=True)
    columns = ("data.image", "data.celloop_id", "predictions_score")
    tab = studio.set_tab(project, MOST_INFORMATIVE, ["-tasks:id"], {"conjunction": "and", "items": []})
    for _ in range(2):
        again = studio.set_tab(project, MOST_INFORMATIVE, LOWEST_SCORE_FIRST, NOT_YET_ANNOTATED, columns=columns)
        assert again == tab
    other = studio.set_tab(project, "Everything", ["tasks:id"], {"conjunction": "and", "items": []})
    assert other != tab
    listed = person.get("/api/tasks/", params={"view": tab, "project": project}).json()["tasks"]
    assert [task["id"] for task in listed] == [tasks[i] for i in (4, 2, 1, 3)]
    views = {view["id"]: view["data"] for view in person.get("/api/dm/views/", params={"project": project}).json()}
    assert set(views) == {tab, other}
    hidden = views[tab]["hiddenColumns"]["explore"]
    assert "tasks:predictions_score" not in hidden
    assert "tasks:data.image" not in hidden
    assert "tasks:inner_id" in hidden
