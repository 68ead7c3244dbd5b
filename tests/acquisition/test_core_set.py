from itertools import combinations

import numpy as np
import pytest

from loop.acquisition import core_set
from loop.acquisition.base import blocks, squared_distances, standardised
from loop.acquisition.core_set import k_centre, nearest_squared, select
from loop.types import Candidate


def by_brute_force(points, centres, k):
    """Sener and Savarese's greedy rule in plain loops."""
    known = [tuple(c) for c in centres]
    order = []
    while len(order) < k:
        left = [i for i in range(len(points)) if i not in order]
        if known:
            away = {i: min(np.linalg.norm(points[i] - np.array(c)) for c in known) for i in left}
            best = max(left, key=lambda i: (away[i], -i))
        else:
            best = min(left, key=lambda i: np.linalg.norm(points[i] - points.mean(axis=0)))
        order.append(best)
        known.append(tuple(points[best]))
    return order


@pytest.mark.parametrize("n_centres", [0, 1, 7])
@pytest.mark.parametrize("seed", range(3))
def test_as_by_brute_force(n_centres, seed):
    rng = np.random.default_rng(seed)
    points, centres = rng.normal(size=(40, 5)), rng.normal(size=(n_centres, 5))
    got = k_centre(points.astype(np.float32), centres.astype(np.float32), 12)
    assert got == by_brute_force(points, centres, 12)


def test_on_a_line_by_hand():
    at = {"a": -0.5, "b": 1.2, "c": 5, "d": 9, "e": 10}
    given = [Candidate(name, "", 0.0, np.array([x], np.float32)) for name, x in at.items()]
    chosen = select(given, 5, np.random.default_rng(0))
    # the mean is 4.94: c; then a, 5.5 away, and e, 5 away; then b is 1.7 from an end and d 1
    assert [s.image_id for s in chosen] == ["c", "a", "e", "b", "d"]
    labelled = [np.array([-0.5], np.float32)]
    chosen = select(given, 5, np.random.default_rng(0), labelled=labelled)
    assert [s.image_id for s in chosen] == ["e", "c", "b", "d", "a"]


def test_blocks_of_rows_and_columns_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    points, centres = rng.normal(size=(50, 4)).astype(np.float32), rng.normal(size=(23, 4)).astype(np.float32)
    expected = ((points[:, None] - centres) ** 2).sum(axis=2).min(axis=1)
    monkeypatch.setattr(core_set, "ROWS", 7)
    monkeypatch.setattr(core_set, "COLUMNS", 5)
    np.testing.assert_allclose(nearest_squared(points, centres), expected, rtol=1e-5, atol=1e-6)
    assert np.isinf(nearest_squared(points, centres[:0])).all()


def test_the_longest_gap_is_at_most_twice_the_best_possible():
    # the guarantee of the greedy rule, against every choice of 3 of 12 points
    points = np.random.default_rng(4).normal(size=(12, 2))

    def gap(chosen):
        return np.sqrt(squared_distances(points, points[list(chosen)]).min(axis=1)).max()

    best = min(gap(chosen) for chosen in combinations(range(12), 3))
    assert gap(k_centre(points.astype(np.float32), np.zeros((0, 2), np.float32), 3)) <= 2 * best + 1e-6


def test_reasons_in_words():
    given = [Candidate(name, "", 0.0, np.array([x], np.float32)) for name, x in zip("abc", [0, 0, 9], strict=True)]
    first, second, third = select(given, 3, np.random.default_rng(0))
    assert "most ordinary of 3" in first.reason
    assert "unlike anything labelled or chosen so far" in second.reason
    assert "the 1 chosen before it" in second.reason
    assert "looks the same" in third.reason
    only = select(given, 1, np.random.default_rng(0), labelled=[np.array([4.0], np.float32)] * 2)
    assert only[0].reason.endswith("the farthest from the 2 labelled")


def test_squared_distances_as_by_differences():
    rng = np.random.default_rng(0)
    points, centres = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    np.testing.assert_allclose(squared_distances(points, centres), ((points[:, None] - centres) ** 2).sum(axis=2))
    assert squared_distances(points, centres[:0]).shape == (6, 0)
    assert (squared_distances(points + 1e6, points + 1e6) >= 0).all()


def test_blocks_hold_every_place_once():
    places = np.arange(10)
    assert np.concatenate(blocks(places, 2**21)).tolist() == list(range(10))
    assert [len(b) for b in blocks(places, 2**20)] == [4, 4, 2]
    assert blocks(places[:0], 5) == []
    assert standardised(np.zeros((1, 2)))[1].shape == (0, 2)
