"""Pseudo-labels once round the real stack: proposed, frozen, taught, gated, audited, published, and resumed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import flows.round
from flows.annotator import label_tasks
from flows.context import group_of
from flows.local.workspace import Workspace
from flows.pseudo import in_reserve
from flows.round import RoundReport, run_round
from loop.data.snapshot import load_snapshot
from stack import DrawnProject, make_project

pytestmark = pytest.mark.services

NAME = "pseudo-test"
SETTINGS = {
    "model.base": 8,
    "train.max_steps": 60,
    "train.learning_rate": 0.004,
    "select.first_batch": 10,
    "select.batch": 8,
    "select.control": 0.25,
    "pseudo.labellers": ("champion", "unet"),
    "pseudo.keep": 0.5,
    "pseudo.keep_iou": 0.85,
    "pseudo.calibrate_cells": 10,
    "pseudo.audit_cells": 5,
    "pseudo.min_precision": 0.1,
    "pseudo.labeller_minutes": 1.5,
}


class KilledError(Exception):
    """Stands for a process that dies at this point."""


@pytest.fixture(scope="module")
def project(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> DrawnProject:
    """A project with one model, and eight images labelled since."""
    drawn = make_project(workspace, tmp_path_factory.mktemp("drawn"), NAME, n=30, **SETTINGS)
    run_round(drawn.context)
    label_tasks(drawn.context, drawn.labels, 10)
    first = run_round(drawn.context)
    assert first.outcome == "first"
    assert first.pseudo["reason"] == "off: there is no model in service yet that could propose anything"
    label_tasks(drawn.context, drawn.labels, 8)
    return drawn


@pytest.fixture(scope="module")
def second(project: DrawnProject) -> RoundReport:
    """The first round with pseudo-labels; its process dies after two of its steps."""
    for step in ("pseudo", "challenger"):
        real = getattr(flows.round, step)

        def dies_after(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            _real(*args, **kwargs)
            raise KilledError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flows.round, step, dies_after)
            with pytest.raises(KilledError):
                run_round(project.context)
    return run_round(project.context)


def test_both_challengers_are_registered_and_the_round_says_what_pseudo_labels_did(
    project: DrawnProject, second: RoundReport
) -> None:
    document = second.pseudo
    assert document["on"], document["reason"]
    assert (second.number, second.made) == (2, True)
    assert document["images"] > 0
    assert document["cells"] > 0
    assert 0 <= document["ece"] <= 1
    assert {"labelled_ap", "mixed_ap", "pseudo_gain", "pseudo_low", "pseudo_high"} <= document.keys()
    assert set(document["audits"]) == {"champion", "unet"}
    assert set(document["labellers"]) == {"champion", "unet"}
    assert "pseudo-labels" in second.reason
    versions = project.context.registry.versions()
    assert [version.tags["teaching"] for version in versions] == ["labelled", "labelled", "mixed"]
    assert versions[2].tags["snapshot_id"] == document["mixed_snapshot"]
    assert all(version.decision for version in versions)
    kinds = project.context.registry.of_model(f"celloop-{NAME}.unet").versions()
    assert [version.tags["teaching"] for version in kinds] == ["labelled", "labelled"]
    json.dumps(asdict(second))


def test_the_mixed_snapshot_knows_where_each_cell_comes_from(project: DrawnProject, second: RoundReport) -> None:
    snapshot = load_snapshot(project.context.workspace.snapshots_dir, second.pseudo["mixed_snapshot"])
    guessed = snapshot.split("pseudo")
    assert len(guessed) == second.pseudo["images"]
    assert len(snapshot.split("train")) == second.labelled_train
    assert len(snapshot.split("holdout")) == second.labelled_holdout
    origins = {sample.instances.origin(i) for sample in guessed for i in range(len(sample.instances))}
    assert {origin.source for origin in origins} == {"pseudo"}
    makers = {"champion:celloop-pseudo-test-v1", "unet:celloop-pseudo-test.unet-v1"}
    assert {origin.by for origin in origins} <= makers
    drawn = {
        origin.source for _, cells, *_ in snapshot.split("train") for origin in map(cells.origin, range(len(cells)))
    }
    assert drawn <= {"human", "human-accepted", "human-edited"}


def test_the_hold_out_is_never_pseudo_taught(project: DrawnProject, second: RoundReport) -> None:
    rows = project.context.index.images(NAME)
    taught = {group_of(row) for row in rows if row.pseudo_taught}
    assert len(taught) >= second.pseudo["images"]  # also those drawn in which no cell was sure
    assert not taught & {group_of(row) for row in rows if row.role == "control"}
    assert not any(in_reserve(NAME, group, 0.3) for group in taught)


def test_published_cells_carry_their_confidence(project: DrawnProject, second: RoundReport) -> None:
    context = project.context
    rows = context.index.images(NAME, state="open")
    found = [p for row in rows for p in context.label_studio.predictions(row.task_id or 0)]
    assert {p.model_version for p in found} == {second.published}
    scores = [item["score"] for p in found for item in p.result if "score" in item]
    assert scores
    assert all(context.config.pseudo.doubt <= score <= 1 for score in scores)


def test_a_second_round_without_news_does_nothing(project: DrawnProject, second: RoundReport) -> None:
    again = run_round(project.context)
    assert not again.made
    assert again.pseudo == second.pseudo
    assert len(project.context.registry.versions()) == 3


def test_people_judge_the_pseudo_labels_in_the_next_round(project: DrawnProject, second: RoundReport) -> None:
    context = project.context
    label_tasks(context, project.labels, 8)
    taught = {row.image_id for row in context.index.images(NAME, state="labelled") if row.pseudo_taught}
    report = run_round(context)
    assert report.made
    audited = {row.labeller: row for row in context.index.audits(NAME)}
    if taught:
        assert set(audited["champion"].image_ids) == taught
        assert report.pseudo["audits"]["champion"]["cells"] == audited["champion"].cells
    rows = context.index.images(NAME)
    assert not {row.image_id for row in rows if row.pseudo_taught and row.role == "control"}
    page = Path(report.report).read_text()
    assert "<h2>Pseudo-labels</h2>" in page
    assert f"{second.pseudo['mixed_ap']:.3f}" in page
