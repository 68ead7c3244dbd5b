"""Images with more than one annotation: which one teaches, and how far the people agree."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flows.agreement import agreements, summary
from flows.freeze import freeze, newest_annotations
from flows.local.workspace import Workspace
from flows.sync import sync
from loop.adapters.index import AnnotationRow, ImageRow, Index
from loop.adapters.label_studio_api import Annotation
from loop.config import LoopConfig, load_config
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_masks

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SHAPE = (20, 40)
NAMES = {"doubtful": "Cell?", "done": "Done area"}


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Any]:
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    xml = label_config(**NAMES)
    project = index.add_project("p", ls_project_id=1, root=tmp_path, label_config=xml)
    rows = [
        ImageRow(project.id, name, "0" * 64, str(tmp_path / name), "", number, height=20, width=40, state="labelled")
        for number, name in enumerate("abc", start=1)
    ]
    index.add_images("p", rows)
    yield SimpleNamespace(
        index=index,
        interface=Interface.parse(xml, **NAMES),
        workspace=Workspace(tmp_path),
        project_name="p",
        config=LoopConfig(),
    )
    index.close()


def regions(context: Any, *starts: int) -> list[dict[str, Any]]:
    """Ten by ten cells that begin at these columns."""
    masks = []
    for x in starts:
        mask = np.zeros(SHAPE, np.bool_)
        mask[2:12, x : x + 10] = True
        masks.append(mask)
    found: list[dict[str, Any]] = to_results(from_masks(masks, SHAPE), context.interface, tolerance_px=0)
    return found


def annotate(
    context: Any,
    number: int,
    image: str,
    person: int | None,
    result: list[dict[str, Any]],
    *,
    offered: list[dict[str, Any]] | None = None,
    **fields: Any,
) -> None:
    path = context.workspace.root / f"{number}.json"
    path.write_text(json.dumps({"result": result, "started_from": "m-r1", "offered": offered or []}))
    task = context.index.image("p", image).task_id
    when = NOON + timedelta(minutes=number)
    row = AnnotationRow(1, number, image, task, when, str(path), completed_by=person, **fields)
    context.index.put_annotations("p", [row])


def test_people_are_compared_by_their_newest_annotation(context: Any) -> None:
    annotate(context, 1, "a", 7, regions(context, 28))
    annotate(context, 2, "a", 7, regions(context, 0, 14, 28))
    annotate(context, 3, "a", 5, regions(context, 0, 16))
    annotate(context, 4, "b", 5, regions(context, 0))
    annotate(context, 5, "b", 7, regions(context, 0), cancelled=True)
    annotate(context, 6, "b", None, regions(context, 0))
    (found,) = agreements(context)
    assert (found.image_id, found.people) == ("a", (5, 7))
    assert found.agreement.f1 == pytest.approx(4 / 5)
    document = summary([found])
    assert json.loads(json.dumps(document)) == {
        "images": 1,
        "people": 2,
        "f1": pytest.approx(0.8),
        "pq": pytest.approx((1 + 2 / 3) / 2.5),
        "mean_iou": pytest.approx(5 / 6),
        "ap": pytest.approx((4 * 2 / 3 + 6 / 4) / 10),
        "count_difference": 1,
        "cells": 5,
    }


def test_three_people_are_three_comparisons_of_one_image(context: Any) -> None:
    for number, person in enumerate((3, 1, 2), start=1):
        annotate(context, number, "a", person, regions(context, 0))
    assert [one.people for one in agreements(context)] == [(1, 2), (1, 3), (2, 3)]
    assert summary(agreements(context))["images"] == 1


def test_nothing_to_compare(context: Any) -> None:
    annotate(context, 1, "a", 1, regions(context, 0))
    assert agreements(context) == []
    assert summary([]) == {"images": 0}


def test_a_label_that_cannot_be_read_or_covers_a_part_is_named_and_left_out(
    context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strange = regions(context, 0)
    strange[0]["value"]["polygonlabels"] = ["Nobody knows"]
    part = regions(context, 0, 20)
    part[1]["value"]["polygonlabels"] = ["Done area"]
    annotate(context, 1, "a", 1, strange)
    annotate(context, 2, "a", 2, regions(context, 0))
    annotate(context, 3, "b", 1, part)
    annotate(context, 4, "b", 2, regions(context, 0))
    with caplog.at_level("INFO"):
        assert agreements(context) == []
    assert "annotation 1 of a is compared with no other" in caplog.text
    assert "annotation 3 of b covers a part" in caplog.text


def test_the_newest_or_the_reviewed_one_counts(context: Any) -> None:
    annotate(context, 1, "a", 1, regions(context, 0))
    annotate(context, 2, "a", 2, regions(context, 0, 14), reviewed=True)
    annotate(context, 3, "a", 3, regions(context, 0, 14, 28))
    annotate(context, 4, "a", 4, [], cancelled=True, reviewed=True)
    annotate(context, 5, "b", 1, regions(context, 0))
    annotate(context, 6, "b", 2, regions(context, 0))
    rows = context.index.annotations("p")
    assert {name: row.annotation_id for name, row in newest_annotations(rows, "reviewed").items()} == {"a": 2, "b": 6}
    assert {name: row.annotation_id for name, row in newest_annotations(rows, "newest").items()} == {"a": 3, "b": 6}
    assert [len(sample.instances) for sample in freeze(context).snapshot.samples] == [2, 1]
    context.config = load_config(None, {"labels.several": "newest"})
    assert [len(sample.instances) for sample in freeze(context).snapshot.samples] == [3, 1]


def test_an_annotation_that_lost_most_of_what_was_offered_is_suspicious(context: Any) -> None:
    offered = regions(context, 0, 10, 20, 28)
    annotate(context, 1, "a", 1, [], offered=offered)
    annotate(context, 2, "b", 1, offered[:1], offered=offered)
    annotate(context, 3, "c", 1, offered[:2], offered=offered)
    assert freeze(context).suspicious == (
        "a: annotation 1 has no cell, though 4 cells were offered; read as 'none here'",
        "b: annotation 2 has 1 of the 4 cells that were offered; look whether it was saved whole",
    )
    annotate(context, 1, "a", 1, [])
    assert freeze(context).suspicious[0] == "a: annotation 1 has no cell; read as 'none here'"


def test_where_a_part_is_done_nothing_is_missing(context: Any) -> None:
    offered = regions(context, 0, 10, 20, 28)
    done = regions(context, 0)
    done[0]["value"]["polygonlabels"] = ["Done area"]
    annotate(context, 1, "a", 1, [offered[0], *done], offered=offered)
    assert freeze(context).suspicious == ()


def test_sync_takes_over_who_was_starred(context: Any) -> None:
    def starred(on: bool) -> list[Annotation]:
        return [Annotation(9, 1, regions(context, 0), False, on, None, 4, None, NOON, NOON)]

    now = starred(True)

    class Studio(SimpleNamespace):
        def tasks(self, number: int, updated_after: datetime | None = None) -> list[Any]:
            return [SimpleNamespace(id=1, updated_at=NOON, total_annotations=1, cancelled_annotations=0)]

        def annotations(self, task: int) -> list[Annotation]:
            return now

        def project(self, number: int) -> dict[str, int]:
            return {"task_number": 3}

    class Context(SimpleNamespace):
        @property
        def project(self) -> Any:
            return context.index.project("p")

    looked: Any = Context(**vars(context), label_studio=Studio())
    assert (sync(looked).new, [row.reviewed for row in context.index.annotations("p")]) == (1, [True])
    assert (sync(looked).updated, sync(looked).new) == (0, 0)
    now = starred(False)
    assert (sync(looked).updated, [row.reviewed for row in context.index.annotations("p")]) == (1, [False])


def test_a_label_of_a_task_that_became_known_after_the_mark_had_passed_is_found(context: Any) -> None:
    found = [Annotation(9, 7, regions(context, 0), False, False, None, 4, None, NOON, NOON)]

    class Studio(SimpleNamespace):
        def tasks(self, number: int, updated_after: datetime | None = None) -> list[Any]:
            if updated_after is not None and updated_after >= NOON:
                return []
            late = NOON + timedelta(hours=1)
            both = [SimpleNamespace(id=7, updated_at=NOON, total_annotations=1, cancelled_annotations=0)]
            return [*both, SimpleNamespace(id=1, updated_at=late, total_annotations=0, cancelled_annotations=0)]

        def annotations(self, task: int) -> list[Annotation]:
            return found

        def project(self, number: int) -> dict[str, int]:
            return {"task_number": 9}

    class Context(SimpleNamespace):
        @property
        def project(self) -> Any:
            return context.index.project("p")

    looked: Any = Context(**vars(context), label_studio=Studio())
    assert sync(looked).new == 0
    row = context.index.image("p", "a")
    context.index.add_images("p", [replace(row, image_id="late", task_id=7, state="open")])
    assert sync(looked).new == 0, "the mark is past it"
    assert sync(looked, thorough=True).new == 1
    assert context.index.image("p", "late").state == "labelled"
    assert sync(looked, thorough=True).new == 0
