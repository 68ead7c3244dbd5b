import numpy as np
import pytest

from loop.acquisition.clusters import k_means
from loop.acquisition.cover import greedy_cover, pure_radius, select
from loop.types import Candidate


def by_brute_force(points, known, radius, k):
    """ProbCover's greedy rule on sets."""
    everyone = range(len(points))
    balls = [{j for j in everyone if np.linalg.norm(points[i] - points[j]) < radius} for i in everyone]
    left = {i for i in everyone if all(np.linalg.norm(points[i] - x) >= radius for x in known)}
    order, gains = [], []
    while left and len(order) < k:
        best = max(range(len(points)), key=lambda i: (len(balls[i] & left), -i))
        order.append(best)
        gains.append(len(balls[best] & left))
        left -= balls[best]
    return order, gains


@pytest.mark.parametrize("n_known", [0, 4])
@pytest.mark.parametrize("radius", [0.3, 0.8, 2.0])
def test_as_by_brute_force(n_known, radius):
    rng = np.random.default_rng(n_known)
    points, known = rng.normal(size=(60, 2)), rng.normal(size=(n_known, 2))
    got = greedy_cover(points, known, radius, 15)
    assert got == by_brute_force(points, known, radius, 15)


def test_the_radius_is_the_largest_at_which_95_percent_of_balls_are_pure():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 3))
    radius = pure_radius(points, np.random.default_rng(5))
    kinds, _ = k_means(points, 10, np.random.default_rng(5))
    away = np.linalg.norm(points[:, None] - points, axis=2)
    foreign = kinds[:, None] != kinds

    def purity(r):
        return np.mean([not (foreign[i] & (away[i] < r)).any() for i in range(200)])

    assert purity(radius) >= 0.95
    assert purity(radius * 1.02) < purity(radius)


def test_one_kind_only_has_no_bound():
    assert pure_radius(np.ones((5, 2)), np.random.default_rng(0)) == np.inf
    assert pure_radius(np.ones((1, 2)), np.random.default_rng(0)) == np.inf


def test_the_densest_kinds_first_and_what_labels_cover_is_left():
    rng = np.random.default_rng(0)
    sizes = {"many": (40, (0, 0)), "some": (15, (60, 0)), "few": (6, (0, 60))}
    pool = [
        Candidate(f"{name}-{i}", "", 0.0, (np.array(centre) + 0.1 * rng.normal(size=2)).astype(np.float32))
        for name, (n, centre) in sizes.items()
        for i in range(n)
    ]
    # three kinds: k-means with 10 clusters splits them, so the radius is small; the densest spot is among "many"
    assert select(pool, 1, np.random.default_rng(0))[0].image_id.startswith("many")
    order, gains = greedy_cover(np.stack([c.embedding for c in pool]).astype(float), np.array([[0.0, 0.0]]), 5.0, 9)
    assert [pool[i].image_id[:4] for i in order] == ["some", "few-"]
    assert gains == [15, 6]


def test_when_all_is_covered_the_farthest_follow():
    pool = [Candidate(f"i{i}", "", 0.0, np.array([x], np.float32)) for i, x in enumerate([0, 0, 0, 8, 8, 20])]
    chosen = select(pool, 6, np.random.default_rng(0))
    assert len({s.image_id for s in chosen}) == 6
    assert {float(pool[int(s.image_id[1:])].embedding[0]) for s in chosen[:3]} == {0, 8, 20}
    assert "much like 2 of the other 5 open images" in chosen[0].reason
    assert "farthest" in chosen[-1].reason
    assert "no other open image" in next(s.reason for s in chosen if s.image_id == "i5")
