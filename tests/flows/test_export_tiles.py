import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows import export as export_module
from flows.export import FORMATS, export
from loop.adapters.index import AnnotationRow, ImageRow, Index
from loop.config import load_config
from loop.data.store import read_label_image, read_label_layers
from loop.data.synthetic import draw_cells
from loop.data.tiles import cut, tile_id
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_coco_rle, from_label_image, from_masks, to_dense
from loop.metrics.matching import iou_matrix
from loop.types import Instances

XML = label_config(("Cell", "Nucleus"), done="Done area")
INTERFACE = Interface.parse(XML, done="Done area")
SHAPE, SIDE, HALO = (180, 260), 100, 40
TILES = {tile_id("slide", tile): tile for tile in cut(SHAPE, SIDE, HALO)}


def seen(cells: Instances, name: str) -> Instances:
    """The cells as far as a tile shows them."""
    y0, x0, y1, x1 = TILES[name].window
    masks = [(mask[y0:y1, x0:x1], label) for mask, label in zip(to_dense(cells), cells.labels, strict=True)]
    kept = [(mask, int(label)) for mask, label in masks if mask.any()]
    return from_masks([mask for mask, _ in kept], (y1 - y0, x1 - x0), labels=[label for _, label in kept])


def same_cells(one: Instances, other: Instances) -> bool:
    return len(one) == len(other) and sorted(np.nonzero(iou_matrix(one, other) == 1)[0]) == list(range(len(one)))


class Project:
    """A project with one image of six tiles, in which people draw."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = Index(f"sqlite:///{root / 'index.sqlite3'}")
        self.id = self.index.add_project("cells", ls_project_id=1, root=root, label_config=XML).id
        parent = ImageRow(self.id, "slide", "0" * 64, "/x/slide.tif", "", None, height=SHAPE[0], width=SHAPE[1])
        rows = [parent]
        for number, (name, tile) in enumerate(TILES.items(), start=1):
            y0, x0, y1, x1 = tile.window
            rows.append(
                ImageRow(
                    *(self.id, name, f"{number:064d}", f"/x/{name}.tif", "", number, "slide"),
                    height=y1 - y0,
                    width=x1 - x0,
                    parent="slide",
                    top=y0,
                    left=x0,
                )
            )
        self.index.add_images("cells", rows)
        self.index.set_images("cells", {"slide": {"state": "tiled"}})
        self.n_annotations = 0
        settings = load_config(None, {"publish.labels": ["Cell", "Nucleus"]})
        self.context: Any = SimpleNamespace(
            index=self.index, project_name="cells", interface=INTERFACE, config=settings
        )

    def draw(self, name: str, cells: Instances, *areas: dict[str, Any]) -> None:
        self.n_annotations += 1
        file = self.root / f"{self.n_annotations}.json"
        result = [*to_results(cells, INTERFACE, tolerance_px=0.0), *areas]
        file.write_text(json.dumps({"result": result}), encoding="utf-8")
        annotation = AnnotationRow(self.id, self.n_annotations, name, 1, datetime(2026, 1, 1, tzinfo=UTC), str(file))
        self.index.put_annotations("cells", [annotation])
        self.index.set_images("cells", {name: {"state": "labelled"}})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(export_module, "sync", lambda _: None)
    made = Project(tmp_path)
    yield made
    made.index.close()


@pytest.fixture(scope="module")
def truth() -> Instances:
    drawn = draw_cells(np.random.default_rng(4), SHAPE, 40, touching=True).instances
    bar = np.zeros(SHAPE, bool)
    bar[88:93, 3:257] = True  # across all three columns of tiles, over other cells
    return from_masks([*to_dense(drawn), bar], SHAPE)


def test_tiles_are_written_as_the_whole_image_in_every_format(project: Project, truth: Instances) -> None:
    for name in TILES:
        project.draw(name, seen(truth, name))
    out = project.root / "out"
    report = export(project.context, out, FORMATS)
    assert (report.images, report.cells, report.left_out) == (1, len(truth), ())
    assert sorted(path.name for path in out.rglob("*") if path.is_file() and path.suffix != ".json") == [
        "slide.geojson",
        "slide.png",  # labels
        "slide.png",  # nuclei
        "slide.tif",
        "slide_masks.png",
    ]
    coco = json.loads((out / "coco.json").read_text(encoding="utf-8"))
    assert coco["images"] == [{"id": 1, "file_name": "slide.tif", "height": SHAPE[0], "width": SHAPE[1]}]
    assert same_cells(from_coco_rle([a["segmentation"] for a in coco["annotations"]], SHAPE), truth)
    layers = read_label_layers(out / "layers" / "slide.tif")
    assert layers.shape[1:] == SHAPE
    numbers = np.arange(1, len(truth) + 1)
    assert same_cells(from_masks([(layers == n).any(axis=0) for n in numbers], SHAPE), truth)
    covered = to_dense(truth).any(axis=0)
    np.testing.assert_array_equal(read_label_image(out / "labels" / "slide.png") > 0, covered)
    np.testing.assert_array_equal(read_label_image(out / "cellpose" / "slide_masks.png") > 0, covered)
    features = json.loads((out / "geojson" / "slide.geojson").read_text(encoding="utf-8"))["features"]
    assert len(features) == len(truth)


def test_a_nucleus_at_a_seam_is_not_taken_for_its_cell(project: Project) -> None:
    cell, nucleus = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    cell[20:60, 60:110], nucleus[25:55, 70:104] = True, True
    drawn = from_masks([cell, nucleus], SHAPE, labels=[0, 1])
    for name in TILES:
        project.draw(name, seen(drawn, name))
    out = project.root / "out"
    assert export(project.context, out, ["labels", "coco"]).cells == 2
    np.testing.assert_array_equal(read_label_image(out / "labels" / "slide.png") > 0, cell)
    np.testing.assert_array_equal(read_label_image(out / "nuclei" / "slide.png") > 0, nucleus)
    coco = json.loads((out / "coco.json").read_text(encoding="utf-8"))
    assert [a["category_id"] for a in coco["annotations"]] == [1, 2]


def test_of_tiles_that_are_not_labelled_the_rest_is_written_and_they_are_named(
    project: Project, truth: Instances
) -> None:
    labelled = ["slide.t0000-0000", "slide.t0000-0001"]
    for name in labelled:
        project.draw(name, seen(truth, name))
    project.index.set_images("cells", {"slide.t0001-0002": {"state": "unusable"}})
    out = project.root / "out"
    report = export(project.context, out, ["labels"])
    (line,) = report.left_out
    assert line.startswith("slide: 4 of its 6 tiles are not labelled (slide.t0000-0002, slide.t0001-0000, ")
    done = np.zeros(SHAPE, bool)
    for name in labelled:
        y0, x0, y1, x1 = TILES[name].window
        done[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(np.asarray(Image.open(out / "done" / "slide.png")) == 255, done)
    labels = read_label_image(out / "labels" / "slide.png")
    np.testing.assert_array_equal(labels > 0, to_dense(truth).any(axis=0) & done)


def test_no_labelled_tile_no_image(project: Project) -> None:
    assert export(project.context, project.root / "out", ["labels", "coco"]).images == 0


def test_a_tile_that_is_done_in_part_leaves_the_image_done_in_part(project: Project) -> None:
    first, *rest = TILES
    nothing = {name: seen(from_masks([], SHAPE), name) for name in TILES}
    area = {
        "type": "rectanglelabels",
        "from_name": "area",
        "to_name": "image",
        "id": "done1",
        "original_width": TILES[first].window.x1,
        "original_height": TILES[first].window.y1,
        "value": {"x": 0, "y": 0, "width": 25, "height": 100, "rotation": 0, "rectanglelabels": ["Done area"]},
    }
    project.draw(first, nothing[first], area)
    for name in rest:
        project.draw(name, nothing[name])
    out = project.root / "out"
    report = export(project.context, out, ["labels"])
    assert (report.images, report.cells, report.left_out) == (1, 0, ())
    done = np.asarray(Image.open(out / "done" / "slide.png")) == 255
    assert done[0, 0]
    assert done[0, TILES[first].window.x1 // 4 - 1]
    assert not done[0, TILES[rest[0]].window.x0 - 1]
    assert done[:, TILES[rest[0]].window.x0 :].all()


def test_a_tile_that_cannot_be_read_is_named_and_counts_as_missing(project: Project, truth: Instances) -> None:
    for name in TILES:
        project.draw(name, seen(truth, name))
    body = json.loads((project.root / "2.json").read_text(encoding="utf-8"))
    body["result"][0]["value"]["polygonlabels"] = ["Mitosis"]
    (project.root / "2.json").write_text(json.dumps(body), encoding="utf-8")
    out = project.root / "out"
    first, second = export(project.context, out, ["labels"]).left_out
    assert first.startswith("slide.t0000-0001: ")
    assert "Mitosis" in first
    assert second.startswith("slide: 1 of its 6 tiles are not labelled (slide.t0000-0001)")
    assert (out / "done" / "slide.png").is_file()


def test_tiles_of_tiles_count_in_place_of_the_tile(project: Project, truth: Instances) -> None:
    outer, *others = TILES
    window = TILES[outer].window
    for tile in cut((window.y1 - window.y0, window.x1 - window.x0), 80, 30):
        name, (y0, x0, y1, x1) = tile_id(outer, tile), tile.window
        TILES[name] = tile
        row = project.index.image("cells", outer)
        inner = ImageRow(
            *(project.id, name, name, f"/x/{name}.tif", "", 50 + len(name), "slide"),
            height=y1 - y0,
            width=x1 - x0,
            parent="slide",
            top=row.top + y0,
            left=row.left + x0,
        )
        project.index.add_images("cells", [inner])
        project.draw(name, seen(truth, name))
        del TILES[name]
    project.index.set_images("cells", {outer: {"state": "tiled"}})
    for name in others:
        project.draw(name, seen(truth, name))
    out = project.root / "out"
    report = export(project.context, out, ["coco"])
    assert report.left_out == ()
    coco = json.loads((out / "coco.json").read_text(encoding="utf-8"))
    assert same_cells(from_coco_rle([a["segmentation"] for a in coco["annotations"]], SHAPE), truth)


def test_an_image_that_somebody_labelled_as_a_whole_is_written_so(project: Project, truth: Instances) -> None:
    for name in TILES:
        project.draw(name, seen(from_masks([], SHAPE), name))
    project.draw("slide", truth)
    out = project.root / "out"
    report = export(project.context, out, ["labels"])
    assert (report.images, report.cells) == (1, len(truth))
    assert report.left_out == ("slide: it is labelled as a whole, so its 6 labelled tiles are not written",)
    labels = from_label_image(read_label_image(out / "labels" / "slide.png"))
    assert len(labels) >= len(truth) - 1


def test_more_cells_than_sixteen_bits_number_are_written_in_the_other_formats(
    project: Project, truth: Instances, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TILES:
        project.draw(name, seen(truth, name))
    monkeypatch.setattr("flows.folders.np.iinfo", lambda _: SimpleNamespace(max=3))
    report = export(project.context, project.root / "out", ["labels", "geojson"])
    assert report.cells == len(truth)
    assert "use --format coco" in report.left_out[0]
    assert (project.root / "out" / "geojson" / "slide.geojson").is_file()


def test_an_image_that_is_complete_by_now_is_no_longer_said_to_be_done_in_part(
    project: Project, truth: Instances
) -> None:
    out = project.root / "out"
    first, *rest = TILES
    project.draw(first, seen(truth, first))
    export(project.context, out, ["labels"])
    assert (out / "done" / "slide.png").is_file()
    for name in rest:
        project.draw(name, seen(truth, name))
    export(project.context, out, ["labels"])
    assert not (out / "done" / "slide.png").exists()
