import threading
import time
from dataclasses import dataclass, replace

import pytest

from backend.errors import UnknownProjectError
from backend.metrics import Metrics
from backend.model_slot import ModelSlot
from backend.projects import Projects, version_string
from loop.adapters.index import ProjectRow
from loop.errors import CheckpointError, UnreachableError


@dataclass(frozen=True)
class FakeVersion:
    label: str


@dataclass(frozen=True)
class FakeSegmenter:
    label: str


class FakeRegistry:
    """A registry whose alias a test moves; `fault` is raised by the next calls."""

    def __init__(self, label=None):
        self.label = label
        self.fault = None
        self.downloads = []

    def champion(self):
        if self.fault:
            raise self.fault
        return FakeVersion(self.label) if self.label else None

    def download(self, version, cache_dir):
        self.downloads.append(version.label)
        return cache_dir / version.label


class FakeIndex:
    def __init__(self, *names):
        self.rows = [
            ProjectRow(id=i, name=name, ls_project_id=i, root="", label_config="") for i, name in enumerate(names, 1)
        ]
        self.fault = None

    def projects(self):
        if self.fault:
            raise self.fault
        return self.rows


def _slot(registries, tmp_path, load=None, **settings):
    return ModelSlot(
        FakeIndex(*registries),
        registries.__getitem__,
        tmp_path,
        Metrics(),
        load=load or (lambda directory, label: FakeSegmenter(label)),
        **settings,
    )


def _sample(slot, name, **labels):
    return slot._metrics.registry.get_sample_value(name, labels)


def test_no_champion_no_model_then_the_first_then_the_next(tmp_path):
    registry = FakeRegistry()
    slot = _slot({"p": registry}, tmp_path)
    slot.refresh()
    assert slot.get("p") is None
    registry.label = "celloop-p-v1"
    slot.refresh()
    first = slot.get("p")
    assert first.label == "celloop-p-v1"
    registry.label = "celloop-p-v2"
    slot.refresh()
    assert first.segmenter == FakeSegmenter("celloop-p-v1")
    assert slot.get("p").segmenter == FakeSegmenter("celloop-p-v2")
    assert slot.labels() == {"p": "celloop-p-v2"}
    assert _sample(slot, "celloop_model_swaps_total", project="p") == 2
    assert _sample(slot, "celloop_model_info", project="p", model="celloop-p-v2") == 1
    assert _sample(slot, "celloop_model_info", project="p", model="celloop-p-v1") is None


def test_one_load_a_version(tmp_path):
    registry = FakeRegistry("celloop-p-v1")
    slot = _slot({"p": registry}, tmp_path)
    for _ in range(5):
        slot.refresh()
    assert registry.downloads == ["celloop-p-v1"]


def test_an_alias_taken_away_keeps_the_model(tmp_path):
    registry = FakeRegistry("celloop-p-v1")
    slot = _slot({"p": registry}, tmp_path)
    slot.refresh()
    registry.label = None
    slot.refresh()
    assert slot.get("p").label == "celloop-p-v1"


def test_mlflow_away_keeps_the_model_and_is_logged_once(tmp_path, caplog):
    registry = FakeRegistry("celloop-p-v1")
    slot = _slot({"p": registry}, tmp_path)
    slot.refresh()
    registry.fault = UnreachableError("MLflow does not answer")
    caplog.clear()
    for _ in range(4):
        slot.refresh()
    assert slot.get("p").label == "celloop-p-v1"
    assert sum("MLflow does not answer" in record.message for record in caplog.records) == 1
    assert _sample(slot, "celloop_failures_total", kind="UnreachableError") == 4
    registry.fault, registry.label = None, "celloop-p-v2"
    slot.refresh()
    assert slot.get("p").label == "celloop-p-v2"


def test_started_without_mlflow_it_takes_the_model_that_made_what_is_published(tmp_path):
    registry = FakeRegistry("celloop-p-v2")
    registry.fault = UnreachableError("MLflow does not answer")
    slot = _slot({"p": registry}, tmp_path)
    slot._index.rows = [replace(slot._index.rows[0], published_model="celloop-p-v1")]
    slot.refresh()
    assert slot.get("p") is None
    (tmp_path / "celloop-p-v1").mkdir()
    slot.refresh()
    assert slot.get("p").label == "celloop-p-v1"
    registry.fault = None
    slot.refresh()
    assert slot.get("p").label == "celloop-p-v2"


def test_one_project_failing_does_not_stop_another(tmp_path):
    registries = {"a": FakeRegistry("celloop-a-v1"), "b": FakeRegistry("celloop-b-v1")}
    registries["a"].fault = ValueError("unexpected")
    slot = _slot(registries, tmp_path)
    slot.refresh()
    assert slot.labels() == {"b": "celloop-b-v1"}


def test_an_index_that_fails_keeps_everything(tmp_path):
    slot = _slot({"p": FakeRegistry("celloop-p-v1")}, tmp_path)
    slot.refresh()
    slot._index.fault = OSError("disk")
    slot.refresh()
    assert slot.labels() == {"p": "celloop-p-v1"}


def test_a_damaged_model_keeps_the_old_one_and_is_not_tried_at_each_poll(tmp_path):
    loads = []

    def load(directory, label):
        loads.append(label)
        if label == "celloop-p-v2":
            raise CheckpointError("v2 is truncated")
        return FakeSegmenter(label)

    registry = FakeRegistry("celloop-p-v1")
    slot = _slot({"p": registry}, tmp_path, load, retry_s=0.1)
    slot.refresh()
    registry.label = "celloop-p-v2"
    slot.refresh()
    slot.refresh()
    assert slot.get("p").label == "celloop-p-v1"
    assert loads.count("celloop-p-v2") == 1
    time.sleep(0.12)
    slot.refresh()
    assert loads.count("celloop-p-v2") == 2
    registry.label = "celloop-p-v3"
    slot.refresh()
    assert slot.get("p").label == "celloop-p-v3"


def test_reading_never_waits_for_loading(tmp_path):
    loading, release = threading.Event(), threading.Event()

    def load(directory, label):
        if label.endswith("v2"):
            loading.set()
            release.wait(5)
        return FakeSegmenter(label)

    registry = FakeRegistry("celloop-p-v1")
    slot = _slot({"p": registry}, tmp_path, load)
    slot.refresh()
    registry.label = "celloop-p-v2"
    thread = threading.Thread(target=slot.refresh)
    thread.start()
    assert loading.wait(5)
    begin = time.perf_counter()
    assert slot.get("p").label == "celloop-p-v1"
    assert time.perf_counter() - begin < 0.05
    release.set()
    thread.join()
    assert slot.get("p").label == "celloop-p-v2"


def test_the_thread_sees_a_new_champion_and_stops(tmp_path, eventually):
    registry = FakeRegistry("celloop-p-v1")
    slot = _slot({"p": registry}, tmp_path, poll_s=0.02)
    slot.start()
    eventually(lambda: slot.get("p") is not None)
    registry.label = "celloop-p-v2"
    eventually(lambda: slot.get("p").label == "celloop-p-v2")
    slot.stop()
    assert not slot._thread.is_alive()


def test_wake_looks_at_once(tmp_path, eventually):
    registry = FakeRegistry()
    slot = _slot({"p": registry}, tmp_path, poll_s=60.0)
    slot.start()
    time.sleep(0.05)
    registry.label = "celloop-p-v1"
    slot.wake()
    eventually(lambda: slot.get("p") is not None, within_s=2)
    slot.stop()


def test_projects_are_found_by_their_number_in_label_studio():
    index = FakeIndex("a", "b")
    projects = Projects(index)
    assert projects.find(2).name == "b"
    with pytest.raises(UnknownProjectError, match="9"):
        projects.find(9)
    assert [row.name for row in projects.all()] == ["a", "b"]


def test_an_index_that_fails_gives_what_it_gave_last():
    index = FakeIndex("a", "b")
    projects = Projects(index)
    projects.find(2)
    index.fault = OSError("disk")
    assert projects.find(2).name == "b"
    assert [row.name for row in projects.all()] == ["b"]
    assert projects.last(1) is None
    with pytest.raises(OSError, match="disk"):
        projects.find(1)


ROW = ProjectRow(id=1, name="p", ls_project_id=5, root="", label_config="")


@pytest.mark.parametrize(
    ("published", "model", "held", "expected"),
    [
        ("", "", None, "celloop-p-r0"),
        ("celloop-p-r0", "", None, "celloop-p-r0"),
        ("celloop-p-r0", "", "celloop-p-v1", "celloop-p-v1"),
        ("celloop-p-v1-r1", "celloop-p-v1", "celloop-p-v1", "celloop-p-v1-r1"),
        ("celloop-p-v1-r1", "celloop-p-v1", "celloop-p-v2", "celloop-p-v2"),
        ("celloop-p-v1-r1", "celloop-p-v1", None, "celloop-p-v1-r1"),
        ("", "", "celloop-p-v1", "celloop-p-v1"),
    ],
)
def test_version_string(published, model, held, expected):
    row = replace(ROW, published_version=published, published_model=model)
    assert version_string(row, held) == expected
