from itertools import product

import numpy as np
import pytest

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.paired import paired_bootstrap

OPTIONS = {"confidence": 0.8, "resamples": 2000}


def test_two_images_by_hand():
    # Differences 0 and 1: a resample's mean is 0, 1/2 or 1 in 1/4, 1/2, 1/4 of cases, so the 10 % quantile is 0.
    got = paired_bootstrap([0.5, 0.9], [0.5, -0.1], rng=np.random.default_rng(0), **OPTIONS)
    assert got == pytest.approx((0.5, 0.0, 1.0))
    got = paired_bootstrap([0.5, 0.9], [0.5, -0.1], rng=np.random.default_rng(0), confidence=0.4, resamples=2000)
    assert got == pytest.approx((0.5, 0.5, 0.5))


def test_four_images_against_every_resample():
    challenger, champion = np.array([0.61, 0.42, 0.83, 0.3]), np.array([0.58, 0.47, 0.71, 0.31])
    difference = challenger - champion
    every = [np.mean(draw) for draw in product(difference, repeat=4)]
    expected = np.quantile(every, [0.1, 0.9])
    got = paired_bootstrap(challenger, champion, rng=np.random.default_rng(1), confidence=0.8, resamples=100_000)
    assert got.mean == pytest.approx(difference.mean())
    assert (got.low, got.high) == pytest.approx(tuple(expected), abs=0.002)


def test_it_covers_the_true_difference_as_often_as_it_says():
    rng, n, true = np.random.default_rng(2), 40, 0.02
    held = 0
    for _ in range(400):
        hard = rng.uniform(0, 0.8, n)  # shared by both models: pairing takes it out
        challenger, champion = hard + true + rng.normal(0, 0.05, n), hard + rng.normal(0, 0.05, n)
        got = paired_bootstrap(challenger, champion, confidence=0.8, resamples=400, rng=rng)
        held += got.low <= true <= got.high
    assert 0.72 <= held / 400 <= 0.86


def test_swapping_the_models_mirrors_the_interval():
    rng = np.random.default_rng(3)
    a, b = rng.random(9), rng.random(9)
    first = paired_bootstrap(a, b, rng=np.random.default_rng(4), **OPTIONS)
    second = paired_bootstrap(b, a, rng=np.random.default_rng(4), **OPTIONS)
    assert second == pytest.approx((-first.mean, -first.high, -first.low))
    assert first.low <= first.mean <= first.high


def test_equal_models_one_image_and_the_same_seed():
    scores = np.array([0.1, 0.5, 0.7])
    assert paired_bootstrap(scores, scores, rng=np.random.default_rng(0), **OPTIONS) == (0, 0, 0)
    assert paired_bootstrap([0.7], [0.5], rng=np.random.default_rng(0), **OPTIONS) == pytest.approx((0.2, 0.2, 0.2))
    draws = [paired_bootstrap(scores, scores[::-1], rng=np.random.default_rng(7), **OPTIONS) for _ in range(2)]
    assert draws[0] == draws[1]


def test_many_images_are_drawn_in_parts(monkeypatch):
    rng = np.random.default_rng(5)
    a, b = rng.random(50), rng.random(50)
    whole = paired_bootstrap(a, b, rng=np.random.default_rng(6), **OPTIONS)
    monkeypatch.setattr("loop.metrics.paired._CHUNK", 120)
    assert paired_bootstrap(a, b, rng=np.random.default_rng(6), **OPTIONS) == whole


@pytest.mark.parametrize(
    ("challenger", "champion", "options", "error", "text"),
    [
        ([1.0, 2.0], [1.0], {}, ShapeError, "one score an image"),
        ([[1.0]], [[1.0]], {}, ShapeError, "one score an image"),
        ([], [], {}, InputError, "at least one hold-out image"),
        ([1.0], [1.0], {"confidence": 1.0}, InputError, "confidence is 1.0"),
        ([1.0], [1.0], {"resamples": 0}, InputError, "resamples is 0"),
        ([1.0, np.nan], [1.0, 1.0], {}, NonFiniteError, "challenger's score of image number 1"),
        ([1.0, 1.0], [np.inf, 1.0], {}, NonFiniteError, "champion's score of image number 0"),
    ],
)
def test_refusals(challenger, champion, options, error, text):
    with pytest.raises(error, match=text):
        paired_bootstrap(challenger, champion, rng=np.random.default_rng(0), **(OPTIONS | options))
