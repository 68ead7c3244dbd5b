"""What the report page says of the estimate: the comparison, the curve, the forecast, the advice, the seconds."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows import report
from flows.context import LoopContext
from flows.local.workspace import Workspace
from flows.report import write_report
from loop.adapters.index import AnnotationRow, ImageRow, RoundRow
from loop.config import LoopConfig
from loop.effort.cost import CostModel

FOLD = {
    "images": 9,
    "random_ap": 0.412,
    "chosen_ap": 0.467,
    "random_images": 12,
    "chosen_images": 10,
    "random_minutes": 21.4,
    "chosen_minutes": 22.0,
}
GAIN = {"mean": 0.062, "low": 0.011, "high": 0.113, "images": 18, "steps": 400, "round": 2, "folds": [FOLD, FOLD]}
AHEAD = {"mean": 0.018, "low": 0.004, "high": 0.041, "images": 50, "points": 4, "minutes": 95.0, "an_hour": 0.011}
ADVICE = {"kind": "go on", "text": "go on: 50 more images would bring about +1.8 AP."}


def document(number: int, **parts: Any) -> dict[str, Any]:
    ap = 0.45 + 0.06 * number
    figure = {"ap": ap, "low": ap - 0.05, "high": ap + 0.05, "images": 8 + 4 * number, "model": f"m-v{number}"}
    return {
        "round": number,
        "images": 8 + 4 * number,
        "teaching": 10 + 8 * number,
        "cells": 150 + 120 * number,
        "minutes": 20.0 + 15 * number,
        "modelled": False,
        "live": figure,
        "learnt": {**figure, "ap": ap - 0.01},
        "agreement": {"f1": 0.874, "images": 24} if number else None,
        "gain": {"reason": "9 hold-out images are labelled, 16 are needed"},
        "forecast": {"reason": "models of three different amounts of labels are needed"},
        "advice": {"kind": "too early", "text": "too early to say: 9 hold-out images."},
        **parts,
    }


def page_of(tmp_path: Path, rounds: list[RoundRow], monkeypatch: pytest.MonkeyPatch, images: int = 0) -> str:
    row = ImageRow(1, "a", "", "", "", rank=1)
    annotation = AnnotationRow(1, 1, "a", 1, datetime(2026, 1, 1, tzinfo=UTC), "", 12, 90.0)
    cost = CostModel(9.04, 0.31, 5.5, 1.2, 7.77, images)
    monkeypatch.setattr(report, "cost_model", lambda context: SimpleNamespace(cost=cost))
    index = SimpleNamespace(
        images=lambda _: [row], annotations=lambda _: [annotation], rounds=lambda _: rounds, efforts=lambda _: []
    )
    context = SimpleNamespace(
        project=SimpleNamespace(name="p", ls_project_id=1),
        config=LoopConfig(),
        project_name="p",
        index=index,
        workspace=Workspace(tmp_path),
        registry=SimpleNamespace(champion=lambda: None),
        endpoints=SimpleNamespace(label_studio_url="http://a", mlflow_url="http://b", prefect_api_url="http://c/api"),
    )
    return write_report(cast(LoopContext, context)).read_text()


def done(number: int, **parts: Any) -> RoundRow:
    metrics = {"ap": 0.4 + 0.05 * number, "ap50": 0.7, "estimate": document(number, **parts)}
    return RoundRow(1, number, status="done", decision="promoted", metrics=metrics)


def test_the_comparison_the_curve_and_the_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [done(0), done(1), done(2, gain=GAIN), done(3, gain=GAIN, forecast=AHEAD, advice=ADVICE)]
    page = page_of(tmp_path, rounds, monkeypatch, images=44)
    assert "<strong>Advice:</strong> go on: 50 more images would bring about +1.8 AP." in page
    section = page[page.index("<h2>Is this better than picking at random?</h2>") :]
    for text in (
        "<strong>Yes.</strong>",
        "+6.2 AP",
        "+1.1 to +11.3",
        "in round 2 on\n18 hold-out images",
        "0.412",
        "21.4",
    ):
        assert text in section
    for text in ("labelled cells", "minutes of people's work", "mean of images", "+0.4 to +4.1", "95 minutes", "87 %"):
        assert text in section
    assert "picked on these very images" in section
    for text in ("9.0 s", "0.3 s", "7.8 s", "lead times of 44 annotations"):
        assert text in section
    assert "Minutes are modelled" not in section
    modelled = page_of(tmp_path, [done(0), done(1, modelled=True)], monkeypatch)
    assert "Minutes are modelled" in modelled


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(0.01, 0.1, "Yes."), (-0.02, 0.1, "That is not shown."), (-0.1, -0.01, "No, it is worse.")],
)
def test_the_answer(low: float, high: float, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, [done(0, gain={**GAIN, "low": low, "high": high})], monkeypatch)
    assert f"<strong>{answer}</strong>" in page


def test_why_it_is_not_known_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, [done(0)], monkeypatch)
    assert "Not known yet:</strong> 9 hold-out images are labelled, 16 are needed." in page
    assert "No forecast yet: models of three different amounts" in page
    assert "too early to say: 9 hold-out images." in page
    assert "open images to" not in page
    assert "What an action takes" not in page


def test_rounds_without_an_estimate_or_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, [RoundRow(1, 0, status="done")], monkeypatch)
    assert "picking at random" not in page
    only = RoundRow(1, 1, status="done", metrics={"estimate": document(1, live=None, learnt=None)})
    page = page_of(tmp_path, [RoundRow(1, 0, status="done"), only], monkeypatch)
    assert "Not known yet" in page
    assert "<svg" not in page
