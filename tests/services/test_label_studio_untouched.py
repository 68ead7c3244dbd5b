"""Deleting tasks of a real Label Studio that nobody has worked at, and never another one."""

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from label_studio_cases import add_tasks, cell, ranked
from loop.adapters.label_studio_api import LabelStudio
from loop.adapters.label_studio_untouched import remove_untouched, untouched

pytestmark = pytest.mark.services


@pytest.fixture
def second(label_studio_server: Any) -> Iterator[httpx.Client]:
    """The browser of somebody else, who has signed up."""
    with httpx.Client(base_url=label_studio_server.url, follow_redirects=True, timeout=60) as browser:
        browser.get("/user/signup/")
        token = browser.cookies["csrftoken"]
        form = {"email": f"{uuid.uuid4().hex[:8]}@example.com", "password": "a-long-word", "csrfmiddlewaretoken": token}
        browser.post("/user/signup/", data=form).raise_for_status()
        browser.headers["X-CSRFToken"] = browser.cookies["csrftoken"]
        yield browser


def begin(browser: httpx.Client, task: int) -> None:
    """What the editor stores by itself while somebody draws."""
    body = {"result": [cell()], "lead_time": 3, "draft_id": 0, "project": 0}
    browser.post(f"/api/tasks/{task}/drafts", json=body).raise_for_status()


def test_only_tasks_without_annotation_skip_and_draft_of_anybody_go(
    studio: LabelStudio, project: int, person: httpx.Client, second: httpx.Client
) -> None:
    tasks = add_tasks(studio, project, 7)
    plain, annotated, skipped, own, other, predicted, kept = tasks
    studio.submit(annotated, [cell()], lead_time_s=1.0, unique_id=uuid.uuid4())
    studio.submit(skipped, [], lead_time_s=1.0, unique_id=uuid.uuid4(), was_cancelled=True)
    begin(person, own)
    begin(second, other)
    studio.publish(project, "m-v1", ranked([predicted], [0]))
    connection = studio._connection
    assert untouched(connection, project, tasks) == [plain, predicted, kept]
    assert untouched(connection, project, []) == []
    asked = [plain, annotated, skipped, own, other, predicted]
    assert remove_untouched(connection, project, asked) == [plain, predicted]
    assert [task.id for task in studio.tasks(project)] == [annotated, skipped, own, other, kept]
    assert studio.project(project)["task_number"] == 5
    assert remove_untouched(connection, project, asked) == [plain, predicted]
    assert [task.id for task in studio.tasks(project)] == [annotated, skipped, own, other, kept]
    assert len(studio.annotations(annotated)) == len(studio.annotations(skipped)) == 1
