"""The page where images and labels can no longer be read, and old predictions."""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from flows import predict, report
from flows.context import LoopContext, image_ref
from flows.local.workspace import Workspace
from flows.predict import forget_old, predict_images
from flows.report import write_report
from loop.adapters.index import AnnotationRow, EffortRow, ImageRow, RoundRow
from loop.config import LoopConfig
from loop.data.predictions import PredictionStore, StoredPrediction
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ImageError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.types import Instances

LABEL = "celloop-p-v1"
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Hall:
    """A project of eight labelled hold-out images; in the i-th the model found i of the eight cells."""

    context: LoopContext
    images: list[ImageRow]
    annotations: list[AnnotationRow]


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    interface = Interface.parse(label_config())
    workspace = Workspace(tmp_path / "ws")
    store = PredictionStore(workspace.predictions_dir, LABEL)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(8):
        pixels, cells = draw_cells(rng, shape=(96, 96), n=8)
        path = tmp_path / f"i{i}.png"
        write_png(pixels, path)
        seen = describe(path)
        where = {"path": str(path), "display": str(path), "height": 96, "width": 96, "task_id": i + 1}
        row = ImageRow(1, f"i{i}", seen.sha256, role="control", state="labelled", **where)
        file = tmp_path / f"{i}.json"
        file.write_text(json.dumps({"id": i + 1, "result": to_results(cells, interface)}))
        annotations.append(AnnotationRow(1, i + 1, f"i{i}", i + 1, START + timedelta(seconds=i), str(file), len(cells)))
        found = cells.take(np.arange(min(i, len(cells))))
        store.save(image_ref(row), StoredPrediction(found, 0.1, np.zeros(4, np.float32)))
        images.append(row)
    index = SimpleNamespace(
        images=lambda _: images,
        annotations=lambda _: annotations,
        rounds=lambda _: [RoundRow(1, 0, status="done", decision="first", metrics={"ap": 0.5, "ap50": 0.6})],
        efforts=lambda _: [],
    )
    context = SimpleNamespace(
        project=SimpleNamespace(name="p", ls_project_id=1),
        config=LoopConfig(),
        project_name="p",
        index=index,
        interface=interface,
        workspace=workspace,
        registry=SimpleNamespace(champion=lambda: SimpleNamespace(label=LABEL)),
        endpoints=SimpleNamespace(label_studio_url="http://a", mlflow_url="http://b", prefect_api_url="http://c/api"),
    )
    return Hall(cast(LoopContext, context), images, annotations)


def shown(page: str) -> list[str]:
    return [f"i{i}" for i in sorted(range(8), key=lambda i: page.find(f"Cells of i{i}")) if f"Cells of i{i}" in page]


def test_the_six_worst_are_drawn_and_no_more(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = report.overlay
    monkeypatch.setattr(report, "overlay", lambda *args: drawn.append(1) or draw(*args))
    page = write_report(hall.context).read_text()
    assert shown(page) == [f"i{i}" for i in range(6)]
    assert len(drawn) == 6


def test_what_cannot_be_read_is_named_and_the_page_is_written(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    Path(hall.images[0].path).unlink()
    write_png(np.zeros((32, 32, 3), np.uint8), Path(hall.images[1].path))
    body = json.loads(Path(hall.annotations[2].file).read_text())
    for item in body["result"]:
        item["value"]["polygonlabels"] = ["Ghost"]
    Path(hall.annotations[2].file).write_text(json.dumps(body))
    Path(hall.annotations[3].file).unlink()
    page = write_report(hall.context).read_text()
    assert shown(page) == [f"i{i}" for i in range(4, 8)]
    for text in ("i0 is not shown", "i1 is not shown", "i2 is not measured", "i3 is not measured"):
        assert text in caplog.text


class Segmenter:
    """Finds no cell; in i1, which it takes for another size."""

    def predict(self, pixels: Any, *, image_id: str) -> Any:
        shape = (7, 7) if image_id == "i1" else pixels.shape[:2]
        cells = Instances.build(shape, np.zeros((0, 4), np.int32), [], image_id=image_id, source="model")
        return SimpleNamespace(instances=cells, uncertainty=0.0, embedding=np.zeros(4, np.float32), measures={})


def test_an_image_that_cannot_be_predicted_is_named_and_left_out(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(predict, "load_segmenter", lambda *_: Segmenter())
    Path(hall.images[0].path).unlink()
    told: list[int] = []
    images = [image_ref(row) for row in hall.images[:4]]
    version = cast(Any, SimpleNamespace(label="celloop-p-v2"))
    found = predict_images(hall.context, version, images, lambda done, total: told.append(done))
    assert set(found) == {"i2", "i3"}
    assert told == [1, 2, 3, 4]
    assert "i0 is not predicted" in caplog.text
    assert "i1 is not predicted" in caplog.text


def test_predictions_of_old_versions_are_forgotten_and_no_others(hall: Hall) -> None:
    root = hall.context.workspace.predictions_dir
    for name in ("celloop-p-v2", "celloop-p-v10", "celloop-p-v1-v1", "celloop-px-v1", "celloop-p-v2-r3"):
        (root / name).mkdir()
        (root / name / "i0.npz").touch()
    assert forget_old(hall.context, {"celloop-p-v10"}) == ["celloop-p-v1", "celloop-p-v2"]
    kept = {path.name for path in root.iterdir()}
    assert kept == {"celloop-p-v10", "celloop-p-v1-v1", "celloop-px-v1", "celloop-p-v2-r3"}
    assert forget_old(hall.context, {"celloop-p-v10"}) == []


def test_nothing_to_forget_before_the_first_prediction(tmp_path: Path) -> None:
    context = cast(LoopContext, SimpleNamespace(workspace=Workspace(tmp_path), project_name="p"))
    assert forget_old(context, set()) == []


def test_a_picture_of_another_size_is_no_picture_of_these_cells(hall: Hall) -> None:
    write_png(np.zeros((32, 32, 3), np.uint8), Path(hall.images[4].path))
    person = Instances.build((96, 96), np.zeros((0, 4), np.int32), [])
    stored = StoredPrediction(person, 0.0, np.zeros(4, np.float32))
    with pytest.raises(ImageError, match=r"i4\.png is \(32, 32\), its labels lie in \(96, 96\)"):
        report._picture(report.Measured(hall.images[4], stored, person, 1.0))


def pseudo(**fields: Any) -> dict[str, Any]:
    nothing = {"reason": "off: no labels", "images": 0, "cells": 0, "doubtful": 0, "ece": None, "missing": {}}
    return {"on": False, **nothing, "audits": {}, "labellers": {}, "reliability": [], **fields}


def test_the_page_says_whether_pseudo_labels_help_and_who_is_believed(hall: Hall) -> None:
    audited = {"precision": 0.91, "recall": 0.55, "cells": 120, "teaches": True, "reason": "confirmed by the audit"}
    off = {**audited, "precision": 0.31, "teaches": False, "reason": "switched off by the audit: precision 0.31"}
    gained = {"mixed_ap": 0.612, "labelled_ap": 0.571, "pseudo_gain": 0.04, "pseudo_low": 0.01, "pseudo_high": 0.07}
    on = pseudo(
        reason="on: 812 sure cells teach",
        images=31,
        cells=812,
        doubtful=97,
        ece=0.034,
        audits={"champion": audited, "sam": off, "yolo": {**audited, "precision": None, "recall": None, "cells": 0}},
        labellers={"champion": {"version": "v3", "skipped": []}, "sam": {"version": "b", "skipped": ["i3: too dark"]}},
        missing={"yolo": "install ultralytics"},
        reliability=[[0.2, 0.25, 14], [0.9, 0.88, 300]],
        **gained,
    )
    rounds = [
        RoundRow(1, 0, status="done"),
        RoundRow(1, 1, status="done", decision="first", metrics={"ap": 0.5, "ap50": 0.6}, pseudo=pseudo()),
        RoundRow(1, 2, status="done", decision="promoted", metrics={"ap": 0.6, "ap50": 0.7, **gained}, pseudo=on),
    ]
    cast(Any, hall.context.index).rounds = lambda _: rounds
    page = write_report(hall.context).read_text()
    section = page[page.index("<h2>Pseudo-labels</h2>") :]
    for text in ("0.612", "0.571", "+0.040 (+0.010 to +0.070)", "812", "97", "0.034", "off: no labels", "0.31"):
        assert text in section
    for text in ("switched off by the audit", "i3: too dark", "install ultralytics", "share that a person drew too"):
        assert text in section
    assert "In round 2, the last that learnt: <strong>on: 812 sure cells teach</strong>" in section
    assert "of the training" not in section
    rounds[2] = replace(rounds[2], pseudo={**on, "labelled_share": 0.5})
    assert "the one without had 50 % of the training" in write_report(hall.context).read_text()


def test_without_pseudo_labels_the_page_has_no_such_section(hall: Hall) -> None:
    assert "Pseudo-labels" not in write_report(hall.context).read_text()


def test_the_page_says_what_corrections_say_of_each_model(hall: Hall) -> None:
    def line(number: int, kept: int, version: str, annotator: int) -> EffortRow:
        more = {"edited": 10 - kept, "edited_iou": 0.7, "seconds": 30.0, "annotator": annotator}
        return EffortRow(1, number, "x", START, version=version, predicted=True, kept=kept, **more)

    rows = [line(100 + i, 5, "celloop-p-v1-r1", 1) for i in range(20)]
    rows += [line(200 + i, 9, "celloop-p-v2-r2", 7) for i in range(20)]
    index: Any = hall.context.index
    index.efforts = lambda _: rows
    studio: Any = SimpleNamespace(people=lambda: {"ann@lab.org": 1})
    object.__setattr__(hall.context, "label_studio", studio)
    page = write_report(hall.context).read_text()
    section = page[page.index("<h2>What your corrections say of each model</h2>") :]
    section = section[: section.index("<h2>", 5)]
    assert "<strong>model v2: 90 % of cells kept untouched (v1: 50 %).</strong>" in section
    for text in ("ann@lab.org", "person 7", '<rect width="90.0"', "<td>v1</td>", "0.70", "3.0"):
        assert text in section
    assert "<script" not in page


def test_without_a_model_the_page_has_no_such_section(hall: Hall) -> None:
    assert "What your corrections say" not in write_report(hall.context).read_text()


def test_the_page_says_how_far_people_agree(hall: Hall) -> None:
    assert "How far people agree" not in write_report(hall.context).read_text()
    figures = {"images": 3, "people": 2, "f1": 0.914, "pq": 0.8, "mean_iou": 0.87, "ap": 0.5, "cells": 90}
    rounds = [
        RoundRow(1, 0, status="done", metrics={"people": figures}),
        RoundRow(1, 1, status="done", metrics={"people": {"images": 0}}),
    ]
    cast(Any, hall.context).index.rounds = lambda _: rounds
    page = write_report(hall.context).read_text()
    assert "2 people labelled 3 images twice or more" in page
    assert "91 % (F1 at IoU .50, mean IoU of these" in page
    assert "0.87; AP 0.500" in " ".join(page.split())
