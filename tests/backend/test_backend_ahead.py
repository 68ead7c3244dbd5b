"""Images are prepared while nobody clicks, in the order in which people will see them."""

import threading
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from backend.ahead import upcoming
from backend.errors import BusyError
from backend.turns import Rank
from loop.adapters.index import ImageRow
from loop.models.segmenter import Segmenter


def _row(image_id, **given):
    values = {"project_id": 1, "sha256": "", "path": "", "display": f"/data/local-files/?d={image_id}.png"}
    return ImageRow(image_id=image_id, **({"task_id": 1} | values | given))


def _images(b, number):
    """Images `a`, `b`, ..., all open, each with a file of its own, ranked against the alphabet."""
    names = "abcdefgh"[:number]
    for i, name in enumerate(names):
        Image.fromarray(np.full((64, 64), 20 + i, np.uint8)).save(b.display / f"{name}.png")
    b.index.add_images("cells", [_row(name, task_id=i + 1) for i, name in enumerate(names)])
    b.index.set_images("cells", {name: {"rank": number - i} for i, name in enumerate(names)})


@pytest.fixture
def configs(tmp_path):
    def write(**click):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / "cells.yaml").write_text(yaml.safe_dump({"click": click}))
        return tmp_path / "configs"

    return write


@pytest.fixture
def looked(monkeypatch):
    """The images that champions have looked at for clicks, by their grey."""
    seen = []
    scene = Segmenter.scene

    def spy(self, pixels):
        if pixels.any():  # not the empty image on which a model is tried
            seen.append(int(pixels[0, 0, 0]))
        return scene(self, pixels)

    monkeypatch.setattr(Segmenter, "scene", spy)
    return seen


def _no_thread(b):
    """Stops the thread, so that a test looks itself."""
    b.parts.ahead._ended.set()
    b.parts.ahead._thread.join()
    b.parts.ahead._ended.clear()


def test_the_order_is_that_of_the_queue():
    rows = [
        _row("doubtful", score=0.6),
        _row("third", rank=300),
        _row("no task", rank=1, task_id=None),
        _row("sure", score=0.1),
        _row("first", rank=2),
        _row("not looked at"),
    ]
    order = ["first", "third", "doubtful", "sure", "not looked at"]
    assert [row.image_id for row in upcoming(rows, 10)] == order
    assert [row.image_id for row in upcoming(rows, 2)] == order[:2]
    assert upcoming([], 3) == []


def test_the_next_images_are_prepared_by_themselves_and_clicks_find_them(backend, configs, looked, eventually):
    with backend("bright", configs_dir=configs(ahead=3)) as b:
        _no_thread(b)
        _images(b, 5)
        b.parts.ahead._looked.clear()
        b.parts.ahead.start()
        eventually(lambda: b.metric("celloop_prepared_images_total", project="cells", by="champion") == 3, within_s=20)
        assert looked == [24, 23, 22]
        b.click("e.png", *[])
        assert b.metric("celloop_click_maps_total", result="hit") == 1
        assert looked == [24, 23, 22]


def test_nothing_is_done_twice_and_what_is_new_is_done(backend, configs, looked):
    with backend("bright", configs_dir=configs(ahead=3)) as b:
        _no_thread(b)
        _images(b, 5)
        b.parts.ahead._looked.clear()
        assert b.parts.ahead.prepare() == 3
        b.parts.ahead._looked.clear()
        assert b.parts.ahead.prepare() == 0
        b.index.set_images("cells", {"e": {"state": "labelled"}, "d": {"state": "skipped"}})
        assert b.parts.ahead.prepare() == 0  # the same project as a moment ago
        b.index.set_published("cells", "celloop-cells-v1-r1", "celloop-cells-v1")
        assert b.parts.ahead.prepare() == 2
        assert looked == [24, 23, 22, 21, 20]
        b.registry.promote("dark")
        b.parts.slot.refresh()
        assert b.parts.ahead.prepare() == 3  # another model sees other things


def test_no_more_than_memory_holds(backend, configs, looked):
    with backend("bright", configs_dir=configs(ahead=8), map_cache_bytes=4 * 2 * 64 * 64 * 4) as b:
        _no_thread(b)
        _images(b, 8)
        b.parts.ahead._looked.clear()
        assert b.parts.ahead.prepare() == 3
        assert looked == [27, 26, 25]


@pytest.mark.parametrize("click", [{"ahead": 0}, {"ahead": 3}])
def test_off_or_without_a_model_there_is_nothing_to_do(backend, configs, click):
    with backend("bright" if not click["ahead"] else None, configs_dir=configs(**click)) as b:
        _no_thread(b)
        _images(b, 2)
        assert b.parts.ahead.prepare() == 0


def test_what_cannot_be_prepared_is_told_once_and_holds_nothing_up(backend, configs, looked, caplog):
    with backend("bright", configs_dir=configs(ahead=5)) as b:
        _no_thread(b)
        _images(b, 5)
        for name in "de":
            (b.display / f"{name}.png").unlink()
        for _ in range(2):
            b.parts.ahead._looked.clear()
            b.parts.ahead.prepare()
        assert looked == [22, 21, 20]
        b.parts.ahead._index = None
        assert b.parts.ahead.prepare() == 0
    assert caplog.text.count("not every next image of cells is prepared") == 1
    assert "AttributeError" in caplog.text


def test_it_waits_while_people_click(backend, configs, looked, eventually):
    with backend("bright", configs_dir=configs(ahead=1)) as b:
        _no_thread(b)
        _images(b, 1)
        b.parts.ahead._turns._quiet_s = 0.5
        with b.parts.ahead._turns.beside():
            pass
        b.parts.ahead._looked.clear()
        begin = time.monotonic()
        assert b.parts.ahead.prepare() == 1
        assert time.monotonic() - begin > 0.4


def test_a_click_in_an_image_that_is_being_prepared_takes_it_over(backend, configs, looked, eventually):
    with backend("bright", configs_dir=configs(ahead=1)) as b:
        _no_thread(b)
        _images(b, 1)
        turns = b.parts.ahead._turns
        turns._quiet_s = 60
        with turns.beside():
            pass
        b.parts.ahead._looked.clear()
        preparing = threading.Thread(target=b.parts.ahead.prepare)
        preparing.start()
        eventually(lambda: turns.waiting(Rank.AHEAD) == 1)
        assert b.click("a.png", b.keypoints[0]).status_code == 400  # placed on an image of another size
        preparing.join(5)
        assert not preparing.is_alive()
        assert looked == [20]


def test_it_ends_with_the_backend_in_the_middle_of_an_image(backend, configs, caplog, eventually):
    with backend("bright", configs_dir=configs(ahead=1)) as b:
        _no_thread(b)
        _images(b, 1)
        turns = b.parts.ahead._turns
        turns._quiet_s = 60
        with turns.beside():
            pass
        b.parts.ahead._looked.clear()
        b.parts.ahead.start()
        eventually(lambda: turns.waiting(Rank.AHEAD) == 1)
        begin = time.monotonic()
        b.parts.ahead.stop()
        assert not b.parts.ahead._thread.is_alive()
        assert time.monotonic() - begin < 2
        with pytest.raises(BusyError), turns.take(Rank.AHEAD):
            pass
    assert caplog.messages == []


class _OneIsBroken:
    """An index whose first project's images cannot be read."""

    def __init__(self, index):
        self._index, self.asked = index, []

    def projects(self):
        return sorted(self._index.projects(), key=lambda row: row.name)

    def images(self, project, **given):
        self.asked.append(project)
        if project == "a-broken-one":
            raise OSError("disk gone")
        return self._index.images(project, **given)


def test_a_project_that_fails_does_not_hold_up_the_next_one(backend, configs, looked, caplog):
    with backend("bright", configs_dir=configs(ahead=1)) as b:
        _no_thread(b)
        _images(b, 1)
        b.index.add_project("a-broken-one", ls_project_id=2, root=b.display, label_config=b.config)
        b.parts.slot.refresh()
        b.parts.ahead._index = index = _OneIsBroken(b.index)
        b.parts.ahead._looked.clear()
        assert b.parts.ahead.prepare() == 1
        assert index.asked == ["a-broken-one", "cells"]
    assert "of a-broken-one is prepared" in caplog.text


def test_no_image_is_prepared_for_a_model_that_has_been_replaced_meanwhile(backend, configs, looked, monkeypatch):
    with backend("bright", configs_dir=configs(ahead=4)) as b:
        _no_thread(b)
        _images(b, 4)
        b.parts.ahead._looked.clear()
        before = Segmenter.scene

        def swap(self, pixels):
            if pixels.any() and b.registry.count == 1:
                b.registry.promote("dark")
                b.parts.slot.refresh()
            return before(self, pixels)

        monkeypatch.setattr(Segmenter, "scene", swap)
        assert b.parts.ahead.prepare() == 1
        assert b.parts.ahead.prepare() == 4
        assert looked == [23, 23, 22, 21, 20]
