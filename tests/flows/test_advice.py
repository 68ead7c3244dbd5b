"""The advice as a table: numbers in, words out."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from flows.advice import Advice, Figures, advise, next_step, points
from flows.context import LoopContext
from loop.adapters.index import ImageRow, RoundRow
from loop.config import LoopConfig, load_config
from loop.metrics.gain import gain_of_pairs
from loop.metrics.paired import Interval

ENOUGH = Figures(holdout=24, min_images=16, worth=0.01, ahead_images=50, no_gain="5 were chosen, 8 are needed")
RISING, FLAT = Interval(0.03, 0.012, 0.055), Interval(0.004, 0.0, 0.009)
UNSURE, SMALL = Interval(0.006, 0.0, 0.05), Interval(0.008, 0.001, 0.02)
PAYS, LEVEL, COSTS = Interval(0.06, 0.01, 0.11), Interval(0.03, -0.02, 0.08), Interval(-0.05, -0.09, -0.01)
NO_BETTER = Interval(-0.03, -0.065, 0.005)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"forecast": RISING}, "go on"),
        ({"forecast": RISING, "gain": PAYS}, "go on"),
        ({"forecast": RISING, "gain": LEVEL}, "go on"),
        ({"forecast": RISING, "stable": True}, "go on"),
        ({"forecast": FLAT}, "stop"),
        ({"forecast": FLAT, "gain": COSTS}, "stop"),
        ({"forecast": SMALL, "stable": True}, "stop"),
        ({"forecast": SMALL}, "too early"),
        ({"forecast": UNSURE}, "too early"),
        ({}, "too early"),
        ({"gain": PAYS}, "too early"),
        ({"gain": COSTS}, "use random"),
        ({"forecast": RISING, "gain": COSTS}, "use random"),
        ({"forecast": RISING, "gain": NO_BETTER}, "use random"),
        ({"forecast": FLAT, "gain": COSTS, "holdout": 15}, "too early"),
        ({"forecast": RISING, "holdout": 0}, "too early"),
        ({"forecast": RISING, "budget_spent": True}, "stop"),
    ],
)
def test_the_rules(given: dict[str, Any], kind: str) -> None:
    advice = advise(replace(ENOUGH, **given))
    assert advice.kind == kind
    opening = "too early to say:" if kind == "too early" else f"{kind}:"
    assert advice.text.startswith(opening)


def test_the_words_hold_the_numbers_and_their_unit() -> None:
    hourly = replace(ENOUGH, forecast=RISING, an_hour=Interval(0.018, 0.01, 0.03), gain=LEVEL)
    assert advise(hourly) == Advice(
        "go on",
        "go on: 50 more images would bring about +3.0 AP (+1.2 to +5.5, AP in points of 100), +1.8 AP an hour. "
        "The choice of images is not shown to beat random ones: +3.0 AP (-2.0 to +8.0, AP in points of 100) at equal "
        "cost.",
    )
    flat = advise(replace(ENOUGH, forecast=FLAT)).text
    assert flat.startswith("stop: 50 more images would bring about +0.4 AP (+0.0 to +0.9, AP in points of 100).")
    assert flat.endswith("is not known: 5 were chosen, 8 are needed.")
    assert "15 hold-out images are labelled, 16 are needed" in advise(replace(ENOUGH, holdout=15)).text
    assert "successive models find the same cells" in advise(replace(ENOUGH, forecast=SMALL, stable=True)).text
    assert "The choice of images pays: +6.0 AP (+1.0 to +11.0" in advise(replace(ENOUGH, gain=PAYS)).text
    assert "The choice of images costs: -5.0 AP" in advise(replace(ENOUGH, gain=COSTS)).text
    assert points(-0.0001) == "+0.0 AP"


@pytest.mark.parametrize("gain", [None, LEVEL, COSTS, NO_BETTER, Interval(0.02, 0.0, 0.04), Interval(0.0, 0.0, 0.0)])
def test_only_an_interval_above_zero_pays(gain: Interval | None) -> None:
    assert "pays" not in advise(replace(ENOUGH, forecast=RISING, gain=gain)).text


def test_random_labels_as_a_strategy_are_not_said_to_pay() -> None:
    """Two trainings on two draws of random images differ; their images alone would call that a gain in every fifth."""
    rng = np.random.default_rng(4)
    said = 0
    for _ in range(200):
        chosen = [rng.normal(0.5 + rng.normal(0, 0.04), 0.12, 12) for _ in range(2)]
        gain = gain_of_pairs(chosen, [np.full(12, 0.5)] * 2, confidence=0.9, resamples=200, rng=rng)
        said += "pays" in advise(replace(ENOUGH, forecast=RISING, gain=gain)).text
    assert said <= 4


def stage() -> LoopContext:
    return cast(LoopContext, SimpleNamespace(config=LoopConfig()))


def test_the_next_step() -> None:
    waiting = ImageRow(1, "a", "", "", "", rank=1)
    unranked, labelled = ImageRow(1, "b", "", "", ""), ImageRow(1, "c", "", "", "", state="labelled")
    refused = RoundRow(1, 2, status="done", decision="refused")
    assert "Label the 1 images" in next_step(stage(), [waiting, labelled], [])
    assert "Every image is labelled" in next_step(stage(), [labelled], [])
    assert "was refused" in next_step(stage(), [unranked], [refused])
    assert next_step(stage(), [unranked], []) == "The batch is labelled. Run `celloop round`."
    done = RoundRow(1, 2, status="done", decision="promoted")
    assert next_step(stage(), [unranked, replace(labelled, chosen_in=2)], [done]).startswith("The batch is labelled")
    assert "could choose none of the open images" in next_step(stage(), [unranked, labelled], [done])
    shared = load_config(None, {"select.annotators": ["ann@lab.org", "bob@lab.org"]})
    said = next_step(cast(LoopContext, SimpleNamespace(config=shared)), [waiting], [])
    assert "Label Tasks As Displayed" in said
    assert "Label All Tasks" not in said


def test_a_gain_that_is_not_worth_it_is_not_said_to_be_none() -> None:
    text = advise(replace(ENOUGH, forecast=RISING, gain=Interval(0.004, 0.001, 0.008))).text
    assert text.startswith("use random: the chosen images teach hardly more")


def test_a_budget_spent_by_reckoning_says_so() -> None:
    spent = replace(ENOUGH, budget_spent=True)
    assert "reckoned" not in advise(spent).text
    assert "reckoned from the cells" in advise(replace(spent, modelled=True)).text
