"""What publish writes into Label Studio and the index, on a real index; Label Studio is a double that remembers."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flows.publish import publish
from flows.select import select
from loop.adapters.index import AnnotationRow, ImageRow, Index
from loop.adapters.label_studio_api import TaskPrediction
from loop.config import load_config
from loop.data.predictions import StoredPrediction
from loop.errors import ConfigError
from loop.labelstudio.interface import Interface, label_config
from loop.types import Instances, Selection

NAME = "cells"
PEOPLE = ("ann@lab.org", "bob@lab.org")


class Studio:
    """Tasks with their data, how many people label each, the order served, and tabs."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}
        self.data: dict[int, dict[str, Any]] = {}
        self.people_of: dict[int, int | None] = {}
        self.tabs: dict[str, dict[str, Any]] = {"Mine": {}, "Batch for gone@lab.org": {}}

    def publish(self, project: int, version: str, entries: list[TaskPrediction], **_: Any) -> SimpleNamespace:
        self.scores = {entry.task_id: entry.score for entry in entries}
        return SimpleNamespace(created=len(entries), kept=0)

    def set_task_data(self, task: int, data: dict[str, Any], *, people: int | None = None) -> None:
        self.data[task], self.people_of[task] = data, people

    def set_tab(self, project: int, title: str, ordering: Any, filters: dict[str, Any], **_: Any) -> None:
        self.tabs[title] = filters

    def tasks(self, project: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(id=task, data=dict(data)) for task, data in self.data.items()]

    def tab_titles(self, project: int) -> list[str]:
        return list(self.tabs)

    def remove_tab(self, project: int, title: str) -> None:
        del self.tabs[title]

    def people(self) -> dict[str, int]:
        return {"ann@lab.org": 4}


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Any]:
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    xml = label_config(("Cell",))
    number = index.add_project(NAME, ls_project_id=1, root=tmp_path, label_config=xml).id
    rows = [
        ImageRow(number, f"i{n}", "0" * 64, str(tmp_path / f"i{n}.png"), "", n, height=40, width=40) for n in range(10)
    ]
    for row in rows:
        Path(row.path).touch()
    index.add_images(NAME, rows)

    class Context(SimpleNamespace):
        @property
        def project(self) -> Any:
            return index.project(NAME)

    yield Context(
        index=index,
        interface=Interface.parse(xml),
        label_studio=Studio(),
        project_name=NAME,
        config=load_config(
            None, {"select.strategy": "uncertain_diverse", "select.embedding": "model", "select.batch": 6}
        ),
    )
    index.close()


def settings(context: Any, **select_settings: Any) -> None:
    changed = context.config.select.model_copy(update=select_settings)
    context.config = context.config.model_copy(update={"select": changed})


def predictions(n: int = 10) -> dict[str, StoredPrediction]:
    """Image n has n cells of scores 0.1, 0.2, ..., and half as many that the model is unsure of."""
    found = {}
    for i in range(n):
        boxes, masks = [(4 * c, 0, 4 * c + 3, 3) for c in range(i)], [np.ones((3, 3), np.bool_)] * i
        cells = Instances.build((40, 40), boxes, masks, scores=[0.1 * (c + 1) for c in range(i)])
        measures = {"entropy_cells": 0.9 - i / 20, "doubtful_cells": float(i // 2)}
        embedding = np.eye(10, dtype=np.float32)[i]
        found[f"i{i}"] = StoredPrediction(cells, measures["entropy_cells"], embedding, measures)
    return found


def rows_of(context: Any) -> dict[str, ImageRow]:
    return {row.image_id: row for row in context.index.images(NAME)}


def test_reason_doubtful_cells_and_minutes_are_told_in_the_task_and_in_the_index(context: Any) -> None:
    stored = predictions()
    batch = select(context, 1, stored)
    publish(context, 1, None, batch, stored, calibrated={"i7", "i8", "i9"})
    rows, studio = rows_of(context), context.label_studio
    for selection in batch:
        row, n = rows[selection.image_id], int(selection.image_id[1:])
        below = sum(round(0.1 * (c + 1), 1) < 0.5 for c in range(n))
        unsure = f"about {n // 2} cell{'s' if n > 3 else ''} the model is unsure of" if n > 1 else ""
        cells = f"{below} doubtful cells" if n >= 7 else unsure
        assert row.seconds is not None
        time = f"about {round(row.seconds / 60)} min" if row.seconds >= 45 else "under a minute"
        assert row.note == "; ".join(filter(None, [cells, time]))
        assert row.reason == selection.reason
        assert studio.data[n]["reason"] == f"{row.reason}; {row.note}"
        assert studio.data[n]["rank"] == selection.rank
    served = sorted(studio.scores, key=studio.scores.__getitem__)
    assert [f"i{task}" for task in served][: len(batch)] == [s.image_id for s in batch]
    assert set(studio.data) == {int(s.image_id[1:]) for s in batch}
    assert set(studio.people_of.values()) == {None}


def test_publishing_again_tells_the_same_and_a_later_batch_clears_it(context: Any) -> None:
    stored = predictions()
    for _ in range(2):
        batch = select(context, 1, stored)
        publish(context, 1, None, batch, stored)
        before, told = rows_of(context), dict(context.label_studio.data)
    publish(context, 1, None, select(context, 1, stored), stored)
    assert (rows_of(context), context.label_studio.data) == (before, told)
    settings(context, batch=2)
    later = select(context, 2, stored)
    publish(context, 2, None, later, stored)
    left = {s.image_id for s in batch} - {s.image_id for s in later}
    assert left
    for image_id in left:
        row = rows_of(context)[image_id]
        assert (row.rank, row.told) == (None, "")
        assert context.label_studio.data[row.task_id]["reason"] == ""


def test_a_vanished_image_leaves_the_batch_is_named_and_the_rest_is_published(
    context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stored = predictions()
    batch = select(context, 1, stored)
    lost = batch[1]
    Path(rows_of(context)[lost.image_id].path).unlink()
    publish(context, 1, None, batch, stored)
    assert f"files of 1 open images of cells are gone: {lost.image_id}" in caplog.text
    studio, row = context.label_studio, rows_of(context)[lost.image_id]
    assert (row.state, row.rank) == ("gone", None)
    assert "its file is gone" in studio.data[row.task_id]["reason"]
    assert max(studio.scores, key=studio.scores.__getitem__) == row.task_id
    served = [f"i{task}" for task in sorted(studio.scores, key=studio.scores.__getitem__)]
    assert served[: len(batch) - 1] == [s.image_id for s in batch if s is not lost]
    again = select(context, 1, stored)
    assert [s.image_id for s in again] == served[: len(batch) - 1]
    publish(context, 1, None, again, stored)
    assert row.task_id not in studio.scores


def test_images_of_a_folder_that_is_away_are_left_out_and_come_back(context: Any, tmp_path: Path) -> None:
    away = replace(rows_of(context)["i3"], path=str(tmp_path / "disk" / "i3.png"))
    context.index.add_images(NAME, [away])
    stored = predictions()
    publish(context, 1, None, select(context, 1, stored), stored)
    assert rows_of(context)["i3"].state == "open"
    assert max(context.label_studio.scores, key=context.label_studio.scores.__getitem__) == 3
    (tmp_path / "disk").mkdir()
    Path(away.path).touch()
    publish(context, 2, None, select(context, 2, stored), stored)
    assert "gone" not in rows_of(context)["i3"].told


def test_an_image_that_the_model_could_not_look_at_says_so_right_behind_the_batch(context: Any) -> None:
    stored = predictions()
    del stored["i4"]
    batch = select(context, 1, stored)
    publish(context, 1, None, batch, stored)
    studio = context.label_studio
    served = [f"i{task}" for task in sorted(studio.scores, key=studio.scores.__getitem__)]
    assert served[len(batch)] == "i4"
    assert "could not look at this image" in studio.data[4]["reason"]
    assert rows_of(context)["i4"].reason == studio.data[4]["reason"]
    publish(context, 2, None, select(context, 2, predictions()), predictions())
    assert "could not look" not in rows_of(context)["i4"].told + studio.data[4]["reason"]


def test_nothing_chosen_leaves_the_rest_by_uncertainty(context: Any) -> None:
    publish(context, 1, None, [], predictions())
    scores = context.label_studio.scores
    assert sorted(scores, key=scores.__getitem__) == list(range(10))
    assert context.label_studio.data == {}


def test_an_exhausted_pool_is_published_as_it_stands(context: Any) -> None:
    context.index.set_images(NAME, {f"i{n}": {"state": "labelled"} for n in range(10)})
    context.index.set_published(NAME, "v-r3", "v")
    assert select(context, 4, predictions()) == []
    assert publish(context, 4, None, [], predictions()) == "v-r3"
    assert context.label_studio.scores == {}


def test_people_get_shares_of_their_own_and_tabs(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings(context, annotators=PEOPLE, overlap=0.34)
    stored = predictions()
    batch = select(context, 1, stored)
    publish(context, 1, None, batch, stored)
    rows, studio = rows_of(context), context.label_studio
    who = [rows[s.image_id].annotators for s in batch]
    assert who.count("[ann@lab.org] [bob@lab.org]") + who.count("[bob@lab.org] [ann@lab.org]") in (2, 3)
    assert {"[ann@lab.org]", "[bob@lab.org]"} < set(who)
    for s in batch:
        row = rows[s.image_id]
        assert studio.data[row.task_id]["annotators"] == row.annotators
        assert studio.people_of[row.task_id] == row.annotators.count("[")
    assert set(studio.tabs) == {"Mine", "Most informative", *(f"Batch for {person}" for person in PEOPLE)}
    ann = {(item["filter"], item["operator"]): item["value"] for item in studio.tabs["Batch for ann@lab.org"]["items"]}
    assert ann == {
        ("filter:tasks:data.annotators", "contains"): "[ann@lab.org]",
        ("filter:tasks:annotators", "not_contains"): 4,
    }
    assert "knows nobody of the login bob@lab.org" in caplog.text
    publish(context, 1, None, select(context, 1, stored), stored)
    assert [rows_of(context)[s.image_id].annotators for s in batch] == who


def annotate(context: Any, image_id: str, person: int) -> None:
    row = rows_of(context)[image_id]
    number = 100 * person + row.task_id
    found = AnnotationRow(row.project_id, number, image_id, row.task_id, datetime.now(UTC), "", completed_by=person)
    context.index.put_annotations(NAME, [found])
    context.index.set_images(NAME, {image_id: {"state": "labelled"}})


def test_a_second_label_keeps_its_prediction_until_it_is_made_or_nobody_is_left_to_make_it(context: Any) -> None:
    settings(context, annotators=PEOPLE, overlap=1.0, batch=3)
    stored = predictions()
    batch = select(context, 1, stored)
    publish(context, 1, None, batch, stored)
    first, second, third = (s.image_id for s in batch)
    studio = context.label_studio
    annotate(context, first, 4)
    annotate(context, second, 4)
    annotate(context, second, 5)
    publish(context, 2, None, [], stored)
    assert int(first[1:]) in studio.scores
    assert int(second[1:]) not in studio.scores
    assert rows_of(context)[first].annotators == rows_of(context)[second].annotators != ""
    assert rows_of(context)[third].annotators == ""
    studio.data[int(first[1:])]["review_rank"] = 1
    settings(context, annotators=PEOPLE[:1], overlap=0.0)
    publish(context, 3, None, [], stored)
    assert studio.data[int(first[1:])]["review_rank"] == 1  # what a review has written stays
    publish(context, 4, None, [], stored)
    assert rows_of(context)[first].annotators == ""
    assert studio.people_of[int(first[1:])] == 1
    assert studio.data[int(first[1:])]["annotators"] == ""
    assert set(studio.tabs) == {"Mine", "Most informative", "Batch for ann@lab.org"}
    settings(context, annotators=())
    publish(context, 5, None, [], stored)
    assert set(studio.tabs) == {"Mine", "Most informative"}


@pytest.mark.parametrize("login", ["", "ann lab", "[ann]"])
def test_what_is_no_login_is_refused(context: Any, login: str) -> None:
    settings(context, annotators=(login,))
    with pytest.raises(ConfigError, match=r"select\.annotators.*is no login"):
        publish(context, 1, None, [Selection("i1", 1, False, "why")], predictions())
    assert context.label_studio.scores == {}


def test_a_publish_that_was_killed_while_it_wrote_clears_the_rest_when_it_is_repeated(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(context, annotators=PEOPLE, overlap=1.0, batch=2)
    stored = predictions()
    blind = {name: one for name, one in stored.items() if name != "i0"}
    first = select(context, 1, blind)
    publish(context, 1, None, first, blind)
    studio = context.label_studio
    assert {studio.people_of[int(s.image_id[1:])] for s in first} == {2}
    assert "could not look" in studio.data[0]["reason"]
    context.index.set_images(NAME, {name: {"state": "labelled"} for name in ("i8", "i9")})
    settings(context, annotators=(), overlap=0.0, batch=1, control=0.0)
    batch = select(context, 2, stored)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(studio, "set_task_data", die)
        with pytest.raises(KeyboardInterrupt):
            publish(context, 2, None, batch, stored)
    publish(context, 2, None, select(context, 2, stored), stored)
    left = {row.task_id for row in rows_of(context).values() if row.state == "open" and row.rank is None}
    told = {task: data for task, data in studio.data.items() if task in left}
    assert told
    assert {data["reason"] + data["annotators"] for data in told.values()} == {""}
    assert {studio.people_of[task] for task in told} <= {1, None}
    assert all(studio.people_of[int(s.image_id[1:])] == 1 for s in first if int(s.image_id[1:]) in left)


def test_what_a_task_says_already_is_not_written_again(context: Any, tmp_path: Path) -> None:
    away = [replace(rows_of(context)[f"i{n}"], path=str(tmp_path / "disk" / f"i{n}.png")) for n in range(6)]
    context.index.add_images(NAME, away)
    publish(context, 1, None, [], predictions())
    assert set(context.label_studio.data) == set(range(6))
    context.label_studio.data.clear()
    publish(context, 2, None, [], predictions())
    assert context.label_studio.data == {}
