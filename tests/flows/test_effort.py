"""What annotations cost, read from the index and the cached bodies."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flows.effort import cost_model, observations
from loop.adapters.index import AnnotationRow, ImageRow, Index
from loop.config import LoopConfig
from loop.effort.cost import CostModel
from loop.effort.edits import Edits
from loop.effort.expected import Rates
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.types import Instances

SHAPE = (40, 60)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NAMES = {"doubtful": "Cell?", "done": "Done area"}
INTERFACE = Interface.parse(label_config(**NAMES), **NAMES)
VERSION = "m-v3"


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Any]:
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project("p", ls_project_id=1, root=tmp_path, label_config=label_config(**NAMES))
    index.add_images(
        "p",
        [
            ImageRow(
                project.id, name, "0" * 64, str(tmp_path / name), "", number, height=40, width=60, state="labelled"
            )
            for number, name in enumerate("abc", start=1)
        ],
    )
    yield SimpleNamespace(index=index, interface=INTERFACE, project_name="p", config=LoopConfig(), root=tmp_path)
    index.close()


def cells(*corners: tuple[int, int], scores: tuple[float, ...] | None = None) -> Instances:
    boxes = [(x, y, x + 8, y + 8) for x, y in corners]
    return Instances.build(
        SHAPE, boxes, [np.ones((8, 8), bool)] * len(boxes), scores=scores, source="model", model_version=VERSION
    )


def regions(instances: Instances) -> list[dict[str, Any]]:
    return to_results(instances, INTERFACE, doubtful_below=0.5)


def add(context: Any, number: int, image_id: str, body: dict[str, Any], **row: Any) -> None:
    path = context.root / f"{number}.json"
    path.write_text(json.dumps(body))
    fields = {"lead_time_s": 30.0, **row}
    annotation = AnnotationRow(context.index.project("p").id, number, image_id, number, NOON, str(path), **fields)
    context.index.put_annotations("p", [annotation])


def body(
    drawn: list[dict[str, Any]], offered: list[dict[str, Any]], started_from: str = VERSION, parent: int | None = 5
) -> dict[str, Any]:
    return {"result": drawn, "offered": offered, "started_from": started_from, "parent_prediction": parent}


OFFERED = regions(cells((0, 0), (20, 0), (40, 0), scores=(0.9, 0.8, 0.3)))
# The first untouched, the second moved by a column, the third deleted, one drawn.
DRAWN = [OFFERED[0], *regions(cells((21, 0), (20, 20)))]


def test_offered_and_drawn_cells_with_their_seconds(context: Any) -> None:
    add(context, 1, "a", body(DRAWN, OFFERED))

    (work,) = observations(context)

    assert work.outcome.edits == Edits(kept=1, edited=1, deleted=1, added=1)
    np.testing.assert_allclose(work.outcome.scores, [0.9, 0.8, 0.3], rtol=1e-3)
    assert (work.seconds, work.predicted, work.started_from) == (30.0, True, VERSION)
    assert work.annotation.image_id == "a"


def test_an_accepted_doubtful_cell_was_kept(context: Any) -> None:
    add(context, 1, "a", body(OFFERED, OFFERED))

    assert observations(context)[0].outcome.edits == Edits(3, 0, 0, 0)


def test_cells_drawn_before_any_model_teach_costs_but_no_rates(context: Any) -> None:
    add(context, 1, "a", body(regions(cells((0, 0), (20, 0))), [], started_from="", parent=None), lead_time_s=500.0)

    (work,) = observations(context)
    effort = cost_model(context)

    assert work.outcome.edits == Edits(0, 0, 0, 2)
    assert not work.predicted
    assert effort.rates == Rates.prior()
    assert effort.cost.images == 1
    assert effort.cost.add_s > context.config.effort.add_s


def test_a_prediction_without_cells_teaches_what_is_added(context: Any) -> None:
    add(context, 1, "a", body(regions(cells((0, 0), (20, 0))), []))

    assert cost_model(context).rates.added_per_image > Rates.prior().added_per_image


def test_without_annotations_it_is_the_priors(context: Any) -> None:
    effort = cost_model(context)

    assert effort.cost == CostModel.prior(context.config.effort)
    assert effort.rates == Rates.prior()
    assert effort.seconds(cells()) == pytest.approx(8 + 8)


@pytest.mark.parametrize("seconds", [None, 0.0, -3.0])
def test_unmeasured_seconds_teach_rates_only(context: Any, seconds: float | None) -> None:
    add(context, 1, "a", body(DRAWN, OFFERED), lead_time_s=seconds)

    effort = cost_model(context)

    assert observations(context)[0].seconds is None
    assert effort.cost == CostModel.prior(context.config.effort)
    assert effort.rates.images == 1


def test_what_says_nothing_of_effort_is_left_out(context: Any) -> None:
    add(context, 1, "a", body(DRAWN, OFFERED), cancelled=True)
    done = regions(cells((0, 0)))[0]
    done = {**done, "value": {**done["value"], "polygonlabels": ["Done area"]}}
    add(context, 2, "b", body([*DRAWN, done], OFFERED))
    context.index.set_images("p", {"c": {"state": "unusable"}})
    add(context, 3, "c", body(DRAWN, OFFERED))

    assert observations(context) == []


def test_what_cannot_be_read_is_named_and_skipped(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    unknown = {**DRAWN[1], "value": {**DRAWN[1]["value"], "polygonlabels": ["Mitosis"]}}
    turned = {**DRAWN[1], "original_width": 61}
    add(context, 1, "a", body([unknown], OFFERED))
    add(context, 2, "a", body([turned], OFFERED))
    add(context, 3, "b", body(DRAWN, [{**OFFERED[0], "value": {"points": []}}]))
    add(context, 4, "b", {"result": DRAWN, "started_from": VERSION})
    add(context, 5, "b", {})
    add(context, 6, "c", body(DRAWN, OFFERED))
    add(context, 7, "c", body(DRAWN, OFFERED))
    (context.root / "6.json").write_text("{")
    (context.root / "1.json").rename(context.root / "gone.json")
    add(context, 8, "c", body([unknown], OFFERED))

    with caplog.at_level(logging.WARNING, logger="flows.effort"):
        works = observations(context)

    assert [work.annotation.annotation_id for work in works] == [7]
    named = [record.args[0] for record in caplog.records if isinstance(record.args, tuple)]
    assert sorted(named) == [1, 2, 3, 4, 5, 6, 8]
    assert "Mitosis" in caplog.text
    assert "earlier celloop" in caplog.text


def test_two_people_on_one_image_are_two_pieces_of_work(context: Any) -> None:
    add(context, 1, "a", body(DRAWN, OFFERED), completed_by=1)
    add(context, 2, "a", body(OFFERED, OFFERED), completed_by=2, lead_time_s=9.0)

    works = observations(context)

    assert [work.seconds for work in works] == [30.0, 9.0]
    assert replace(works[0], seconds=1.0).outcome is works[0].outcome


def test_before_any_model_nothing_was_predicted_though_zero_cells_were_published(context: Any) -> None:
    drawn = regions(cells((0, 0), (20, 0)))
    add(context, 1, "a", body(drawn, [], started_from="celloop-p-r0"))
    add(context, 2, "b", body(drawn, [], started_from="celloop-p-v1-r1"))

    assert [work.predicted for work in observations(context)] == [False, True]
