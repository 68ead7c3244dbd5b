"""The tab Review in a real Label Studio: its order, its filter, and annotations that stay as they were."""

import uuid

import pytest

from flows.review import ANNOTATED_AND_RANKED, RANK, REASON, REVIEW
from label_studio_cases import add_tasks, cell

pytestmark = pytest.mark.services


def test_review_tab_lists_annotated_tasks_by_rank_and_leaves_annotations_alone(studio, project, person):
    tasks = add_tasks(studio, project, 14)
    for task in tasks[:13]:
        studio.submit(task, [cell()], lead_time_s=1.0, unique_id=uuid.uuid4())
    before = {task: studio.annotations(task) for task in tasks}
    mark = max(task.updated_at for task in studio.tasks(project))
    data = {task.id: task.data for task in studio.tasks(project)}
    ranks = {tasks[i]: rank for i, rank in ((3, 2), (7, 10), (0, 11), (9, 1), (13, 3))}
    for task, rank in ranks.items():
        studio.set_task_data(task, data[task] | {RANK: rank, REASON: f"{rank} cells not drawn"})
    columns = ("id", "data.image", f"data.{RANK}", f"data.{REASON}")
    tab = studio.set_tab(
        project, REVIEW, (f"tasks:data.{RANK}",), ANNOTATED_AND_RANKED, columns=columns, numbers=(f"data.{RANK}",)
    )

    listed = person.get("/api/tasks/", params={"view": tab, "project": project}).json()["tasks"]
    assert [task["id"] for task in listed] == [tasks[i] for i in (9, 3, 7, 0)]  # the last one is not annotated
    (view,) = (one for one in person.get("/api/dm/views/", params={"project": project}).json() if one["id"] == tab)
    assert f"tasks:data.{REASON}" not in view["data"]["hiddenColumns"]["explore"]
    assert view["data"]["columnsDisplayType"] == {f"tasks:data.{RANK}": "Number"}  # PostgreSQL orders 10 after 2
    assert "tasks:inner_id" in view["data"]["hiddenColumns"]["explore"]

    moved = {task.id for task in studio.tasks(project, updated_after=mark)}
    assert moved == set(ranks)  # a sync looks at them again, and finds the annotations as they were
    assert {task: studio.annotations(task) for task in tasks} == before
    assert {task.id: task.data for task in studio.tasks(project)} == data | {
        task: data[task] | {RANK: rank, REASON: f"{rank} cells not drawn"} for task, rank in ranks.items()
    }
