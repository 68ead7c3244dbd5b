from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flows import demo as demo_flow
from flows.cli import demo as demo_command
from flows.demo import DemoReport, demo_rounds
from flows.local import launch
from flows.local.workspace import Workspace
from loop.adapters.index import AnnotationRow, RoundRow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def annotation(number: int, image: str, cells: int, used: int | None, *, cancelled: bool = False) -> AnnotationRow:
    return AnnotationRow(
        1,
        number,
        image,
        task_id=number,
        updated_at=NOON + timedelta(minutes=number),
        file="",
        n_regions=cells,
        used_in_round=used,
        cancelled=cancelled,
    )


def test_the_table_shows_each_round_once_and_counts_images() -> None:
    rounds = [
        RoundRow(1, 0, status="done"),
        RoundRow(1, 1, status="done", decision="first", reason="r1", metrics={"ap": 0.5, "ap50": 0.75, "n_images": 4}),
        RoundRow(
            1,
            2,
            status="done",
            decision="refused",
            metrics={"ap": 0.25, "champion_ap": 0.5, "n_images": 5, "mixed_ap": 0.25, "labelled_ap": 0.125},
            pseudo={"images": 9, "cells": 80, "reason": "on: 80 sure cells"},
        ),
        RoundRow(1, 3, status="running"),
    ]
    annotations = [
        annotation(1, "a", 3, 1),
        annotation(2, "a", 5, 1),
        annotation(3, "b", 2, 1),
        annotation(4, "b", 9, None),
        annotation(5, "c", 7, 2),
        annotation(6, "d", 1, 2, cancelled=True),
    ]
    first, second = demo_rounds(rounds, annotations)
    assert (first.round, first.images_labelled, first.cells_labelled, first.hold_out_images) == (1, 2, 7, 4)
    assert (first.ap, first.ap50, first.champion_ap, first.decision, first.reason) == (0.5, 0.75, None, "first", "r1")
    assert (second.round, second.images_labelled, second.cells_labelled, second.hold_out_images) == (2, 3, 14, 5)
    assert (second.ap, second.champion_ap, second.decision) == (0.25, 0.5, "refused")
    assert (first.mixed_ap, first.labelled_ap, first.pseudo) == (None, None, "")
    assert (second.mixed_ap, second.labelled_ap) == (0.25, 0.125)
    assert (second.pseudo_images, second.pseudo_cells, second.pseudo) == (9, 80, "on: 80 sure cells")


@pytest.mark.parametrize("ran_before", [True, False])
def test_the_demo_stops_only_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran_before: bool) -> None:
    stopped: list[Path] = []

    @contextmanager
    def telling() -> Any:
        yield lambda *_: None

    endpoints = SimpleNamespace(
        label_studio_url="http://ls",
        label_studio_email="e@x",
        label_studio_password="p",
        mlflow_url="http://m",
        prefect_api_url="http://p/api",
    )
    monkeypatch.setattr(
        Workspace, "state", lambda self: SimpleNamespace(is_running=lambda: True) if ran_before else None
    )
    monkeypatch.setattr(Workspace, "endpoints", lambda self: endpoints)
    monkeypatch.setattr(launch, "start_in_background", lambda *_: None)
    monkeypatch.setattr(launch, "stop", lambda place, say: stopped.append(place.root))
    monkeypatch.setattr(demo_flow, "run_demo", lambda *_: DemoReport((), "report.html", 1, ("a",)))
    monkeypatch.setattr(demo_command, "telling", telling)
    app = typer.Typer()
    demo_command.register(app)
    reply = CliRunner().invoke(app, ["--workspace", str(tmp_path)])
    assert reply.exit_code == 0, reply.output
    assert stopped == ([] if ran_before else [tmp_path])
    assert ("http://ls/projects/1/data" in reply.output) is ran_before
