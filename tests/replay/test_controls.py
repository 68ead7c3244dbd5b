"""Negative controls: the strategy that looks at the truth wins, shuffled scores tie with chance, the emptiest lose."""

import numpy as np
import pytest
from replay_stage import Learner, plan, sample

from loop.metrics.penalty import paired_t
from loop.replay import engine
from loop.replay.controls import CONTROLS, emptiest, shuffled, true_error
from loop.replay.engine import Bench, begin, play
from loop.replay.pool import ReplayData
from loop.types import Candidate, Instances

SEEDS = 60
NAMES = ("random", "true_error", "shuffled", "emptiest")


def candidate(name, uncertainty=0.0):
    return Candidate(name, "", uncertainty, np.zeros(2, np.float32))


def test_orders_by_hand():
    truth = {name: sample(name, n) for name, n in {"a": 4, "b": 4, "c": 0, "d": 2}.items()}
    whole = {name: s.instances for name, s in truth.items()}
    # a is right, b half found, c (empty) right, d not found at all
    offered = whole | {"b": whole["b"].take([0, 1]), "d": Instances.build((64, 64))}
    open_images = [candidate(name) for name in "cbda"]
    rng = np.random.default_rng(0)
    assert true_error(open_images, offered, truth, rng) == ["d", "b", "a", "c"]
    assert emptiest(open_images, offered, truth, rng) == ["c", "d", "a", "b"]
    assert emptiest(open_images[1:], offered, truth, rng) == ["d", "a", "b"]
    # invented cells are an error too
    assert true_error(open_images, whole | {"c": whole["a"]}, truth, rng)[0] == "c"


def test_shuffled_scores_give_every_order_alike():
    open_images = [candidate(name, value) for name, value in zip("abc", (0.1, 0.5, 0.9), strict=True)]
    rng = np.random.default_rng(1)
    orders = [tuple(shuffled(open_images, {}, {}, rng)) for _ in range(600)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    # chi squared of 5 degrees of freedom: 20.5 is passed by chance once in a thousand times
    assert ((counts - 100) ** 2 / 100).sum() < 20.5
    again = [tuple(shuffled(open_images[::-1], {}, {}, np.random.default_rng(7))) for _ in range(2)]
    assert again[0] == again[1] == tuple(shuffled(open_images, {}, {}, np.random.default_rng(7)))


def pool(seed):
    """60 images: of two in three the common look, of 15 % a rare one, and the rest nearly empty."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(60):
        kind, low, high = ("rare", 5, 15) if number < 9 else ("common", 5, 15) if number < 48 else ("common", 0, 2)
        images.append(sample(f"im{rng.integers(10**9):09d}", int(rng.integers(low, high)), kind))
    return ReplayData(tuple(images), (sample("x", 20, "common"), sample("y", 20, "rare")))


def area(bench, seed, strategy):
    """Mean score of the rounds."""
    labelled, scores = begin(bench, seed), []
    for number in range(bench.plan.rounds):
        played = play(bench, seed, number, labelled, [strategy])
        scores.append(played.figures["ap"])
        labelled = played.following[strategy]
    return float(np.mean(scores))


@pytest.fixture(scope="module")
def areas():
    """For each strategy, its score of each seed, all of pretended learners."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "fit", Learner())
        benches = [Bench(pool(seed), plan(start=4, batch=4, rounds=4)) for seed in range(SEEDS)]
        return {name: np.array([area(bench, seed, name) for seed, bench in enumerate(benches)]) for name in NAMES}


def test_the_true_error_wins(areas):
    assert paired_t(areas["true_error"], areas["random"]) < 1e-3
    assert np.mean(areas["true_error"] - areas["random"]) > 0.02


def test_shuffled_scores_tie_with_random(areas):
    assert paired_t(areas["shuffled"], areas["random"]) > 0.1
    assert abs(np.mean(areas["shuffled"] - areas["random"])) < 0.01


def test_the_emptiest_lose(areas):
    assert paired_t(areas["emptiest"], areas["random"]) < 1e-3
    assert np.mean(areas["emptiest"] - areas["random"]) < -0.02


def test_all_controls_have_a_name():
    assert set(CONTROLS) == {"true_error", "shuffled", "emptiest"}
