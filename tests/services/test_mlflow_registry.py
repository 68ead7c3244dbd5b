"""The registry against a real MLflow server on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest

from loop.adapters.mlflow_registry import CLIENT_ENVIRONMENT, Registry
from loop.errors import (
    CheckpointError,
    InputError,
    NonFiniteError,
    RefusedError,
    ServiceError,
    StateError,
    UnreachableError,
)

pytestmark = pytest.mark.services


class Server:
    """One MLflow server in a process group of its own; its state lies in `folder` and outlives a restart."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
                assert self.process.poll() is None, (self.folder / "log").read_text()
        raise AssertionError((self.folder / "log").read_text())

    def stop(self):
        """End the whole group; does nothing where it has ended."""
        for word in (signal.SIGTERM, signal.SIGKILL):
            for signal_number in (word, *[0] * 100):
                try:
                    os.killpg(self.process.pid, signal_number)
                except ProcessLookupError:
                    return
                self.process.poll()
                time.sleep(0.1)
        raise AssertionError(f"processes of group {self.process.pid} are left")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CLIENT_ENVIRONMENT.items():
            patch.setenv(name, value)
        server = Server(tmp_path_factory.mktemp("mlflow"))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def own_server(server, tmp_path):
    """A second server, for a test that stops it; takes the settings of the first."""
    own = Server(tmp_path)
    own.start()
    yield own
    own.stop()


@pytest.fixture
def registry(server, request):
    name = f"celloop-{request.node.name}".translate(str.maketrans("[]", "--"))
    return Registry(server.url, name, name)


@pytest.fixture
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.url, registry_uri=server.url)


def checkpoint(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "model.json").write_text(json.dumps({"name": "seu_net"}))
    return folder


def finished_run(registry: Registry, **tags) -> str:
    with registry.start_run("train", params={}, tags=tags) as run:
        pass
    return run.run_id


@pytest.fixture
def add_version(registry, tmp_path):
    def add():
        return registry.register(finished_run(registry), checkpoint(tmp_path / "checkpoint"), tags={"snapshot": "s"})

    return add


class TestRuns:
    def test_everything_that_is_logged_arrives(self, registry, client, tmp_path, capfd):
        picture = np.zeros((5, 7, 3), np.uint8)
        picture[:, :, 0] = 200  # red
        params = {"train": {"minutes": 3.0, "ema": 0.98}, "seed": 0, "many": {str(i): i for i in range(150)}}
        with registry.start_run("round 1", params=params, tags={"snapshot": "ab"}) as run:
            for step in range(2500):
                run.log(step, {"loss": 1 / (step + 1), "ap": float("nan")})
            run.picture("holdout/a", picture)
            run.picture("grey", picture[:, :, 0])
            run.artifact(checkpoint(tmp_path / "c") / "model.json", "notes")
            run.artifact(tmp_path / "c", "all")
            run.tag("device", "cpu")
        found = client.get_run(run.run_id)
        assert (found.info.status, found.info.run_name) == ("FINISHED", "round 1")
        assert found.info.end_time >= found.info.start_time
        assert found.data.params["train.minutes"] == "3.0"
        assert len(found.data.params) == 153
        assert {"snapshot": "ab", "device": "cpu"}.items() <= found.data.tags.items()
        curve = {m.step: m.value for m in client.get_metric_history(run.run_id, "loss")}
        assert curve == {step: 1 / (step + 1) for step in range(2500)}
        assert np.isnan(found.data.metrics["ap"])
        stored = client.download_artifacts(run.run_id, "pictures/holdout/a.png", str(tmp_path))
        assert (cv2.imread(stored)[:, :, ::-1] == picture).all()
        assert [item.path for item in client.list_artifacts(run.run_id, "pictures")] == [
            "pictures/grey.png",
            "pictures/holdout",
        ]
        assert [item.path for item in client.list_artifacts(run.run_id, "notes")] == ["notes/model.json"]
        assert len(client.list_artifacts(run.run_id, "all")) == 2
        assert capfd.readouterr().out == ""

    def test_noting_a_step_takes_far_less_than_a_step(self, registry):
        with registry.start_run("fast", params={}, tags={}) as run:
            start = time.perf_counter()
            for step in range(2000):
                run.log(step, {"loss": 1.0, "rate": 0.1})
            assert (time.perf_counter() - start) / 2000 < 0.005

    @pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
    def test_a_body_that_raises_ends_the_run_and_the_error_goes_on(self, registry, client, error, status):
        with (  # noqa: PT012 (the whole body is what is tested)
            pytest.raises(error, match="the loss grew"),
            registry.start_run("bad", params={}, tags={"snapshot": "x"}) as run,
        ):
            run.log(7, {"loss": 3.0})
            raise error("the loss grew")
        found = client.get_run(run.run_id)
        assert (found.info.status, found.data.metrics) == (status, {"loss": 3.0})
        assert registry.find_run({"snapshot": "x"}) is None

    def test_a_name_that_mlflow_does_not_take_fails_the_run(self, registry, client):
        with (
            pytest.raises(RefusedError, match=r"log metrics of run .* Invalid value"),
            registry.start_run("odd", params={}, tags={}) as run,
        ):
            run.log(0, {"loss?": 1.0})
        assert client.get_run(run.run_id).info.status == "FAILED"

    def test_what_cannot_be_stored_is_named(self, registry, tmp_path):
        with registry.start_run("pictures", params={}, tags={}) as run:
            for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)):
                with pytest.raises(InputError, match=r"expected .*uint8"):
                    run.picture("p", wrong)
            for call in (run.artifact, lambda path: run.picture("p", path)):
                with pytest.raises(InputError, match=r"no .*missing"):
                    call(tmp_path / "missing")

    def test_only_finished_runs_with_all_tags_are_found(self, registry):
        assert registry.find_run({"snapshot": "a"}) is None  # no experiment yet
        old = finished_run(registry, snapshot="a", seed=0)
        new = finished_run(registry, snapshot="a", seed=1)
        with registry.start_run("open", params={}, tags={"snapshot": "a"}):
            assert registry.find_run({"snapshot": "a"}) == new
        assert registry.find_run({"snapshot": "a", "seed": 0}) == old
        assert registry.find_run({"snapshot": "b"}) is None
        odd = finished_run(registry, who="the lab's")
        assert registry.find_run({"who": "the lab's"}) == odd
        with pytest.raises(InputError, match="both kinds of quotes"):
            registry.find_run({"who": "'\""})

    def test_metrics_are_put_on_the_run_of_a_version_after_its_end(self, registry, add_version, client):
        version = add_version()
        assert registry.add_metrics(version, {"effort_kept_share": 0.5, "effort_images": 4}, step=4)
        assert registry.add_metrics(version.version, {"effort_kept_share": 0.5, "effort_images": 5}, step=5)
        run = client.get_run(version.run_id)
        assert run.data.metrics == {"effort_kept_share": 0.5, "effort_images": 5.0}
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(version.run_id, "effort_kept_share")
        assert [(point.value, point.step) for point in history] == [(0.5, 4)]
        with pytest.raises(RefusedError):
            registry.add_metrics(version, {"loss?": 1.0})

    def test_a_version_or_run_that_is_gone_takes_no_metrics(self, registry, add_version, client):
        first, second = add_version(), add_version()
        client.delete_run(first.run_id)
        client.delete_model_version(registry.model, str(second.version))
        for number in (first.version, second.version, 99):
            assert not registry.add_metrics(number, {"effort_images": 1.0})

    def test_an_experiment_deleted_in_mlflow_is_named_with_the_cure(self, registry, client):
        client.delete_experiment(client.get_run(finished_run(registry)).info.experiment_id)
        with (
            pytest.raises(StateError, match="mlflow experiments restore --experiment-id"),
            registry.start_run("again", params={}, tags={}),
        ):
            pass


class TestVersions:
    def test_a_run_is_registered_once(self, registry, tmp_path):
        assert registry.versions() == []
        folder = checkpoint(tmp_path / "c")
        run_id = finished_run(registry)
        start = time.perf_counter()
        first = registry.register(run_id, folder, tags={"snapshot": "ab", "round": 1})
        assert time.perf_counter() - start < 10
        assert (first.name, first.version, first.run_id) == (registry.model, 1, run_id)
        assert first.label == f"{registry.model}-v1"
        assert {"snapshot": "ab", "round": "1"}.items() <= first.tags.items()
        assert registry.register(run_id, folder, tags={"snapshot": "other"}) == first
        second = registry.register(finished_run(registry), folder, tags={"snapshot": "ab", "round": 2})
        assert registry.versions() == [first, second]
        assert registry.find_version({"snapshot": "ab"}) == second
        assert registry.find_version({"snapshot": "ab", "round": 1}) == first
        assert registry.find_version({"snapshot": "none"}) is None
        assert registry.version(2) == second
        with pytest.raises(StateError, match="no version 9"):
            registry.version(9)

    def test_a_checkpoint_without_a_file_is_refused(self, registry, tmp_path):
        folder = checkpoint(tmp_path / "c")
        (folder / "model.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no model\.json"):
            registry.register("some run", folder, tags={})
        with pytest.raises(RefusedError, match="RESOURCE_DOES_NOT_EXIST"):
            registry.register("0" * 32, checkpoint(tmp_path / "c"), tags={})

    def test_a_checkpoint_comes_back_whole_and_is_kept(self, registry, tmp_path):
        weights = np.random.default_rng(0).bytes(3_000_000)
        folder = checkpoint(tmp_path / "c", weights)
        version = registry.register(finished_run(registry), folder, tags={})
        fetched = registry.download(version, tmp_path / "cache")
        assert fetched == tmp_path / "cache" / version.label
        assert sorted(path.name for path in fetched.iterdir()) == ["model.json", "model.safetensors"]
        assert (fetched / "model.safetensors").read_bytes() == weights
        nowhere = Registry("http://127.0.0.1:9", registry.experiment, registry.model)
        assert nowhere.download(version, tmp_path / "cache") == fetched
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [version.label]

    def test_a_damaged_cache_is_fetched_again(self, registry, tmp_path):
        version = registry.register(finished_run(registry), checkpoint(tmp_path / "c"), tags={})
        fetched = registry.download(version, tmp_path / "cache")
        (fetched / "model.safetensors").write_bytes(b"wei")
        assert (registry.download(version, tmp_path / "cache") / "model.safetensors").read_bytes() == b"weights"
        (fetched / "model.json").unlink()
        assert (registry.download(version, tmp_path / "cache") / "model.json").is_file()

    def test_a_checkpoint_that_changed_in_mlflow_is_refused(self, registry, server, tmp_path):
        version = registry.register(finished_run(registry), checkpoint(tmp_path / "c"), tags={})
        (stored,) = (server.folder / "artifacts").rglob(f"{version.run_id}/artifacts/model/model.safetensors")
        stored.write_bytes(b"others")
        with pytest.raises(CheckpointError, match="not what was registered"):
            registry.download(version, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []
        stored.unlink()
        with pytest.raises(RefusedError, match=f"fetch {version.label}"):
            registry.download(version, tmp_path / "cache")

    def test_a_cache_that_cannot_be_written_is_named(self, registry, tmp_path):
        version = registry.register(finished_run(registry), checkpoint(tmp_path / "c"), tags={})
        (tmp_path / "file").touch()
        with pytest.raises(ServiceError, match=r"cannot fetch .*check the folder and the free space"):
            registry.download(version, tmp_path / "file")


class TestDecisions:
    def test_nothing_is_champion_at_first(self, registry, add_version):
        assert (registry.champion(), registry.challenger(), registry.history()) == (None, None, [])
        with pytest.raises(StateError, match="no champion to roll back from"):
            registry.rollback("by hand")
        add_version()
        assert (registry.champion(), registry.challenger()) == (None, None)

    def test_promote_and_refuse_write_why_and_end_the_challenge(self, registry, add_version):
        first, second = add_version(), add_version()
        registry.set_challenger(first)
        assert registry.challenger() == first
        promoted = registry.promote(first, "first model", {"ap": np.float32(0.5), "per": {"grey": {"ap": 0.25}}})
        assert registry.champion() == promoted
        assert registry.challenger() is None
        assert promoted.tags["celloop.decision"] == "promoted"
        assert promoted.tags["celloop.reason"] == "first model"
        assert json.loads(promoted.tags["celloop.metrics"]) == {"ap": 0.5, "per": {"grey": {"ap": 0.25}}}
        registry.set_challenger(2)
        refused = registry.refuse(second, "AP fell by 0.02", {"ap": 0.48})
        assert (registry.champion(), registry.challenger()) == (promoted, None)
        assert refused.tags["celloop.decision"] == "refused"
        assert refused.tags["celloop.reason"] == "AP fell by 0.02"
        assert refused.tags["snapshot"] == "s"

    def test_another_challenger_stays(self, registry, add_version):
        first, second = add_version(), add_version()
        registry.set_challenger(second)
        registry.promote(first, "", {})
        registry.refuse(first, "", {})
        assert registry.challenger() == second

    def test_rollback_goes_back_champion_by_champion(self, registry, add_version):
        for _ in range(4):
            add_version()
        for number in (1, 2, 4, 2):
            registry.promote(number, "better", {})
            registry.promote(number, "better", {})  # again, as after a kill
        assert registry.history() == [1, 2, 4, 2]
        for expected in (4, 2, 1):
            start = time.perf_counter()
            back = registry.rollback("worse in use")
            assert time.perf_counter() - start < 10
            assert (back.version, registry.champion()) == (expected, back)
        assert registry.version(4).tags["celloop.decision"] == "rolled back"
        assert registry.version(4).tags["celloop.reason"] == "worse in use"
        with pytest.raises(StateError, match="v1 is the first champion"):
            registry.rollback("once more")
        assert registry.champion().version == 1
        registry.promote(3, "", {})
        assert registry.history() == [1, 3]

    def test_rollback_skips_what_was_deleted_and_knows_what_was_set_by_hand(self, registry, add_version, client):
        for _ in range(4):
            add_version()
        for number in (1, 2, 3):
            registry.promote(number, "", {})
        client.set_registered_model_alias(registry.model, "champion", "4")
        assert registry.history() == [1, 2, 3, 4]
        client.delete_model_version(registry.model, "3")
        assert registry.rollback("").version == 2

    def test_a_damaged_history_is_named(self, registry, add_version, client):
        registry.promote(add_version(), "", {})
        client.set_registered_model_tag(registry.model, "celloop.champions", "1, two")
        with pytest.raises(StateError, match=r"tag celloop.champions .* '1, two'; correct it"):
            registry.champion()

    def test_wrong_decisions_change_nothing(self, registry, add_version):
        version = add_version()
        with pytest.raises(NonFiniteError, match="-v1 hold NaN"):
            registry.promote(version, "", {"ap": float("nan")})
        for call in (
            registry.set_challenger,
            lambda v: registry.promote(v, "", {}),
            lambda v: registry.refuse(v, "", {}),
        ):
            with pytest.raises(StateError, match="no version 5"):
                call(5)
        assert (registry.champion(), registry.challenger()) == (None, None)
        assert registry.version(1) == version

    @pytest.mark.parametrize("survived", range(6))
    def test_a_promotion_killed_anywhere_is_finished_by_the_next(self, registry, add_version, survived):
        add_version(), add_version()
        registry.promote(1, "first", {})
        registry.set_challenger(2)
        real = registry._server._open()
        registry._server._client = Dying(real, survived)
        with pytest.raises(KilledError):
            registry.promote(2, "better", {"ap": 0.5})
        registry._server._client = real
        assert registry.champion().version in (1, 2)
        promoted = registry.promote(2, "better", {"ap": 0.5})
        assert (registry.champion(), registry.challenger()) == (promoted, None)
        assert registry.history() == [1, 2]
        assert registry.rollback("").version == 1


class KilledError(BaseException):
    """Stands for SIGKILL."""


class Dying:
    """MLflow's client, but the process dies at the write after `survived` ones."""

    def __init__(self, client, survived: int):
        self.client, self.left = client, survived

    def __getattr__(self, name):
        if name.startswith(("set_", "delete_", "log_", "create_")):
            if self.left == 0:
                raise KilledError
            self.left -= 1
        return getattr(self.client, name)


def test_no_global_setting_is_changed(registry, add_version, tmp_path):
    import mlflow
    from mlflow.telemetry.client import get_telemetry_client

    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW")}
    address = mlflow.get_tracking_uri()
    registry.download(registry.promote(add_version(), "", {}), tmp_path / "cache")
    assert {name: value for name, value in os.environ.items() if name.startswith("MLFLOW")} == before
    assert mlflow.get_tracking_uri() == address != registry._server.address
    assert get_telemetry_client() is None


def test_a_server_away_for_a_while_loses_no_metric(own_server, monkeypatch):
    monkeypatch.setattr("loop.adapters.mlflow_run._RETRY_S", 0.0)
    registry = Registry(own_server.url, "celloop-away", "celloop-away")
    with registry.start_run("train", params={}, tags={"snapshot": "a"}) as run:
        run.log(0, {"loss": 1.0})
        run.flush()
        own_server.stop()
        for step in range(1, 600):
            run.log(step, {"loss": 1.0})
        own_server.start()
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=own_server.url).get_metric_history(run.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(600))
    assert registry.find_run({"snapshot": "a"}) == run.run_id

    with (  # noqa: PT012 (the whole body is what is tested)
        pytest.raises(UnreachableError, match="gives no answer") as caught,
        registry.start_run("train", params={}, tags={"snapshot": "b"}) as run,
    ):
        run.log(0, {"loss": 1.0})
        own_server.stop()
    assert f"run {run.run_id} could not be ended" in caught.value.__notes__[0]
    with pytest.raises(UnreachableError, match="celloop up"):
        registry.check()
