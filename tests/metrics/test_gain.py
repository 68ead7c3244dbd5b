"""The gain of pairs of models: with and without a true one, and against scipy."""

import numpy as np
import pytest
from scipy.stats import bootstrap, t

from loop.errors import InputError, NonFiniteError
from loop.metrics.gain import RUN_DF, RUN_SD, bootstrap_mean, gain_of_pairs, standard_error
from loop.metrics.paired import Interval

OPTIONS = {"confidence": 0.9, "resamples": 300}


def pairs(rng: np.random.Generator, gain: float, spread: float = RUN_SD, n: int = 12) -> Interval:
    """Two pairs whose gains lie `spread` around `gain`, measured on n images each."""
    chosen = [rng.normal(0.5 + rng.normal(gain, spread), 0.12, n) for _ in range(2)]
    return gain_of_pairs(chosen, [np.full(n, 0.5)] * 2, rng=rng, **OPTIONS)


def test_random_images_under_another_name_are_rarely_said_to_be_better() -> None:
    rng = np.random.default_rng(0)
    found = [pairs(rng, 0.0) for _ in range(400)]
    assert np.mean([interval.low > 0 for interval in found]) <= 0.06
    assert np.mean([interval.high < 0 for interval in found]) <= 0.06


def test_a_large_gain_is_seen() -> None:
    rng = np.random.default_rng(1)
    assert np.mean([pairs(rng, 0.25).low > 0 for _ in range(100)]) > 0.9


def test_where_the_images_say_nothing_the_trainings_alone_are_unsure() -> None:
    found = gain_of_pairs(
        [np.full(4, 0.6), np.full(4, 0.56)], [np.full(4, 0.5)] * 2, rng=np.random.default_rng(0), **OPTIONS
    )
    freedom = RUN_DF + 1
    half = t.ppf(0.95, freedom) * np.sqrt((RUN_DF * RUN_SD**2 + 2 * 0.02**2) / freedom / 2)
    assert found.mean == pytest.approx(0.08)
    assert half <= found.high - found.mean <= np.hypot(half, 0.02) + 1e-9


def test_groups_are_drawn_whole() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(30)
    alone = bootstrap_mean(scores, [str(i) for i in range(30)], confidence=0.9, resamples=4000, rng=rng)
    theirs = bootstrap((scores,), np.mean, confidence_level=0.9, method="percentile", n_resamples=4000, rng=rng)
    interval = theirs.confidence_interval
    assert (alone.low, alone.high) == pytest.approx((interval.low, interval.high), abs=0.01)
    twice = bootstrap_mean(np.tile(scores, 4), [str(i) for i in range(30)] * 4, confidence=0.9, resamples=4000, rng=rng)
    assert (twice.low, twice.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    assert twice.mean == pytest.approx(scores.mean())


def test_one_image_has_no_width_and_none_is_refused() -> None:
    rng = np.random.default_rng(0)
    assert bootstrap_mean(np.array([0.4]), ["a"], rng=rng, **OPTIONS) == (0.4, 0.4, 0.4)
    with pytest.raises(InputError, match="0 scores"):
        bootstrap_mean(np.array([]), [], rng=rng, **OPTIONS)
    with pytest.raises(NonFiniteError, match="image number 1"):
        bootstrap_mean(np.array([0.4, np.nan]), ["a", "b"], rng=rng, **OPTIONS)
    with pytest.raises(InputError, match="at least one pair"):
        gain_of_pairs([], [], rng=rng, **OPTIONS)
    with pytest.raises(InputError, match="each with its images"):
        gain_of_pairs([np.array([])], [np.array([])], rng=rng, **OPTIONS)


def test_the_standard_error_behind_an_interval() -> None:
    assert standard_error(0.4, 0.6, 0.95) == pytest.approx(0.1 / 1.959964, rel=1e-5)
