"""The effort ledger: exact counts, what is computed again and what is not, sums, MLflow, the page."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flows import effort, ledger
from flows.ledger import model_of, read_ledger, write_ledger
from flows.ledger_page import corrections
from loop.adapters.index import AnnotationRow, EffortRow, ImageRow, Index
from loop.config import LoopConfig
from loop.errors import UnreachableError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.types import Instances

SHAPE = (40, 60)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
INTERFACE = Interface.parse(label_config(done="Done area"), done="Done area")
OLD, NEW = "celloop-p-v3-r4", "celloop-p-v10-r12"


@dataclass
class Runs:
    """Stands for the registry: keeps what is put on a version's run; versions in `gone` have none."""

    model: str = "celloop-p"
    gone: set[int] = field(default_factory=set)
    put: list[tuple[int, dict[str, float], int]] = field(default_factory=list)
    away: bool = False

    def add_metrics(self, version: int, metrics: Mapping[str, float], *, step: int = 0) -> bool:
        if self.away:
            raise UnreachableError("MLflow gives no answer")
        if version in self.gone:
            return False
        self.put.append((version, dict(metrics), step))
        return True


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Any]:
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project("p", ls_project_id=1, root=tmp_path, label_config=label_config(done="Done area"))
    where = {"height": 40, "width": 60, "state": "labelled"}
    modality = {"a": "DAPI", "b": "DAPI", "c": "H&E"}
    index.add_images(
        "p",
        [
            ImageRow(project.id, name, "0" * 64, str(tmp_path / name), "", n, modality=modality[name], **where)
            for n, name in enumerate("abc", start=1)
        ],
    )
    yield SimpleNamespace(
        index=index,
        interface=INTERFACE,
        project_name="p",
        config=LoopConfig(),
        root=tmp_path,
        registry=Runs(),
        label_studio=SimpleNamespace(people=lambda: {"ann": 1, "ann@lab.org": 1, "bob": 2}),
    )
    index.close()


def regions(*corners: tuple[int, int]) -> list[dict[str, Any]]:
    boxes = [(x, y, x + 8, y + 8) for x, y in corners]
    masks = [np.ones((8, 8), bool)] * len(boxes)
    return to_results(Instances.build(SHAPE, boxes, masks, source="model", model_version="m"), INTERFACE)


OFFERED = regions((0, 0), (20, 0), (40, 0))
# The first untouched, the second moved by a column (IoU 7 / 9), the third deleted, one drawn.
DRAWN = [OFFERED[0], *regions((21, 0), (20, 20))]


def add(
    context: Any, number: int, image_id: str, drawn: list[Any] = DRAWN, version: str = OLD, **row: Any
) -> AnnotationRow:
    offered = OFFERED if version and not version.startswith("celloop-p-r") else []
    body = {"result": drawn, "offered": offered, "started_from": version, "parent_prediction": 5 if version else None}
    path = context.root / f"{number}.json"
    path.write_text(json.dumps(body))
    fields = {"updated_at": NOON, "lead_time_s": 30.0, "completed_by": 1, **row}
    made = AnnotationRow(context.index.project("p").id, number, image_id, number, file=str(path), **fields)
    context.index.put_annotations("p", [made])
    return made


def test_a_line_says_what_became_of_the_offered_cells(context: Any) -> None:
    add(context, 1, "a")

    write_ledger(context)

    (row,) = context.index.efforts("p")
    assert row.edited_iou == pytest.approx(7 / 9)
    assert replace(row, edited_iou=None) == EffortRow(
        project_id=context.index.project("p").id,
        annotation_id=1,
        image_id="a",
        updated_at=NOON,
        version=OLD,
        predicted=True,
        annotator=1,
        modality="DAPI",
        kept=1,
        edited=1,
        deleted=1,
        added=1,
        seconds=30.0,
    )
    assert (row.offered, row.cells) == (3, 3)


def test_only_what_changed_is_compared_written_and_logged_again(
    context: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compared: list[str] = []
    compare = effort.from_results
    monkeypatch.setattr(effort, "from_results", lambda *a, **k: compared.append(str(k["image_id"])) or compare(*a, **k))
    add(context, 1, "a")
    add(context, 2, "b", version=NEW)
    done = {**DRAWN[0], "value": {**DRAWN[0]["value"], "polygonlabels": ["Done area"]}}
    add(context, 3, "c", [*DRAWN, done])
    first = write_ledger(context)
    assert compared == ["a", "a", "b", "b", "c", "c"]
    assert [number for number, _, _ in context.registry.put] == [10, 3]
    compared.clear()
    context.registry.put.clear()

    again = write_ledger(context)
    effort.cost_model(context)

    assert again == first
    assert compared == []
    assert context.registry.put == []

    add(context, 1, "a", OFFERED, updated_at=NOON + timedelta(minutes=1))
    changed = write_ledger(context)

    assert compared == ["a", "a"]
    assert [number for number, _, _ in context.registry.put] == [3]
    assert [(row.kept, row.edited, row.deleted, row.added) for row in changed.rows] == [(3, 0, 0, 0), (1, 1, 1, 1)]
    assert context.index.efforts("p") == list(changed.rows)


def test_a_damaged_note_is_made_anew(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    add(context, 1, "a")
    first = write_ledger(context)
    for text in ("{", "[]", '{"content": "yesterday"}'):
        (context.root / "1.effort.json").write_text(text)
        assert write_ledger(context) == first
    assert caplog.text.count("is damaged") == 2


def test_what_says_nothing_any_more_counts_no_more_and_what_is_gone_does(context: Any) -> None:
    add(context, 1, "a")
    add(context, 2, "b")
    add(context, 3, "c")
    write_ledger(context)
    later = NOON + timedelta(minutes=1)
    done = {**DRAWN[0], "value": {**DRAWN[0]["value"], "polygonlabels": ["Done area"]}}
    add(context, 1, "a", [*DRAWN, done], updated_at=later)
    add(context, 2, "b", cancelled=True, updated_at=later)
    context.index.drop_annotations("p", [3])

    assert [row.annotation_id for row in write_ledger(context).rows] == [3]
    assert [row.annotation_id for row in read_ledger(context).rows] == [3]


def test_sums_by_version_annotator_and_modality(context: Any) -> None:
    add(context, 1, "a")
    add(context, 2, "b", OFFERED, version="celloop-p-v3-r7", lead_time_s=6.0, completed_by=2)
    add(context, 3, "c", OFFERED, version=NEW, lead_time_s=None)
    add(context, 4, "c", DRAWN, version="celloop-p-r0", completed_by=None, lead_time_s=27.0)

    sums = write_ledger(context)

    assert list(sums.by_version) == ["celloop-p-v3", "celloop-p-v10"]
    old = sums.by_version["celloop-p-v3"]
    assert (old.images, old.offered, old.kept.mean, old.deleted.mean) == (2, 6, 4 / 6, 1 / 6)  # type: ignore[union-attr]
    assert old.seconds_per_cell == 36 / 6
    assert sums.by_version["celloop-p-v10"].seconds_per_cell is None
    assert list(sums.by_annotator) == [1, 2, None]
    assert sums.by_annotator[None].kept is None
    assert sums.by_annotator[None].seconds_per_cell == 9.0
    assert {name: found.images for name, found in sums.by_modality.items()} == {"DAPI": 2, "H&E": 2}


def test_the_figures_go_to_the_run_of_the_model_that_offered_the_cells(
    context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    add(context, 1, "a")
    add(context, 2, "b", version=NEW)
    add(context, 3, "c", version="stardist-2D")
    context.registry.gone = {10}

    with caplog.at_level(logging.INFO, logger="flows.ledger"):
        write_ledger(context)

    figures = {"effort_kept_share": 1 / 3, "effort_edited_iou": 7 / 9, "effort_seconds_per_cell": 10.0}
    ((version, metrics, step),) = context.registry.put
    assert (version, step) == (3, 1)
    assert metrics == pytest.approx({**figures, "effort_images": 1.0})
    assert "celloop-p-v10 is gone from MLflow" in caplog.text
    assert len(context.index.efforts("p")) == 3


def test_what_mlflow_did_not_take_is_tried_again(context: Any) -> None:
    add(context, 1, "a")
    context.registry.away = True
    with pytest.raises(UnreachableError):
        write_ledger(context)
    context.registry.away = False
    write_ledger(context)
    assert len(context.registry.put) == 1


@pytest.mark.parametrize(
    ("version", "label"),
    [("celloop-p-v3-r4", "celloop-p-v3"), ("stardist-2D", "stardist-2D"), ("celloop-x-r9-v2-r1", "celloop-x-r9-v2")],
)
def test_the_model_behind_a_published_version(version: str, label: str) -> None:
    assert model_of(version) == label


def line(number: int, kept: int, rest: int, version: str, **fields: Any) -> EffortRow:
    more = {"annotator": 1, "edited": rest, "edited_iou": 0.8, "seconds": 20.0, **fields}
    return EffortRow(1, number, "a", NOON, version=version, predicted=True, kept=kept, **more)


def page(context: Any, *rows: EffortRow) -> Any:
    project_id = context.index.project("p").id
    context.index.put_efforts("p", [replace(row, project_id=project_id) for row in rows])
    return corrections(context)


def test_the_page_compares_the_newest_model_with_those_before_it(context: Any) -> None:
    old = [line(n, 5, 5, OLD, modality="DAPI") for n in range(20)]
    new = [line(20 + n, 9, 1, NEW, annotator=2, modality="H&E", added=2) for n in range(20)]

    said = page(context, *old, *new)

    assert said["sentences"] == [
        "model v10: 90 % of cells kept untouched (v3: 50 %).",
        "Of the 200 cells that v10 offered in 20 images: 10 % edited (IoU 0.80), 0 % deleted, 2.0 added per image, "
        "1.7 s a cell.",
    ]
    tables = dict(said["tables"])
    assert [row["name"] for row in tables["model"]] == ["v3", "v10"]
    assert [row["name"] for row in tables["annotator"]] == ["ann@lab.org", "bob"]
    assert [row["name"] for row in tables["modality"]] == ["DAPI", "H&E"]
    assert tables["model"][1]["bar"] == (90.0, 10.0)


def test_a_difference_that_may_be_chance_is_called_so(context: Any) -> None:
    said = page(context, line(1, 5, 5, OLD), line(2, 7, 3, NEW, edited_iou=None, edited=0, deleted=3, seconds=None))
    chance = "the intervals of v10 and v3 overlap, so that may be chance"
    assert said["sentences"][0] == f"model v10: 70 % of cells kept untouched (v3: 50 %); {chance}."
    assert "1 image: 0 % edited, 30 % deleted, 0.0 added per image." in said["sentences"][1]
    assert [title for title, _ in said["tables"]] == ["model"]
    assert said["tables"][0][1][1]["seconds"] == ""


def test_people_have_numbers_while_label_studio_is_away(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    def away() -> dict[str, int]:
        raise UnreachableError("Label Studio gives no answer")

    context.label_studio.people = away
    said = page(context, line(1, 5, 5, OLD), line(2, 5, 5, OLD, annotator=3), line(3, 5, 5, OLD, annotator=None))
    assert [row["name"] for row in dict(said["tables"])["annotator"]] == ["person 1", "person 3", "not known"]
    assert "names people by number" in caplog.text


def test_before_a_model_offered_anything_there_is_nothing_to_say(context: Any) -> None:
    assert corrections(context) is None
    add(context, 1, "a", version="")
    assert write_ledger(context).by_version == {}
    assert corrections(context) is None
    assert ledger.read_ledger(context).by_annotator[1].images == 1


def test_a_label_that_a_sync_changes_meanwhile_is_counted_next_time(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(context, 1, "a")
    look = ledger.observations

    def meanwhile(looked: Any) -> Any:
        works = look(looked)
        add(context, 1, "a", updated_at=NOON + timedelta(minutes=1))
        return works

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "observations", meanwhile)
        assert write_ledger(context).rows == ()
    assert context.registry.put == []
    assert len(write_ledger(context).rows) == 1
    assert [(number, step) for number, _, step in context.registry.put] == [(3, 1)]
