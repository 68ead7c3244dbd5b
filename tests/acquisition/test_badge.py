from collections import Counter

import numpy as np
from scipy.stats import chisquare

from loop.acquisition.badge import gradients, seeds, select
from loop.types import Candidate


def test_gradients_by_hand():
    # uncertainty x (features / sqrt(D), 1)
    got = gradients(np.array([[2.0, -2, 0, 4], [0, 0, 0, 0]]), np.array([0.5, 3.0]))
    np.testing.assert_allclose(got, [[0.5, -0.5, 0, 1, 0.5], [0, 0, 0, 0, 3]])


def test_the_first_is_the_longest_and_the_second_is_drawn_by_squared_distance():
    # the squared distances to the first are 4, 9, 25, those to 0 are 4, 1, 1: the lower counts
    points = np.array([[4.0, 0.0], [2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    rng = np.random.default_rng(0)
    orders = [seeds(points, 2, rng) for _ in range(6000)]
    assert {order[0] for order in orders} == {0}
    second = Counter(order[1] for order in orders)
    assert chisquare([second[1], second[2], second[3]], 6000 * np.array([4, 1, 1]) / 6).pvalue > 0.01


def test_what_lies_on_chosen_points_is_drawn_last_and_uniformly():
    points = np.array([[1.0], [1.0], [1.0], [-0.5]])
    orders = [seeds(points, 4, np.random.default_rng(seed)) for seed in range(400)]
    assert all(order[:2] == [0, 3] for order in orders)
    assert 150 < sum(order[2] == 1 for order in orders) < 250


def test_sure_images_are_hardly_ever_chosen():
    rng = np.random.default_rng(0)
    pool = [
        Candidate(f"{name}-{i:02d}", "", uncertainty, rng.normal(size=4).astype(np.float32))
        for name, uncertainty in (("sure", 0.001), ("unsure", 0.8))
        for i in range(20)
    ]
    chosen = [s.image_id for seed in range(10) for s in select(pool, 8, np.random.default_rng(seed))]
    assert sum(image_id.startswith("unsure") for image_id in chosen) >= 78


def test_unlike_images_are_chosen_together_more_often_than_their_share():
    rng = np.random.default_rng(0)
    common = [Candidate(f"common-{i}", "", 0.5, (0.1 * rng.normal(size=3)).astype(np.float32)) for i in range(45)]
    rare = [Candidate(f"rare-{i}", "", 0.5, (9 + 0.1 * rng.normal(size=3)).astype(np.float32)) for i in range(5)]
    with_rare = sum(
        any(s.image_id.startswith("rare") for s in select([*common, *rare], 2, np.random.default_rng(seed)))
        for seed in range(50)
    )
    assert with_rare >= 45


def test_reasons_place_the_image():
    pool = [Candidate(f"{i}", "", i / 10, np.array([i], np.float32)) for i in range(1, 11)]
    first, second = select(pool, 2, np.random.default_rng(0))
    assert first.reason == "more uncertain than any other of 10 open images (uncertainty 1)"
    assert "unsure in another way" in second.reason
