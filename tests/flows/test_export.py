import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flows import export as export_module
from flows.export import export, geojson_features
from loop.adapters.index import AnnotationRow, ImageRow, Index
from loop.config import LoopConfig
from loop.data.store import read_label_image
from loop.errors import InputError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_masks
from loop.rings import fill_rings
from loop.types import BoolArray

XML = label_config(("Nucleus", "Debris"))
INTERFACE = Interface.parse(XML)


def filled(geometry: dict[str, Any], shape: tuple[int, int]) -> BoolArray:
    """The pixels inside a geometry: outer rings without their holes."""
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    total = np.zeros(shape, bool)
    for rings in polygons:
        part = np.zeros(shape, bool)
        for ring in rings:
            assert ring[0] == ring[-1]
            (crop,) = fill_rings([np.array(ring[:-1])], shape)
            assert crop is not None
            x0, y0, x1, y1 = crop.box_xyxy
            part[y0:y1, x0:x1] ^= crop.mask
        assert not (total & part).any()
        total |= part
    return total


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans()))
def test_outlines_with_holes_and_parts_hold_exactly_the_pixels(mask: BoolArray) -> None:
    cells = from_masks([mask], (mask.shape[0], mask.shape[1]))
    features = geojson_features(cells, ("Cell",))
    assert len(features) == len(cells)
    for feature in features:
        assert np.array_equal(filled(feature["geometry"], cells.shape), mask)


def test_a_ring_and_two_parts_by_hand() -> None:
    ring = np.zeros((6, 12), bool)
    ring[1:4, 1:4] = True
    ring[2, 2] = False
    parts = np.zeros((6, 12), bool)
    parts[0, 6] = parts[5, 11] = True
    first, second = geojson_features(from_masks([ring, parts], (6, 12), labels=[0, 1]), INTERFACE.labels)
    assert first["geometry"]["type"] == "Polygon"
    outer, hole = first["geometry"]["coordinates"]
    assert {tuple(p) for p in hole} == {(2.5, 2.0), (3.0, 2.5), (2.5, 3.0), (2.0, 2.5)}
    assert (min(x for x, _ in outer), max(x for x, _ in outer)) == (1.0, 4.0)
    assert second["geometry"]["type"] == "MultiPolygon"
    assert len(second["geometry"]["coordinates"]) == 2
    assert [f["properties"]["classification"]["name"] for f in (first, second)] == ["Nucleus", "Debris"]


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two images of one group, one of them in the hold-out, both labelled; a third one with an unknown label."""
    monkeypatch.setattr(export_module, "sync", lambda _: None)
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project("cells", ls_project_id=1, root=tmp_path, label_config=XML)
    rows, annotations = [], []
    for number, name in enumerate(("held", "twin", "odd"), start=1):
        mask = np.zeros((20, 24), bool)
        mask[2:12, 3 : 6 + 4 * number] = True
        regions = to_results(from_masks([mask], mask.shape, image_id=name), INTERFACE, tolerance_px=0.0)
        if name == "odd":
            regions[0]["value"]["polygonlabels"] = ["Mitosis"]
        for version, result in ((0, []), (1, regions)):
            file = tmp_path / f"{number}-{version}.json"
            file.write_text(json.dumps({"result": result}))
            annotations.append(
                AnnotationRow(
                    project.id,
                    10 * number + version,
                    name,
                    task_id=number,
                    updated_at=datetime(2026, 1, 1 + version, tzinfo=UTC),
                    file=str(file),
                )
            )
        rows.append(ImageRow(project.id, name, "0" * 64, f"/x/{name}.png", "", number, "g", height=20, width=24))
    index.add_images("cells", rows)
    index.put_annotations("cells", annotations)
    states: dict[str, dict[str, object]] = {row.image_id: {"state": "labelled"} for row in rows}
    states["held"]["role"] = "control"
    index.set_images("cells", states)
    yield SimpleNamespace(index=index, project_name="cells", interface=INTERFACE, config=LoopConfig())
    index.close()


def test_everything_that_people_labelled_is_written(context: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(context, out, ["coco", "labels", "geojson"])
    assert (report.images, report.cells) == (2, 2)
    assert [line.split(":")[0] for line in report.left_out] == ["odd"]
    assert "Mitosis" in report.left_out[0]
    for name, width in (("held", 7), ("twin", 11)):
        assert int((read_label_image(out / "labels" / f"{name}.png") == 1).sum()) == 10 * width
        (feature,) = json.loads((out / "geojson" / f"{name}.geojson").read_text())["features"]
        assert int(filled(feature["geometry"], (20, 24)).sum()) == 10 * width
        assert feature["properties"]["classification"]["name"] == "Nucleus"
    coco = json.loads((out / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["held.png", "twin.png"]
    assert [category["name"] for category in coco["categories"]] == ["Nucleus", "Debris"]


def test_an_unknown_format_is_refused(context: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format svg"):
        export(context, tmp_path / "out", ["svg"])
