from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from loop.acquisition.power import beta, in_turns, power_noised, select
from loop.types import Candidate

FAR = ((0.0, 0.0), (50.0, 0.0), (0.0, 50.0))


def kinds_of_images(n_each, entropies):
    rng = np.random.default_rng(0)
    return [
        Candidate(
            f"{kind}-{i:02d}",
            "",
            0.0,
            (np.array(centre) + rng.normal(size=2)).astype(np.float32),
            measures={"entropy": entropy},
        )
        for kind, (centre, entropy) in enumerate(zip(FAR, entropies, strict=True))
        for i in range(n_each)
    ]


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_noised_scores_draw_by_chance_proportional_to_the_power(power):
    scores = np.array([0.1, 0.2, 0.4, 0.8])
    rng = np.random.default_rng(0)
    first = Counter(int(np.argmax(power_noised(scores, power, rng))) for _ in range(8000))
    expected = 8000 * scores**power / (scores**power).sum()
    assert chisquare([first[i] for i in range(4)], expected).pvalue > 0.01


def test_scores_of_zero_come_last_in_random_order():
    orders = [np.argsort(-power_noised(np.array([0.0, 1e-9, 0.0]), 1, np.random.default_rng(s))) for s in range(40)]
    assert all(order[0] == 1 for order in orders)
    assert 8 < sum(order[1] == 0 for order in orders) < 32


def test_beta_rises_from_one_to_a_hundred_as_labels_grow():
    assert beta(0, 100) == pytest.approx(1)
    assert beta(0, 0) == 1
    assert beta(100, 0) == pytest.approx(100)
    # log(10) / log(100) = 1/2 of the way: 100^0.5
    assert beta(9, 90) == pytest.approx(10)
    betas = [beta(labelled, 300 - labelled) for labelled in range(0, 301, 20)]
    assert np.all(np.diff(betas) > 0)


def test_turns_through_the_kinds_by_hand():
    scores = np.array([9.0, 8.0, 7.0, 3.0, 2.0, 5.0])
    kinds = np.array([0, 0, 0, 1, 1, 2])
    # the best of each (9, 5, 3), the second (8, 2), the third (7)
    assert in_turns(scores, kinds).tolist() == [0, 5, 3, 1, 4, 2]


def test_two_thirds_are_spread_over_the_kinds_though_one_is_far_more_uncertain():
    given = kinds_of_images(20, [0.9, 0.001, 0.001])
    labelled = [np.zeros(2, np.float32)] * 3000
    chosen = select(given, 10, np.random.default_rng(0), labelled=labelled)
    # int(0.66 x 10) = 6 are spread over at most 6 kinds, the other 4 are the most uncertain of all
    counts = Counter(s.image_id[0] for s in chosen[:6])
    assert set(counts) == {"0", "1", "2"}
    assert [s.image_id[0] for s in chosen[6:]] == ["0"] * 4
    assert all("stands for" in s.reason for s in chosen[:6])
    assert not any("stands for" in s.reason for s in chosen[6:])


def test_at_most_ten_kinds_share_the_spread_part_evenly():
    rng = np.random.default_rng(0)
    centres = 100 * np.eye(10)
    given = [
        Candidate(
            f"{kind}-{i}", "", 0.0, (centres[kind] + rng.normal(size=10)).astype(np.float32), measures={"entropy": 0.5}
        )
        for kind in range(10)
        for i in range(9)
    ]
    chosen = select(given, 50, np.random.default_rng(1))
    assert sorted(Counter(s.image_id[0] for s in chosen[:33]).values()) == [3] * 7 + [4] * 3


def test_luck_fades_with_labels():
    given = [
        Candidate(f"{i:02d}", "", 0.0, np.zeros(1, np.float32), measures={"entropy": 0.02 * (i + 1)}) for i in range(30)
    ]

    def mean_rank(n_labelled):
        labelled = [np.zeros(1, np.float32)] * n_labelled
        chosen = [
            s.image_id for seed in range(60) for s in select(given, 5, np.random.default_rng(seed), labelled=labelled)
        ]
        return np.mean([int(image_id) for image_id in chosen])

    # without noise the five highest have the mean 27
    assert mean_rank(0) < mean_rank(5) < mean_rank(3000) <= 27
    assert mean_rank(3000) > 26
