"""Training once: images that changed, pictures that fail, and runs of a pool's worker."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Completed, Failed, Pending, Running, Scheduled
from prefect.testing.utilities import prefect_test_harness

from flows import training_pool
from flows.context import LoopContext
from flows.local.workspace import Workspace
from flows.retrain import challenger, keep_back, recipe_id, train_and_register, train_flow
from loop.config import LoopConfig, load_config
from loop.data.snapshot import write_snapshot
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, ServiceError, StateError
from loop.types import ImageRef, Instances, Sample

QUICK = {"model.base": 4, "model.depth": 2, "train.max_steps": 1, "train.crop": 64, "train.batch": 2}


class Run:
    """A run of an MLflow server that is not there; `broken` pictures are refused."""

    run_id = "run-1"

    def __init__(self, told: list[str], broken: bool) -> None:
        self.told = told
        self.broken = broken

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *args: object) -> None:
        self.told.append("end")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Nothing is kept."""

    def picture(self, name: str, image: Any) -> None:
        self.told.append(f"picture {name}")
        if self.broken:
            raise ServiceError("the artifact store is full")


class Registry:
    """Notes in which order it is asked; holds no version unless one is put in."""

    def __init__(self, *, broken: bool = False) -> None:
        self.told: list[str] = []
        self.params: dict[str, Any] = {}
        self.version: Any = None
        self.broken = broken

    def find_version(self, tags: dict[str, str]) -> Any:
        return self.version

    def start_run(self, name: str, *, params: dict[str, Any], tags: dict[str, str]) -> Run:
        self.params = params
        return Run(self.told, self.broken)

    def register(self, run_id: str, directory: Path, *, tags: dict[str, str]) -> Any:
        self.told.append("register")
        return SimpleNamespace(label="celloop-p-v1")


def make_context(root: Path, registry: Registry, **settings: Any) -> LoopContext:
    config: LoopConfig = load_config(None, {**QUICK, **settings})
    index = SimpleNamespace(audits=lambda project: [], rounds=lambda project: [])
    made = SimpleNamespace(workspace=Workspace(root), config=config, registry=registry, project_name="p", index=index)
    return cast(LoopContext, made)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for i, split in enumerate(("train", "train", "holdout")):
        pixels, cells = draw_cells(rng, shape=(64, 64), n=3)
        path = tmp_path / f"i{i}.png"
        write_png(pixels, path)
        made.append(Sample(describe(path, split=split), cells))
    return made


def freeze(root: Path, samples: list[Sample]) -> str:
    return write_snapshot(Workspace(root).snapshots_dir, samples, {}, "p").id


def test_the_version_is_registered_before_its_pictures(tmp_path: Path, samples: list[Sample]) -> None:
    registry = Registry()
    version = train_and_register(make_context(tmp_path, registry), freeze(tmp_path, samples))
    assert version.label == "celloop-p-v1"
    assert registry.told == ["register", "picture examples/i2", "end"]


def test_a_picture_that_fails_costs_only_itself(
    tmp_path: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    version = train_and_register(make_context(tmp_path, Registry(broken=True)), freeze(tmp_path, samples))
    assert version.label == "celloop-p-v1"
    assert "no example picture of i2: the artifact store is full" in caplog.text


def test_a_changed_and_a_vanished_image_are_left_out_and_named(
    tmp_path: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = freeze(tmp_path, samples)
    write_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "i0.png")
    (tmp_path / "i2.png").unlink()
    registry = Registry()
    train_and_register(make_context(tmp_path, registry), snapshot)
    assert (registry.params["images_train"], registry.params["images_left_out"]) == (1, 1)
    assert "i0 is left out of the training" in caplog.text
    assert "no example picture of i2" in caplog.text
    (tmp_path / "i1.png").unlink()
    with pytest.raises(ImageError, match=r"all 2 images to learn from .* have changed or vanished, first .*i0\.png"):
        train_and_register(make_context(tmp_path, registry), snapshot)


def test_a_snapshot_of_hold_out_images_only_is_refused(tmp_path: Path, samples: list[Sample]) -> None:
    with pytest.raises(StateError, match="no image to learn from"):
        train_and_register(make_context(tmp_path, Registry()), freeze(tmp_path, samples[2:]))


def test_a_model_that_is_there_is_not_trained_again(tmp_path: Path) -> None:
    registry = Registry()
    registry.version = SimpleNamespace(label="celloop-p-v7")
    assert challenger(make_context(tmp_path, registry), "0" * 16) is registry.version


class Client:
    """Gives the states of one run, one a question."""

    api_url = "http://127.0.0.1:4200/api/"

    def __init__(self, *states: State[Any]) -> None:
        self.states = list(states)

    def read_flow_run(self, run_id: Any) -> FlowRun:
        return FlowRun(id=run_id, name="keen-otter", flow_id=uuid4(), state=self.states.pop(0))


def wait(*states: State[Any], longest_s: float = 60.0) -> FlowRun:
    run = FlowRun(name="keen-otter", flow_id=uuid4())
    return training_pool._wait(cast(SyncPrefectClient, Client(*states)), run, "gpu", longest_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes only while somebody sleeps, twenty seconds at a time."""
    now = [0.0]
    monkeypatch.setattr(training_pool.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training_pool.time, "sleep", lambda _: now.__setitem__(0, now[0] + 20.0))


@pytest.mark.usefixtures("clock")
def test_waiting_for_a_worker_is_said_with_the_command(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ended = wait(Scheduled(), Scheduled(), Pending(), Running(), Completed())
    assert ended.state is not None
    assert ended.state.type == StateType.COMPLETED
    assert [record.message for record in caplog.records] == [
        "no worker of pool gpu has taken training run keen-otter; start one: "
        "`PREFECT_API_URL=http://127.0.0.1:4200/api prefect worker start --pool gpu --type process`"
    ]


@pytest.mark.usefixtures("clock")
def test_waiting_ends() -> None:
    with pytest.raises(ServiceError, match=r"no worker of pool gpu took .* in 60 min"):
        wait(*[Scheduled()] * 200)
    with pytest.raises(ServiceError, match=r"runs for more than 1 min; .* cancel it in Prefect"):
        wait(*[Running()] * 10)


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with prefect_test_harness(), get_client(sync_client=True) as client:
        yield client


def test_an_open_run_is_joined_and_an_ended_one_is_followed_by_a_new_one(client: SyncPrefectClient) -> None:
    deployment = client.create_deployment(client.create_flow(train_flow), "p")
    given = {"workspace": "w", "project": "p", "snapshot_id": "s"}
    first = training_pool._open_run(client, "train/p", given, "key")
    assert training_pool._open_run(client, "train/p", given, "key").id == first.id
    client.set_flow_run_state(first.id, Failed(message="no memory"), force=True)
    second = training_pool._open_run(client, "train/p", given, "key")
    assert second.id != first.id
    assert (second.deployment_id, second.parameters) == (deployment, given)
    client.set_flow_run_state(second.id, Cancelled(), force=True)
    assert training_pool._open_run(client, "train/p", given, "key").id not in {first.id, second.id}


def test_a_missing_deployment_is_a_matter_of_init(client: SyncPrefectClient, tmp_path: Path) -> None:
    context = make_context(tmp_path, Registry(), **{"retrain.pool": "gpu"})
    with pytest.raises(StateError, match="no deployment train/p2; run `celloop init` again"):
        training_pool._open_run(client, "train/p2", {}, "key")
    assert recipe_id(context.config) == recipe_id(load_config(None, QUICK))


def test_a_run_without_a_model_is_an_error_that_says_how_it_ended(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = FlowRun(name="keen-otter", flow_id=uuid4(), state=Failed(message="no memory"))
    monkeypatch.setattr(training_pool, "_open_run", lambda *_: ended)
    monkeypatch.setattr(training_pool, "_wait", lambda *_: ended)
    context = make_context(tmp_path, Registry(), **{"retrain.pool": "gpu"})
    with pytest.raises(ServiceError, match=r"keen-otter of train/p ended as Failed \(no memory\)"):
        challenger(context, "0" * 16)


def test_whole_groups_are_kept_back_always_the_same_and_never_all() -> None:
    empty = Instances.build((4, 4))
    samples = [Sample(ImageRef(f"i{n}", Path(f"i{n}.png"), "", 4, 4, 3, group=f"g{n // 2}"), empty) for n in range(20)]
    taught, kept = keep_back(samples, 0.3)
    assert (len(taught), len(kept)) == (14, 6)
    assert not {s.image.group for s in taught} & {s.image.group for s in kept}
    _, same = keep_back(samples[::-1], 0.3)
    assert {s.image.image_id for s in same} == {s.image.image_id for s in kept}
    assert keep_back(samples, 0.0) == (samples, [])
    assert len(keep_back(samples[:2], 0.99)[0]) == 2  # one group alone teaches
