import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import context as context_module
from flows import start
from flows.context import config_path
from flows.local.workspace import Endpoints, Workspace
from flows.start import start_project
from loop.adapters.index import Index
from loop.config import LoopConfig, load_config
from loop.data.store import write_png
from loop.errors import ImageError, InputError, RefusedError, StateError
from loop.labelstudio.interface import label_config

CONFIG = LoopConfig()
OTHER_XML = label_config(("Nucleus", "Debris"))


class FakeLabelStudio:
    """Projects and tasks in memory, with the refusals that the real one makes."""

    def __init__(self) -> None:
        self.projects: dict[int, dict[str, str]] = {}
        self.settings_checked: list[int] = []
        self.refuses_backend = False
        self.webhooks = 0

    def find_project(self, title: str) -> int | None:
        return min((n for n, project in self.projects.items() if project["title"] == title), default=None)

    def project(self, number: int) -> dict[str, str]:
        return self.projects[number]

    def create_project(self, title: str, xml: str, description: str = "") -> int:
        number = self.find_project(title)
        if number is None:
            number = len(self.projects) + 1
            self.projects[number] = {"title": title, "label_config": xml}
        elif self.projects[number]["label_config"] != xml:
            raise StateError("another label config")
        self.settings_checked.append(number)
        return number

    def connect_storage(self, number: int, directory: Path) -> int:
        return 1

    def upload(self, number: int, paths: list[Path]) -> list[str]:
        return [f"/data/upload/{path.name}" for path in paths]

    def import_tasks(self, number: int, tasks: list[dict[str, Any]]) -> list[int]:
        return [100 + i for i in range(len(tasks))]

    def connect_backend(self, number: int, url: str, title: str, **_: Any) -> int:
        if self.refuses_backend:
            raise RefusedError("400: no answer from the backend")
        return 1

    def connect_webhook(self, number: int, url: str, secret: str) -> int:
        self.webhooks += 1
        return 1


class Place(Workspace):
    """A workspace whose services are said to run."""

    managed = True

    def endpoints(self) -> Endpoints:
        return Endpoints(
            "http://ls", "t" * 40, "", "", "http://mlflow", "http://prefect/api", "http://backend", self.managed, "s"
        )


@pytest.fixture
def label_studio(monkeypatch: pytest.MonkeyPatch) -> FakeLabelStudio:
    fake = FakeLabelStudio()
    for module in (start, context_module):
        monkeypatch.setattr(module, "LabelStudio", lambda *_: fake)
    return fake


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path / "ws")
    made.prepare()
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "cells"
    for number in range(3):
        write_png(np.full((8, 8), 40 * number, np.uint8), folder / f"i{number}.png")
    return folder


def test_a_second_start_keeps_the_edited_settings(label_studio: FakeLabelStudio, place: Place, images: Path) -> None:
    start_project(place, images, "cells", None)
    path = config_path(place, "cells")
    assert load_config(path) == CONFIG
    path.write_text("train:\n  minutes: 3.5\n")
    start_project(place, images, "cells", None)
    assert path.read_text() == "train:\n  minutes: 3.5\n"
    start_project(place, images, "cells", CONFIG)
    assert load_config(path) == CONFIG


def test_a_second_start_keeps_the_label_config(label_studio: FakeLabelStudio, place: Place, images: Path) -> None:
    start_project(place, images, "cells", CONFIG, label_config_xml=OTHER_XML)
    start_project(place, images, "cells", CONFIG)
    assert Index(place.index_url).project("cells").label_config == OTHER_XML
    edited = label_config(("Nucleus", "Debris", "Dividing"))
    label_studio.projects[1]["label_config"] = edited
    start_project(place, images, "cells", None)
    assert Index(place.index_url).project("cells").label_config == edited
    assert label_studio.settings_checked == [1, 1, 1]
    with pytest.raises(StateError, match="another label config"):
        start_project(place, images, "cells", None, label_config_xml=OTHER_XML)
    label_studio.projects.clear()
    start_project(place, images, "cells", None)
    assert label_studio.projects[1]["label_config"] == edited


def test_only_a_label_studio_of_our_own_gives_an_unknown_project(
    label_studio: FakeLabelStudio, place: Place, images: Path
) -> None:
    label_studio.create_project("cells", OTHER_XML)
    assert start_project(place, images, "cells", None).label_studio_project == 1
    place.managed = False
    start_project(place, images, "cells", None)
    label_studio.create_project("theirs", OTHER_XML)
    for given in (None, OTHER_XML):
        with pytest.raises(StateError, match="choose another name with --name"):
            start_project(place, images, "theirs", None, label_config_xml=given)
    assert [row.name for row in Index(place.index_url).projects()] == ["cells"]
    assert not config_path(place, "theirs").exists()


def test_files_of_equal_content_are_one_group_and_named(
    label_studio: FakeLabelStudio, place: Place, images: Path
) -> None:
    start_project(place, images, "cells", None)
    shutil.copy(images / "i1.png", images / "z.png")
    more = images.parent / "more"
    more.mkdir()
    shutil.copy(images / "i2.png", more / "later.png")
    report = start_project(place, images, "cells", None)
    assert [line.split(": ")[0] for line in report.problems] == ["z.png"]
    assert "the same file as i1.png" in report.problems[0]
    assert "later.png: the same file as i2.png" in start_project(place, more, "cells", None).problems[1]
    groups = {row.image_id: row.group for row in Index(place.index_url).images("cells")}
    assert groups == {"i0": "", "i1": "i1", "i2": "", "z": "i1", "later": "i2"}


def test_copies_take_the_group_that_one_of_them_has(label_studio: FakeLabelStudio, place: Place, images: Path) -> None:
    shutil.copy(images / "i1.png", images / "z.png")
    (images / "manifest.csv").write_text("image,group\ni0.png,a\ni1.png,\ni2.png,b\nz.png,b\n")
    start_project(place, images, "cells", None)
    groups = {row.image_id: row.group for row in Index(place.index_url).images("cells")}
    assert groups == {"i0": "a", "i1": "b", "i2": "b", "z": "b"}


def test_a_single_group_is_named_because_it_allows_no_hold_out(
    label_studio: FakeLabelStudio, place: Place, images: Path
) -> None:
    assert start_project(place, images, "apart", None).problems == ()
    (images / "manifest.csv").write_text("image,group\ni0.png,s\ni1.png,s\ni2.png,s\n")
    (problem,) = start_project(place, images, "cells", None).problems
    assert "all images (3) are of one group (s): no hold-out" in problem
    assert "manifest.csv" in problem


def test_a_full_disk_stops_the_start(
    label_studio: FakeLabelStudio, place: Place, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path, *, sha256: str) -> bool:
        raise ImageError("cannot be written") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(start, "write_display", full)
    with pytest.raises(OSError, match="No space left") as raised:
        start_project(place, images, "cells", None)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(place.display_dir / "cells")


def test_no_image_that_can_be_shown_is_refused_with_the_reasons(
    label_studio: FakeLabelStudio, place: Place, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritable(path: Path, target: Path, *, sha256: str) -> bool:
        raise ImageError(f"{target.name} cannot be written")

    monkeypatch.setattr(start, "write_display", unwritable)
    with pytest.raises(InputError, match=r"none of the 3 images can be shown: i0.png: i0.png cannot be written"):
        start_project(place, images, "cells", None)


def test_a_label_studio_elsewhere_without_way_to_the_backend_still_gets_its_project(
    label_studio: FakeLabelStudio, place: Place, images: Path
) -> None:
    label_studio.refuses_backend = True
    with pytest.raises(RefusedError):
        start_project(place, images, "cells", None)
    place.managed = False
    report = start_project(place, images, "cells", None)
    assert report.images == 3
    (problem,) = report.problems
    assert "did not take the backend at http://backend (400: no answer from the backend)" in problem
    assert label_studio.webhooks == 0
    label_studio.refuses_backend = False
    assert start_project(place, images, "cells", None).problems == ()
    assert label_studio.webhooks == 1


def test_a_new_project_can_mark_doubtful_cells_and_done_areas(
    label_studio: FakeLabelStudio, place: Place, images: Path
) -> None:
    start_project(place, images, "cells", None)
    assert label_studio.projects[1]["label_config"] == label_config(doubtful="Cell?", done="Done area")
    interface = context_module.open_context(place, "cells").interface
    assert (interface.labels, interface.doubtful, interface.done) == (("Cell",), "Cell?", "Done area")
    plain = load_config(None, {"publish.doubtful_label": "", "publish.done_label": ""})
    start_project(place, images, "plain", plain)
    assert label_studio.projects[2]["label_config"] == label_config()


def test_a_project_from_before_those_labels_goes_on_without_until_a_person_adds_them(
    label_studio: FakeLabelStudio, place: Place, images: Path
) -> None:
    old = label_config()
    label_studio.create_project("cells", old)
    for _ in range(2):
        start_project(place, images, "cells", None)
        assert label_studio.projects[1]["label_config"] == old
        assert context_module.open_context(place, "cells").interface.labels == ("Cell",)
    edited = old.replace('<Label value="Cell" background="#00c853"/>', '<Label value="Cell"/><Label value="Cell?"/>')
    label_studio.projects[1]["label_config"] = edited
    start_project(place, images, "cells", None)
    interface = context_module.open_context(place, "cells").interface
    assert interface.labels == ("Cell",)
    assert interface.mask_control("Cell?") is not None
