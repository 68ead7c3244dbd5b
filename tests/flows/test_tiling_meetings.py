"""Tiles where something else happens beside them: other names, a second process, a repeat after a kill, a choice."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiling_stage import Place, Studio, rows_of

from flows import context as context_module
from flows import start
from flows.select import select
from flows.start import start_project
from flows.tiling import cut_dense, settle
from loop.config import load_config
from loop.data.store import write_png
from loop.types import Instances

SETTINGS = {"tiles.max_px": 20_000, "tiles.side": 100, "tiles.halo": 16, "tiles.max_cells": 20}
TILE = "slide.t0000-0000"


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Studio:
    fake = Studio()
    for module in (start, context_module):
        monkeypatch.setattr(module, "LabelStudio", lambda *_: fake)
    return fake


@pytest.fixture
def begun(tmp_path: Path, studio: Studio) -> Any:
    """A project of a large image, cut into tiles, and two small ones."""
    folder, place = tmp_path / "cells", Place(tmp_path / "ws")
    folder.mkdir()
    place.prepare()
    rng = np.random.default_rng(3)
    for name, shape in (("slide", (150, 260)), ("i0", (120, 140)), ("i0.t0000-0001", (30, 40))):
        write_png(rng.integers(0, 255, shape, dtype=np.uint8), folder / f"{name}.png")

    def again() -> Any:
        report = start_project(place, folder, "cells", load_config(None, SETTINGS))
        return report, context_module.open_context(place, "cells")

    return again


def crowded(context: Any) -> Any:
    rows = context.index.images("cells", state="open")
    cells = {}
    for row in rows:
        boxes = [(x, y, x + 4, y + 4) for y in range(0, row.height - 4, 8) for x in range(0, row.width - 4, 8)]
        cells[row.image_id] = Instances.build((row.height, row.width), boxes, [np.ones((4, 4), bool)] * len(boxes))
    return {name: SimpleNamespace(instances=found) for name, found in cells.items()}


def test_no_tile_takes_the_place_of_an_image_of_its_name(begun: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, context = begun()
    before = rows_of(context)
    cut_dense(context, crowded(context))
    after = rows_of(context)
    assert after["i0.t0000-0001"] == before["i0.t0000-0001"]
    assert after["i0"].state == "open"
    assert "i0 is not cut into tiles: one would be called i0.t0000-0001" in caplog.text
    assert any(row.parent == "slide" for row in after.values())


def test_a_tile_that_comes_back_gets_its_task_though_the_first_try_was_killed(
    begun: Any, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, context = begun()
    row = rows_of(context)[TILE]
    del studio.tasks[row.task_id or 0]
    context.index.set_images("cells", {TILE: {"state": "gone"}})

    class KilledError(Exception):
        pass

    def killed(*_: Any) -> Any:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("flows.tiling.settle", killed)
        with pytest.raises(KilledError):
            begun()
    report, context = begun()
    now = rows_of(context)[TILE]
    assert (report.tiles, now.state, studio.tasks.get(now.task_id or 0)) == (6, "open", TILE)


def test_a_round_and_a_start_that_meet_make_each_task_once(begun: Any, studio: Studio) -> None:
    _, context = begun()
    for task in [task for task, name in studio.tasks.items() if name.startswith("slide.")]:
        del studio.tasks[task]
    context.index.set_images("cells", {name: {"task_id": None} for name, row in rows_of(context).items() if row.parent})
    studio.import_s = 0.2
    both = [threading.Thread(target=settle, args=(context,)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(set(studio.tasks.values())) == len(studio.tasks)
    assert {studio.tasks[row.task_id or 0] for row in rows_of(context).values() if row.parent} == {
        row.image_id for row in rows_of(context).values() if row.parent
    }


def test_a_tile_without_a_task_is_not_offered_nor_chosen(begun: Any, studio: Studio) -> None:
    _, context = begun()
    row = rows_of(context)[TILE]
    Path(row.path).write_bytes(b"damaged")
    (context.workspace.display_dir / "cells" / f"{TILE}.png").unlink()
    del studio.tasks[row.task_id or 0]
    context.index.set_images("cells", {TILE: {"task_id": None}})
    report, context = begun()
    assert (report.images, report.tiles) == (7, 5)
    assert report.problems[0].startswith(f"{TILE}: ")
    assert TILE not in {selection.image_id for selection in select(context, 0, {})}
    assert len(select(context, 0, {})) == 7


def test_tiles_that_are_as_small_as_they_get_are_not_cut_again_in_each_round(begun: Any) -> None:
    _, context = begun()
    context = replace(context, config=load_config(None, {**SETTINGS, "tiles.side": 70}))
    made = [len(cut_dense(context, crowded(context))) for _ in range(4)]
    assert made[0] > 0
    assert made[1:] == [0, 0, 0]
    parents = {name: row for name, row in rows_of(context).items() if row.state == "tiled"}
    assert "slide.t0000-0000" in parents, "its own part of 75 x 86 px was larger"
