from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from loop.acquisition.foreground_random import SHARE, select
from loop.types import Candidate


def pool(foregrounds):
    return [Candidate(f"i{i}", "", 0.0, np.zeros(1, np.float32), foreground=f) for i, f in enumerate(foregrounds)]


def test_the_first_is_drawn_two_thirds_by_foreground_and_one_third_uniformly():
    foreground = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    rng = np.random.default_rng(0)
    first = Counter(select(pool(foreground), 1, rng)[0].image_id for _ in range(6000))
    expected = 6000 * (SHARE * foreground / foreground.sum() + (1 - SHARE) / 5)
    assert chisquare([first[f"i{i}"] for i in range(5)], expected).pvalue > 0.01


def test_the_second_is_drawn_from_what_is_left_in_the_same_way():
    # exact chances of the ordered pair, by hand: draw, remove, draw again
    weights = {"i0": 0.5, "i1": 0.25, "i2": 0.25, "i3": 0.0}

    def chance(image, left):
        total = sum(weights[i] for i in left)
        return SHARE * (weights[image] / total if total else 1 / len(left)) + (1 - SHARE) / len(left)

    pairs = [(a, b) for a in weights for b in weights if a != b]
    expected = [8000 * chance(a, list(weights)) * chance(b, [i for i in weights if i != a]) for a, b in pairs]
    rng = np.random.default_rng(1)
    drawn = Counter(tuple(s.image_id for s in select(pool(list(weights.values())), 2, rng)) for _ in range(8000))
    assert chisquare([drawn[pair] for pair in pairs], expected).pvalue > 0.01


def test_without_any_foreground_it_is_uniform():
    rng = np.random.default_rng(2)
    first = Counter(select(pool([0.0] * 4), 1, rng)[0].image_id for _ in range(4000))
    assert chisquare(list(first.values())).pvalue > 0.01
    assert len(first) == 4


def test_reasons_say_how_each_was_drawn():
    reasons = [s.reason for s in select(pool([0.25] * 200), 200, np.random.default_rng(3))]
    by_foreground = sum("25% of this frame" in reason for reason in reasons)
    assert by_foreground + reasons.count("drawn at random from 200 open images") == 200
    assert by_foreground == pytest.approx(200 * SHARE, abs=25)
    empty = [s.reason for s in select(pool([0.0] * 20), 20, np.random.default_rng(3))]
    assert any("no cells here" in reason for reason in empty)
