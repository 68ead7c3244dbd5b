"""Faults put into a real project on purpose, each of which the doctor names, mends, and does not find again."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.context import project_lock
from flows.local.doctor import LINKS, Check, examine
from flows.local.workspace import Workspace
from label_studio_cases import CONFIG, Backend, cell, ranked, tiny_png
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import LabelStudio
from loop.adapters.label_studio_hooks import hooks_of
from loop.adapters.label_studio_storage import storage_paths

pytestmark = pytest.mark.services

NAME = "cells"


@dataclass
class Stage:
    """A project of four images, published and connected, in a workspace of its own."""

    workspace: Workspace
    studio: LabelStudio
    backend: Backend
    number: int
    tasks: list[int]

    def examine(self, *, mend: bool = False) -> dict[str, Check]:
        """Checks of Label Studio and the project; what else is on this machine is not looked at."""
        looked = {check.name: check for check in examine(self.workspace, NAME, mend=mend)}
        return {name: looked[name] for name in ("token", f"project {NAME}", *LINKS)}

    def faults(self, *, mend: bool = False) -> dict[str, Check]:
        return {name: check for name, check in self.examine(mend=mend).items() if check.outcome == "fault"}


@pytest.fixture
def backend() -> Iterator[Callable[[], Backend]]:
    running: list[Backend] = []

    def start() -> Backend:
        running.append(Backend())
        return running[-1]

    yield start
    for one in running:
        one.stop()


@pytest.fixture
def stage(
    studio: LabelStudio,
    project: int,
    label_studio_server: Any,
    backend: Callable[[], Backend],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Stage]:
    one = backend()
    environment = {
        "CELLOOP_LABEL_STUDIO_URL": label_studio_server.url,
        "CELLOOP_LABEL_STUDIO_TOKEN": label_studio_server.token,
        "CELLOOP_LABEL_STUDIO_EMAIL": label_studio_server.email,
        "CELLOOP_LABEL_STUDIO_PASSWORD": label_studio_server.password,
        "CELLOOP_LABEL_STUDIO_MANAGED": "true",
        "CELLOOP_BACKEND_URL": one.url,
        "CELLOOP_WEBHOOK_SECRET": "s" * 20,
        "CELLOOP_INDEX_URL": f"sqlite:///{tmp_path / 'index.sqlite3'}",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    workspace = Workspace(label_studio_server.document_root)
    folder = workspace.root / "display" / f"{NAME}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    index = Index(workspace.index_url)
    row = index.add_project(NAME, ls_project_id=project, root=tmp_path, label_config=CONFIG)
    shown = [f"/data/local-files/?d=display/{folder.name}/i{n}.png" for n in range(4)]
    rows = [ImageRow(row.id, f"i{n}", "0" * 64, f"i{n}.png", shown[n], height=48, width=64) for n in range(4)]
    for n in range(4):
        (folder / f"i{n}.png").write_bytes(tiny_png(n))
    tasks = studio.import_tasks(project, [{"data": {"image": r.display, "celloop_id": r.image_id}} for r in rows])
    index.add_images(NAME, [replace(image, task_id=task) for image, task in zip(rows, tasks, strict=True)])
    studio.connect_storage(project, folder)
    studio.connect_backend(project, one.url, "celloop")
    studio.connect_webhook(project, f"{one.url}/webhook", "s" * 20)
    studio.publish(project, "v-r1", ranked(tasks, [2, 0, 3, 1]))
    index.set_published(NAME, "v-r1", "")
    ranks = {"i2": 1, "i0": 2, "i3": None, "i1": None}
    index.set_images(NAME, {name: {"rank": rank, "score": 0.5} for name, rank in ranks.items()})
    yield Stage(workspace, studio, one, project, tasks)
    index.close()


def set_legacy_tokens(person: httpx.Client, on: bool) -> None:
    wanted = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": on}
    person.post("/api/jwt/settings", json=wanted).raise_for_status()


def test_each_fault_is_named_mended_and_gone(
    stage: Stage, person: httpx.Client, backend: Callable[[], Backend]
) -> None:
    assert stage.faults() == {}
    studio, number, tasks = stage.studio, stage.number, stage.tasks
    connection = studio._connection

    other = backend()
    connection.sdk.ml.delete(connection.sdk.ml.create(project=number, url=other.url, title="another").id)
    other_url = other.url
    other.server.server_close()
    foreign = connection.sdk.webhooks.create(project=number, url="http://127.0.0.1:9/mine", send_payload=True)
    connection.sdk.webhooks.create(
        project=number, url="http://127.0.0.1:9/webhook", headers={"X-Celloop-Secret": "old"}, send_payload=True
    )
    connection.sdk.webhooks.create(project=number, url=f"{stage.backend.url}/webhook", send_payload=True)
    for row in connection.sdk.import_storage.local.list(project=number):
        connection.sdk.import_storage.local.delete(row.id)
    connection.sdk.predictions.create(task=tasks[1], result=[cell()], score=0.9, model_version="v-r1")
    connection.sdk.predictions.create(task=tasks[1], result=[cell()], score=0.9, model_version="v-r0")
    studio.update_project(number, model_version="v-r0", sampling="Sequential sampling")

    found = stage.faults()
    assert set(found) - {"image"} == {"webhooks", "storage", "queue"}
    assert found["webhooks"].detail.startswith("3 webhooks")
    assert f"{other_url}/webhook" in found["webhooks"].detail
    assert "no local-files storage for" in found["storage"].detail
    for part in ("names the version 'v-r0'", "'Sequential sampling'", "1 of 'v-r0'"):
        assert part in found["queue"].detail
    assert all("--mend" in found[name].cure for name in ("webhooks", "storage", "queue"))
    assert stage.faults().keys() == found.keys(), "nothing is changed without --mend"

    try:
        set_legacy_tokens(person, False)
        assert "legacy token" in {c.name: c for c in examine(stage.workspace, NAME)}["token"].detail
        after = stage.examine(mend=True)
    finally:
        set_legacy_tokens(person, True)
    assert {name for name, check in after.items() if check.outcome == "mended"} == {
        "token",
        "webhooks",
        "storage",
        "queue",
    }
    assert after["queue"].mended == (
        "named v-r1 as the version of project cells",
        "set project cells to Uncertainty sampling",
        "deleted 1 predictions of v-r0",
        "deleted 1 second predictions of v-r1 in 1 tasks",
    )
    assert not [check for check in after.values() if check.outcome == "fault"]
    assert {check.outcome for check in stage.examine().values()} <= {"ok", "skipped"}
    assert [hook.url for hook in hooks_of(connection, number)] == [f"{stage.backend.url}/webhook", foreign.url]
    assert len(storage_paths(connection, number)) == 1
    assert [len(studio.predictions(task)) for task in tasks] == [1, 1, 1, 1]
    served = studio.next_task(number)
    assert served is not None
    assert served["id"] == tasks[2]


def test_what_cannot_be_mended_keeps_its_cure(stage: Stage) -> None:
    connection = stage.studio._connection
    connection.sdk.predictions.delete(stage.studio.predictions(stage.tasks[0])[0].id)
    (found,) = stage.faults(mend=True).values()
    assert found.detail == f"no prediction with a score in task {stage.tasks[0]} (i0)"
    assert "celloop round" in found.cure
    assert found.mended == ()


def test_a_lost_backend_is_attached_again(stage: Stage) -> None:
    connection = stage.studio._connection
    for one in connection.sdk.ml.list(project=stage.number):
        connection.sdk.ml.delete(one.id)
    assert "has no backend" in stage.faults()["project cells"].detail
    assert stage.examine(mend=True)["project cells"].mended == (
        f"attached {stage.backend.url} and its webhook to project cells",
    )
    assert stage.faults() == {}


def test_a_running_round_is_not_disturbed(stage: Stage) -> None:
    stage.studio.update_project(stage.number, sampling="Sequential sampling")
    with project_lock(stage.workspace, NAME):
        (found,) = stage.faults(mend=True).values()
    assert "it could not be mended: a round of 'cells' is running" in found.detail
    assert stage.studio.project(stage.number)["sampling"] == "Sequential sampling"


def test_a_backend_that_only_this_machine_reaches_is_named(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLOOP_BACKEND_URL", "http://no.such.host:9090")
    found = stage.faults()["addresses"]
    assert "Can't resolve hostname no.such.host" in found.detail
    assert "CELLOOP_BACKEND_URL" in found.cure
