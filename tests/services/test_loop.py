"""The loop on the real Label Studio, MLflow, Prefect and backend."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import flows.round
from flows.annotator import label_tasks
from flows.context import open_context
from flows.export import export
from flows.local.launch import start_in_background
from flows.local.services import POOL
from flows.local.site import UpOptions
from flows.local.workspace import Workspace
from flows.prefect_api import connected
from flows.round import run_round
from flows.sync import sync
from loop.errors import LoopError, StateError
from stack import DrawnProject, make_project

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def project(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> DrawnProject:
    """A project after its first two rounds: 6 images labelled, one model, the next batch published."""
    drawn = make_project(workspace, tmp_path_factory.mktemp("drawn"), "loop-test")
    run_round(drawn.context)
    label_tasks(drawn.context, drawn.labels, 6)
    run_round(drawn.context)
    return drawn


def eventually(check: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return
        time.sleep(0.5)
    pytest.fail(f"{what}: not within {seconds:.0f} s")


def open_predictions(drawn: DrawnProject) -> dict[int, list[Any]]:
    rows = drawn.context.index.images(drawn.context.project_name, state="open")
    return {row.task_id: drawn.context.label_studio.predictions(row.task_id) for row in rows if row.task_id}


def test_first_batch_is_half_control_and_one_model_is_in_service(project: DrawnProject) -> None:
    context = project.context
    labelled = context.index.images("loop-test", state="labelled")
    assert sorted(row.role for row in labelled) == ["control"] * 3 + ["train"] * 3
    champion = context.registry.champion()
    assert champion is not None
    assert champion.label == "celloop-loop-test-v1"
    rounds = context.index.rounds("loop-test")
    assert [row.decision for row in rounds] == ["none", "first"]
    assert rounds[1].metrics["n_images"] == 3


def test_each_open_task_has_one_prediction_of_the_published_version(project: DrawnProject) -> None:
    published = project.context.project.published_version
    assert published == "celloop-loop-test-v1-r1"
    found = open_predictions(project)
    assert len(found) == 8
    assert all([p.model_version for p in predictions] == [published] for predictions in found.values())
    assert project.context.label_studio.project(project.context.project.ls_project_id)["model_version"] == published


def test_a_second_round_without_news_changes_nothing(project: DrawnProject) -> None:
    before = open_predictions(project)
    report = run_round(project.context)
    assert not report.made
    assert open_predictions(project) == before


def ask_backend(drawn: DrawnProject, context: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The backend's answer for the first open image, or to a click in it; None while it has no model."""
    project = drawn.context.project
    row = drawn.context.index.images(drawn.context.project_name, state="open")[0]
    body = {
        "tasks": [{"id": row.task_id, "data": {"image": row.display}}],
        "project": f"{project.ls_project_id}.1",
        "label_config": project.label_config,
        "params": {"context": context},
    }
    answer = httpx.post(f"{drawn.context.endpoints.backend_url}/predict", json=body, timeout=60)
    return dict(answer.json()["results"][0]) if answer.status_code == 200 else None


def serves_what_is_published(drawn: DrawnProject) -> bool:
    answer = ask_backend(drawn)
    return answer is not None and answer["model_version"] == drawn.context.project.published_version


def test_backend_serves_the_published_champion(project: DrawnProject) -> None:
    eventually(lambda: serves_what_is_published(project), 40, "the backend serves the champion")
    row = project.context.index.images("loop-test", state="open")[0]
    published = project.context.label_studio.predictions(row.task_id or 0)[0]
    answer = ask_backend(project)
    assert answer is not None
    assert len(answer["result"]) == len(published.result)


def test_batch_is_served_in_order_and_taken_in(project: DrawnProject) -> None:
    context = project.context
    waiting = [row for row in context.index.images("loop-test", state="open") if row.rank is not None]
    wanted = [row.image_id for row in sorted(waiting, key=lambda row: row.rank or 0)]
    submitted = label_tasks(context, project.labels, len(wanted))
    assert [item.image_id for item in submitted] == wanted
    report = run_round(context)
    assert report.made
    assert report.labelled_train + report.labelled_holdout == 6 + len(wanted)
    assert report.outcome in ("promoted", "refused")
    assert report.reason
    assert Path(report.report).stat().st_size > 1000


def test_empty_skipped_and_deleted_annotations(project: DrawnProject) -> None:
    context = project.context
    name = context.project_name
    empty, skipped = (row for row in context.index.images(name, state="open")[:2])
    first = context.label_studio.submit(
        empty.task_id or 0, [], lead_time_s=1.0, unique_id="6dbb9a8e-1111-4e4e-8888-000000000001"
    )
    context.label_studio.submit(
        skipped.task_id or 0,
        [],
        lead_time_s=1.0,
        unique_id="6dbb9a8e-1111-4e4e-8888-000000000002",
        was_cancelled=True,
    )
    sync(context)  # or the run that the webhook woke, whichever comes first
    assert context.index.image(name, empty.image_id).state == "labelled"
    assert context.index.image(name, skipped.image_id).state == "skipped"
    headers = {"Authorization": f"Token {context.endpoints.label_studio_token}"}
    httpx.delete(f"{context.endpoints.label_studio_url}/api/annotations/{first}/", headers=headers, timeout=60)
    sync(context)
    assert context.index.image(name, empty.image_id).state == "open"


def test_export_gives_back_what_was_submitted(project: DrawnProject, tmp_path: Path) -> None:
    from flows.folders import evaluate_folders

    done = export(project.context, tmp_path, ["labels", "coco", "cellpose", "geojson"])
    assert done.images >= 6
    figures = evaluate_folders(tmp_path, project.labels)
    assert figures["n_images"] == done.images
    assert figures["f1"] == 1.0
    assert figures["dice"] > 0.97


def test_rollback_puts_the_champion_before_back(project: DrawnProject) -> None:
    registry = project.context.registry
    champion = registry.champion()
    assert champion is not None
    if len(registry.history()) < 2:
        other = next((v for v in registry.versions() if v.version != champion.version), None)
        if other is None:
            with pytest.raises(StateError):
                registry.rollback("test")
            return
        registry.promote(other, "test", {})
        champion = other
    back = registry.rollback("test")
    assert back.version != champion.version
    assert registry.champion() == back


class KilledError(Exception):
    """Stands for a process that dies at this point."""


STEPS = ["sync", "freeze", "challenger", "gate", "predict_images", "select", "publish", "write_report"]


def test_a_round_killed_after_any_step_is_resumed_under_its_number(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = make_project(workspace, tmp_path / "drawn", "kill-test", n=10)
    context = drawn.context
    run_round(context)
    label_tasks(context, drawn.labels, 6)
    for step in STEPS:
        real = getattr(flows.round, step)

        def dies_after(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            _real(*args, **kwargs)
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(flows.round, step, dies_after)
            with pytest.raises(KilledError):
                run_round(context)
    report = run_round(context)
    rounds = context.index.rounds("kill-test")
    assert [row.number for row in rounds] == [0, 1]
    assert rounds[1].status == "done"
    assert rounds[1].decision == "first"
    assert len(context.registry.versions()) == 1
    assert report.published == "celloop-kill-test-v1-r1"
    found = open_predictions(drawn)
    assert all([p.model_version for p in predictions] == [report.published] for predictions in found.values())
    served = label_tasks(context, drawn.labels, 1)
    first = next(row for row in context.index.images("kill-test") if row.rank == 1 and row.chosen_in == 1)
    assert served[0].image_id == first.image_id


def test_schedule_and_webhook_start_runs_and_enough_labels_start_a_round(workspace: Workspace, tmp_path: Path) -> None:
    drawn = make_project(
        workspace,
        tmp_path / "drawn",
        "watch-test",
        n=10,
        **{"trigger.watch_seconds": 3600, "trigger.new_annotations": 6},
    )
    context = drawn.context
    run_round(context)
    label_tasks(context, drawn.labels, 6)

    def trained() -> bool:
        rounds = open_context(workspace, "watch-test").index.rounds("watch-test")
        return len(rounds) == 2 and rounds[1].status == "done"

    eventually(trained, 180, "a round after six annotations, woken by the webhook")

    def completed() -> bool:
        return "Completed" in {run["state_name"] for run in flow_runs(context.endpoints.prefect_api_url, "watch-test")}

    eventually(completed, 30, "the run that made the round ends well")


def test_a_scheduled_run_happens(workspace: Workspace, tmp_path: Path) -> None:
    drawn = make_project(workspace, tmp_path / "drawn", "clock-test", n=4, **{"trigger.watch_seconds": 10})
    url = drawn.context.endpoints.prefect_api_url

    def ran() -> bool:
        runs = flow_runs(url, "clock-test")
        return any(run["auto_scheduled"] and run["state_name"] == "Completed" for run in runs)

    eventually(ran, 120, "a run by schedule")
    with connected(drawn.context.endpoints):
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            client.delete_deployment(client.read_deployment_by_name("watch/clock-test").id)


def test_an_unknown_label_leaves_its_image_out_and_is_named(workspace: Workspace, tmp_path: Path) -> None:
    drawn = make_project(workspace, tmp_path / "drawn", "label-test", n=6, **{"select.first_batch": 4})
    context = drawn.context
    run_round(context)
    label_tasks(context, drawn.labels, 3)
    task = context.label_studio.next_task(context.project.ls_project_id)
    assert task is not None
    region = {
        "id": "strange",
        "type": "polygonlabels",
        "from_name": "cell",
        "to_name": "image",
        "original_width": 96,
        "original_height": 96,
        "value": {"points": [[10, 10], [30, 10], [30, 30]], "closed": True, "polygonlabels": ["Martian"]},
    }
    context.label_studio.submit(task["id"], [region], lead_time_s=1.0, unique_id="6dbb9a8e-1111-4e4e-8888-000000000003")
    report = run_round(context)
    image_id = task["data"]["celloop_id"]
    assert [line for line in report.left_out if image_id in line and "Martian" in line and "Cell" in line]
    assert report.labelled_train + report.labelled_holdout == 3


def test_a_worker_of_the_training_pool_trains(workspace: Workspace, tmp_path: Path) -> None:
    drawn = make_project(
        workspace, tmp_path / "drawn", "pool-test", n=6, **{"select.first_batch": 4, "retrain.pool": POOL}
    )
    run_round(drawn.context)
    label_tasks(drawn.context, drawn.labels, 4)
    report = run_round(drawn.context)
    assert report.outcome == "first"
    runs = flow_runs(drawn.context.endpoints.prefect_api_url, "pool-test", "train")
    assert [run["state_name"] for run in runs] == ["Completed"]


def test_a_round_goes_on_after_label_studio_died_in_the_middle(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = make_project(workspace, tmp_path / "drawn", "crash-test", n=8)
    run_round(drawn.context)
    label_tasks(drawn.context, drawn.labels, 6)
    real = flows.round.challenger

    def trains_while_label_studio_dies(*args: Any) -> Any:
        version = real(*args)
        state = workspace.state()
        assert state is not None
        process = state.processes["label_studio"].process()
        assert process is not None
        process.kill()
        eventually(lambda: not state.is_running(), 60, "everything stops when one service crashes")
        return version

    with monkeypatch.context() as patch:
        patch.setattr(flows.round, "challenger", trains_while_label_studio_dies)
        with pytest.raises(LoopError):
            run_round(drawn.context)
    start_in_background(workspace, UpOptions(), lambda text: None)
    context = open_context(workspace, "crash-test")
    report = run_round(context)
    assert (report.number, report.made, report.outcome) == (1, True, "first")
    assert len(context.registry.versions()) == 1


def flow_runs(url: str, deployment: str, flow: str = "watch") -> list[dict[str, Any]]:
    answer = httpx.post(
        f"{url}/flow_runs/filter",
        json={"deployments": {"name": {"any_": [deployment]}}, "flows": {"name": {"any_": [flow]}}},
        timeout=30,
    )
    answer.raise_for_status()
    runs: list[dict[str, Any]] = answer.json()
    return runs


@pytest.mark.parametrize("model", ["unet", "sparse_seu_net"])
def test_every_architecture_trains_is_gated_and_serves_by_configuration_alone(
    workspace: Workspace, tmp_path: Path, model: str
) -> None:
    name = f"loop-{model.replace('_', '-')}"
    overrides = {"model.name": model, "model.width": 16, "model.queries": 30, "gate.min_images": 2}
    drawn = make_project(workspace, tmp_path, name, n=10, **overrides)
    run_round(drawn.context)
    label_tasks(drawn.context, drawn.labels, 6)
    run_round(drawn.context)
    assert [row.decision for row in drawn.context.index.rounds(name)] == ["none", "first"]
    assert all(len(found) == 1 for found in open_predictions(drawn).values())
    eventually(lambda: serves_what_is_published(drawn), 60, f"the backend serves {model}")
    click = {"type": "keypointlabels", "original_width": 96, "original_height": 96, "image_rotation": 0}
    click["value"] = {"x": 50.0, "y": 50.0, "width": 0.3, "keypointlabels": ["Cell"]}
    answer = ask_backend(drawn, {"result": [{**click, "id": "k1", "from_name": "point", "to_name": "image"}]})
    assert answer is not None
    assert len(answer["result"]) <= 1
