import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiling_stage import Place, Studio, rows_of

from flows import context as context_module
from flows import start
from flows.start import start_project
from flows.tiling import crowded_tiles, cut_dense, settle
from loop.adapters.index import AnnotationRow, ImageRow, Index
from loop.config import TilesConfig, load_config
from loop.data.store import read_image, write_png
from loop.data.tiles import cut
from loop.errors import InputError
from loop.types import Instances

RNG = np.random.default_rng(2)
LARGE = RNG.integers(200, 5000, (150, 260), dtype=np.uint16)
SETTINGS = {"tiles.max_px": 20_000, "tiles.side": 100, "tiles.halo": 16, "tiles.max_cells": 50}


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Studio:
    fake = Studio()
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
    folder.mkdir()
    tifffile.imwrite(folder / "slide.tif", LARGE, photometric="minisblack", tile=(64, 64))
    for number in range(2):
        write_png(RNG.integers(0, 255, (120, 140), dtype=np.uint8), folder / f"i{number}.png")
    return folder


def begin(place: Place, images: Path) -> Any:
    report = start_project(place, images, "cells", load_config(None, SETTINGS))
    return report, context_module.open_context(place, "cells")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Large images, when they are added


def test_a_large_image_is_added_as_tiles_that_are_images_of_their_own(
    studio: Studio, place: Place, images: Path
) -> None:
    (images / "manifest.csv").write_text(
        "image,group,split,modality\nslide.tif,,pool,dapi\ni0.png,,,\ni1.png,,,\n", encoding="utf-8"
    )
    report, context = begin(place, images)
    assert (report.images, report.cut, report.tiles, report.problems) == (2 + 6, 1, 6, ())
    rows = rows_of(context)
    parent, tiles = rows["slide"], [row for row in rows.values() if row.parent]
    assert (parent.state, parent.task_id, parent.path) == ("tiled", None, str(images / "slide.tif"))
    assert {row.image_id for row in tiles} == {f"slide.t000{r}-000{c}" for r in range(2) for c in range(3)}
    assert set(studio.tasks.values()) == {"i0", "i1", *(row.image_id for row in tiles)}
    shown = {(t.window.y0, t.window.x0): t.window for t in cut((150, 260), 100, 16)}
    for row in tiles:
        window = shown.pop((row.top, row.left))
        assert (row.height, row.width) == (window.y1 - window.y0, window.x1 - window.x0)
        assert (row.group, row.split, row.modality, row.parent) == ("slide", "pool", "dapi", "slide")
        assert (row.state, row.role, studio.tasks[row.task_id or 0]) == ("open", "open", row.image_id)
        raw = tifffile.imread(row.path)
        np.testing.assert_array_equal(raw, LARGE[window.y0 : window.y1, window.x0 : window.x1])
        assert read_image(Path(row.path)).pixels.shape[:2] == (row.height, row.width)
    assert not shown


def test_tiles_are_shown_in_the_light_of_the_whole_image(studio: Studio, place: Place, images: Path) -> None:
    uneven = LARGE.copy()
    uneven[:, :60] //= 20
    tifffile.imwrite(images / "slide.tif", uneven, photometric="minisblack")
    _, context = begin(place, images)
    whole = read_image(images / "slide.tif").pixels[:, :, 0].astype(int)
    for row in context.index.images("cells"):
        if row.parent:
            picture = np.asarray(Image.open(place.display_dir / "cells" / f"{row.image_id}.png")).astype(int)
            part = whole[row.top : row.top + row.height, row.left : row.left + row.width]
            assert np.abs(picture - part).max() <= 1
    recorded = json.loads((place.tiles_dir / "cells" / "slide.json").read_text(encoding="utf-8"))
    stored = read_image(images / "slide.tif")
    assert (recorded["low"], recorded["high"]) == (stored.low, stored.high)
    assert recorded["sha256"] == rows_of(context)["slide"].sha256


def test_a_second_start_does_nothing_twice(studio: Studio, place: Place, images: Path) -> None:
    report, context = begin(place, images)
    rows, files, made = rows_of(context), files_below(place.root / "tiles"), studio.made
    context.index.set_images("cells", {"slide.t0001-0001": {"role": "control", "rank": 3, "chosen_in": 0}})
    again, context = begin(place, images)
    assert again == report
    assert studio.made == made
    assert files_below(place.root / "tiles") == files
    now = rows_of(context)
    assert now["slide.t0001-0001"].role == "control"
    assert {name: row for name, row in now.items() if name != "slide.t0001-0001"} == {
        name: row for name, row in rows.items() if name != "slide.t0001-0001"
    }


def test_a_start_mends_tiles_and_follows_the_manifest(studio: Studio, place: Place, images: Path) -> None:
    _, context = begin(place, images)
    rows = rows_of(context)
    Path(rows["slide.t0000-0000"].path).unlink()
    del studio.tasks[rows["slide.t0001-0002"].task_id or 0]
    context.index.set_images("cells", {"slide.t0001-0002": {"state": "gone"}})
    manifest = "image,group,modality\nslide.tif,well-3,dapi\ni0.png,a,\ni1.png,b,\n"
    (images / "manifest.csv").write_text(manifest, encoding="utf-8")
    report, context = begin(place, images)
    assert (report.tiles, report.problems) == (6, ())
    now = rows_of(context)
    assert Path(now["slide.t0000-0000"].path).is_file()
    assert now["slide.t0000-0000"].sha256 == rows["slide.t0000-0000"].sha256
    assert studio.tasks[now["slide.t0001-0002"].task_id or 0] == "slide.t0001-0002"
    assert now["slide.t0001-0002"].state == "open"
    assert {(row.group, row.modality) for row in now.values() if row.parent} == {("well-3", "dapi")}
    assert now["slide"].group == "well-3"


def test_an_image_that_changed_after_it_was_cut_is_named(studio: Studio, place: Place, images: Path) -> None:
    _, context = begin(place, images)
    rows = rows_of(context)
    tifffile.imwrite(images / "slide.tif", LARGE[::-1], photometric="minisblack")
    report, context = begin(place, images)
    assert [line.split(":")[0] for line in report.problems] == ["slide.tif"]
    assert "it has changed since it was cut" in report.problems[0]
    assert rows_of(context) == rows


def test_an_image_that_is_known_as_a_whole_stays_one(studio: Studio, place: Place, images: Path) -> None:
    start_project(place, images, "cells", load_config(None, {**SETTINGS, "tiles.max_px": 0}))
    report, context = begin(place, images)
    assert (report.images, report.cut, report.tiles) == (3, 0, 0)
    assert set(rows_of(context)) == {"slide", "i0", "i1"}


def test_a_single_large_image_is_a_single_group(studio: Studio, place: Place, images: Path) -> None:
    for number in range(2):
        (images / f"i{number}.png").unlink()
    report, _ = begin(place, images)
    assert (report.images, report.tiles) == (6, 6)
    (line,) = report.problems
    assert "all images (6) are of one group (slide): no hold-out" in line


def test_names_of_tiles_are_refused_for_images(studio: Studio, place: Place, images: Path) -> None:
    write_png(np.zeros((20, 20), np.uint8), images / "slide.t0000-0001.png")
    report, context = begin(place, images)
    assert "a tile of it would be called slide.t0000-0001" in report.problems[0]
    assert "slide" not in rows_of(context)
    (images / "slide.t0000-0001.png").unlink()
    assert start_project(place, images, "other", load_config(None, SETTINGS)).tiles == 6
    write_png(np.zeros((20, 20), np.uint8), images / "slide.t0000-0001.png")
    with pytest.raises(InputError, match="rename that image"):
        start_project(place, images, "other", None)


def test_one_that_cannot_be_cut_is_named_and_the_others_go_on(
    studio: Studio, place: Place, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (images / "slide.tif").read_bytes()
    tifffile.imwrite(images / "other.tif", LARGE, photometric="minisblack", tile=(64, 64), compression="zlib")
    broken = (images / "other.tif").read_bytes()
    described = start.open_folder(images, labels=False)
    (images / "other.tif").write_bytes(broken[:2000] + bytes(len(broken) - 2000))
    monkeypatch.setattr(start, "open_folder", lambda *_, **__: described)
    report, context = begin(place, images)
    assert (report.cut, report.tiles) == (1, 6)
    assert len(report.problems) == 1
    assert report.problems[0].startswith("other.tif: ")
    assert "other" not in rows_of(context)
    assert (images / "slide.tif").read_bytes() == data


# Crowded images, in a round


def grid(shape: tuple[int, int], step: int) -> Instances:
    """Cells of 4 x 4 px in a grid."""
    boxes = [(x, y, x + 4, y + 4) for y in range(0, shape[0] - 4, step) for x in range(0, shape[1] - 4, step)]
    return Instances.build(shape, boxes, [np.ones((4, 4), bool)] * len(boxes))


def found(context: Any, step: int) -> Any:
    """What a model found in each open image: a cell every `step` px."""
    rows = context.index.images("cells", state="open")
    return {row.image_id: SimpleNamespace(instances=grid((row.height, row.width), step)) for row in rows}


@pytest.mark.parametrize(("shape", "step"), [((1000, 1000), 20), ((700, 3000), 25), ((400, 300), 8)])
def test_tiles_of_a_crowded_image_show_few_cells_or_are_as_small_as_they_get(shape: tuple[int, int], step: int) -> None:
    cells = grid(shape, step)
    tiles = crowded_tiles(cells, TilesConfig())
    assert len(tiles) > 1
    for tile in tiles:
        y0, x0, y1, x1 = tile.window
        seen = sum(bx0 < x1 and bx1 > x0 and by0 < y1 and by1 > y0 for bx0, by0, bx1, by1 in cells.boxes_xyxy.tolist())
        assert seen <= 300 or max(tile.own.y1 - tile.own.y0, tile.own.x1 - tile.own.x0) <= 256


def test_an_image_stays_whole_with_few_cells_or_where_it_is_one_tile_anyway() -> None:
    assert crowded_tiles(grid((1000, 1000), 60), TilesConfig()) == ()
    assert crowded_tiles(grid((256, 256), 6), TilesConfig()) == ()
    assert len(crowded_tiles(grid((256, 257), 6), TilesConfig())) == 2


def test_a_crowded_image_becomes_tiles_and_its_task_goes(studio: Studio, place: Place, images: Path) -> None:
    _, context = begin(place, images)
    before = rows_of(context)
    fresh = cut_dense(context, found(context, 14))
    now = rows_of(context)
    assert {row.image_id for row in fresh} == {name for name in now if name not in before}
    assert {now[name].state for name in ("i0", "i1")} == {"tiled"}
    assert {now[name].task_id for name in ("i0", "i1")} == {None}
    tasks = set(studio.tasks.values())
    assert tasks == {row.image_id for row in now.values() if row.state == "open"}
    assert {row.group for row in fresh if row.parent == "i0"} == {"i0"}
    assert len({row.sha256 for row in fresh}) == len(fresh)
    whole = np.asarray(Image.open(images / "i0.png"))
    for row in fresh:
        if row.parent == "i0":
            part = whole[row.top : row.top + row.height, row.left : row.left + row.width]
            np.testing.assert_array_equal(np.asarray(Image.open(row.path)), part)
    made = studio.made
    assert cut_dense(context, found(context, 40)) == ()
    assert (studio.made, rows_of(context)) == (made, now)


def test_a_crowded_tile_is_cut_into_tiles_of_the_same_image(studio: Studio, place: Place, images: Path) -> None:
    _, context = begin(place, images)
    context = replace(context, config=load_config(None, {**SETTINGS, "tiles.side": 64}))
    fresh = [row for row in cut_dense(context, found(context, 12)) if row.parent == "slide"]
    now = rows_of(context)
    assert fresh
    for row in fresh:
        source = now[row.image_id.rpartition(".t")[0]]
        assert (source.state, source.parent, row.group) == ("tiled", "slide", "slide")
        np.testing.assert_array_equal(
            tifffile.imread(row.path), LARGE[row.top : row.top + row.height, row.left : row.left + row.width]
        )
    report, context = begin(place, images)
    assert rows_of(context) == now
    assert report.tiles == sum(row.parent != "" and row.state == "open" for row in now.values())


def test_what_somebody_has_seen_or_begun_is_never_cut(studio: Studio, place: Place, images: Path) -> None:
    for number in range(2, 5):
        write_png(RNG.integers(0, 255, (120, 140), dtype=np.uint8), images / f"i{number}.png")
    (images / "slide.tif").unlink()
    _, context = begin(place, images)
    rows = rows_of(context)
    context.index.set_images("cells", {"i0": {"chosen_in": 0}, "i1": {"role": "control"}, "i2": {"state": "skipped"}})
    kept = AnnotationRow(
        context.project.id, 7, "i3", task_id=rows["i3"].task_id or 0, updated_at=datetime.now(UTC), file="x"
    )
    context.index.put_annotations("cells", [kept])
    studio.touched = {rows["i4"].task_id or 0}
    assert cut_dense(context, found(context, 12)) == ()
    assert set(studio.tasks.values()) == set(rows)
    studio.touched = set()
    assert {row.parent for row in cut_dense(context, found(context, 12))} == {"i4"}


def test_a_task_that_is_begun_while_its_image_is_cut_stays(
    studio: Studio, place: Place, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, context = begin(place, images)
    rows = rows_of(context)
    offer = studio.import_tasks

    def meanwhile(number: int, tasks: list[dict[str, Any]]) -> list[int]:
        studio.touched = {rows["i0"].task_id or 0}
        return offer(number, tasks)

    monkeypatch.setattr(studio, "import_tasks", meanwhile)
    cut_dense(context, found(context, 14))
    now = rows_of(context)
    assert (now["i0"].state, now["i0"].task_id) == ("tiled", rows["i0"].task_id)
    assert studio.tasks[rows["i0"].task_id or 0] == "i0"
    assert now["i1"].task_id is None
    context.index.set_images("cells", {"i0": {"state": "labelled"}})
    settle(context)
    assert rows_of(context)["i0"].state == "labelled"
    context.index.set_images("cells", {"i0": {"state": "open"}})
    studio.touched = set()
    settle(context)
    assert (rows_of(context)["i0"].state, rows_of(context)["i0"].task_id) == ("tiled", None)


def test_a_tile_that_cannot_be_shown_waits(studio: Studio, place: Place, images: Path) -> None:
    _, context = begin(place, images)
    row = rows_of(context)["slide.t0000-0000"]
    data = Path(row.path).read_bytes()
    Path(row.path).unlink()
    context.index.set_images("cells", {row.image_id: {"task_id": None}})
    (place.display_dir / "cells" / f"{row.image_id}.png").unlink()
    (line,) = settle(context)
    assert line.startswith("slide.t0000-0000: ")
    Path(row.path).write_bytes(data)
    assert settle(context) == []
    assert rows_of(context)[row.image_id].task_id == row.task_id


class Dying:
    """Passes calls on and dies before or after the n-th of them that changes something."""

    CHANGING = ("add_images", "set_images", "import_tasks", "remove_untouched")

    def __init__(self, real: Any, clock: list[int], at: int) -> None:
        self._real, self._clock, self._at = real, clock, at

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if name not in self.CHANGING:
            return method

        def called(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            result = method(*args, **kwargs)
            self._tick()
            return result

        return called

    def _tick(self) -> None:
        self._clock[0] += 1
        if self._clock[0] == self._at:
            raise KilledError


def outcome(studio: Studio, rows: dict[str, ImageRow]) -> Any:
    """All that stands after a run but for the numbers of tasks, each of which there is once."""
    assert {row.task_id: row.image_id for row in rows.values() if row.task_id is not None} == studio.tasks
    assert len(set(studio.tasks.values())) == len(studio.tasks)
    return {name: replace(row, task_id=None, path=Path(row.path).name) for name, row in rows.items()}


def test_a_round_killed_anywhere_and_repeated_gives_the_same_tiles(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    (images / "slide.tif").unlink()
    results = []
    for at in range(100):
        fake, place = Studio(), Place(tmp_path / f"ws{at}")
        place.prepare()
        for module in (start, context_module):
            monkeypatch.setattr(module, "LabelStudio", lambda *_, fake=fake: fake)
        _, context = begin(place, images)
        clock = [0]
        dying = replace(
            context, index=Dying(context.index, clock, at), label_studio=Dying(context.label_studio, clock, at)
        )
        with contextlib.suppress(KilledError):
            cut_dense(dying, found(context, 14))
        cut_dense(context, found(context, 14))
        results.append(outcome(fake, rows_of(context)))
        context.index.close()
        if at and clock[0] < at:
            break
    assert len(results) > 10
    assert all(result == results[0] for result in results)


def test_a_start_killed_anywhere_and_repeated_gives_the_same_tiles(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    for number in range(2):
        (images / f"i{number}.png").unlink()
    results = []
    for at in range(100):
        fake, place, clock = Studio(), Place(tmp_path / f"ws{at}"), [0]
        place.prepare()
        with monkeypatch.context() as patch:
            dying = Dying(fake, clock, at)
            for module in (start, context_module):
                patch.setattr(module, "LabelStudio", lambda *_, dying=dying: dying)
                patch.setattr(module, "Index", lambda url, clock=clock, at=at: Dying(Index(url), clock, at))
            with contextlib.suppress(KilledError):
                begin(place, images)
        for module in (start, context_module):
            monkeypatch.setattr(module, "LabelStudio", lambda *_, fake=fake: fake)
        report, context = begin(place, images)
        assert (report.cut, report.tiles) == (1, 6)
        results.append(outcome(fake, rows_of(context)))
        context.index.close()
        if at and clock[0] < at:
            break
    assert len(results) > 5
    assert all(result == results[0] for result in results)
