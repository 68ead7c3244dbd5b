from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import permutation_test, ttest_rel

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.penalty import holm, paired_permutation, paired_t, penalty_matrix


@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_t_test_is_scipys(n):
    a, b = np.random.default_rng(n).random((2, n))
    assert paired_t(a, b) == pytest.approx(float(ttest_rel(a, b).pvalue))
    assert paired_t(b, a) == pytest.approx(paired_t(a, b))


def test_differences_that_are_all_alike():
    assert paired_t([0.5, 0.25, 1.0], [0.5, 0.25, 1.0]) == 1
    assert paired_t([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]) == 0


def test_sign_flips_by_hand_and_by_brute_force():
    assert paired_permutation([1, 2, 3], [0, 0, 0]) == pytest.approx(2 / 8)
    assert paired_permutation([1, -1], [0, 0]) == 1
    difference = np.random.default_rng(1).normal(0.3, 1, 8)
    means = [abs(np.mean(difference * signs)) for signs in product([1, -1], repeat=8)]
    expected = np.mean(np.array(means) >= abs(difference.mean()) - 1e-12)
    assert paired_permutation(difference, np.zeros(8)) == pytest.approx(expected)


def test_sign_flips_are_scipys_permutation_test():
    a, b = np.random.default_rng(5).random((2, 7))
    expected = permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert paired_permutation(a, b) == pytest.approx(float(expected))


def test_five_seeds_cannot_be_significant_six_can():
    assert paired_permutation(np.ones(5), np.zeros(5)) == pytest.approx(0.0625)
    assert paired_permutation(np.ones(6), np.zeros(6)) == pytest.approx(0.03125)


def test_too_many_seeds_for_every_swap():
    with pytest.raises(InputError, match="t-test"):
        paired_permutation(np.ones(23), np.zeros(23))


@pytest.mark.parametrize("test", [paired_t, paired_permutation])
def test_what_does_not_pair_is_refused(test):
    with pytest.raises(ShapeError, match="one score a seed"):
        test([1, 2, 3], [1, 2])
    with pytest.raises(InputError, match="at least 2"):
        test([1], [1])
    with pytest.raises(NonFiniteError, match="every seed"):
        test([1, np.nan], [1, 2])


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04, never falling
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    assert holm([]).shape == (0,)
    with pytest.raises(InputError, match="0, 1"):
        holm([0.5, 1.5])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_as_the_stepwise_rule_says(p):
    adjusted = holm(p)
    ordered, n, going = sorted(p), len(p), True
    rejected = 0
    for i, value in enumerate(ordered):
        going = going and value * (n - i) <= 0.05
        rejected += going
    assert int(np.sum(adjusted <= 0.05)) == rejected
    assert np.all(adjusted >= np.array(p))


def noisy(level, seeds=6, budgets=4, seed=0):
    rng = np.random.default_rng(seed)
    return level + rng.normal(0, 0.01, (budgets, seeds))


def test_the_better_one_wins_where_it_is_better():
    good, bad = noisy(0.5, seed=1), noisy(0.3, seed=2)
    bad[3] = good[3]
    matrix = penalty_matrix({"bad": bad, "good": good}, 0.9)
    assert matrix.names == ("bad", "good")
    np.testing.assert_allclose(matrix.wins, [[0, 0], [0.75, 0]])
    np.testing.assert_allclose(matrix.loses, [0.75, 0])
    assert matrix.budgets == 4


def test_three_by_hand_with_scipy_and_without_correction():
    rng = np.random.default_rng(7)
    scores = {name: 0.5 + rng.normal(0, 0.05, (5, 5)) + 0.03 * i for i, name in enumerate("abc")}
    matrix = penalty_matrix(scores, None, correct=False)
    for i, a in enumerate("abc"):
        for j, b in enumerate("abc"):
            wins = [
                ttest_rel(x, y).pvalue < 0.05 and x.mean() > y.mean()
                for x, y in zip(scores[a], scores[b], strict=True)
                if a != b
            ]
            assert matrix.wins[i, j] == pytest.approx(np.mean(wins) if wins else 0)
    assert np.all(penalty_matrix(scores, None).wins <= matrix.wins)


def test_saturated_budgets_do_not_count():
    low, high = noisy(0.5, seed=1), noisy(0.7, seed=2)
    low[2:], high[2:] = noisy(0.995, budgets=2, seed=3), noisy(1.05, budgets=2, seed=4)
    matrix = penalty_matrix({"low": low, "high": high}, 0.95)
    assert matrix.budgets == 2
    assert matrix.wins[1, 0] == 1
    assert penalty_matrix({"low": low[2:], "high": high[2:]}, 0.95).wins.tolist() == [[0, 0], [0, 0]]


def test_methods_that_are_noise_tie():
    matrix = penalty_matrix({str(i): noisy(0.5, seed=i, budgets=20) for i in range(4)}, 0.9)
    assert matrix.wins.max() <= 0.1


def test_unequal_seeds_one_seed_and_no_method_are_refused():
    with pytest.raises(ShapeError, match="same budgets and seeds"):
        penalty_matrix({"a": noisy(0.5), "b": noisy(0.5, seeds=5)}, 0.9)
    with pytest.raises(InputError, match="at least 2 seeds"):
        penalty_matrix({"a": noisy(0.5, seeds=1)}, 0.9)
    with pytest.raises(InputError, match="no methods"):
        penalty_matrix({}, 0.9)
    with pytest.raises(InputError, match="alpha"):
        penalty_matrix({"a": noisy(0.5)}, 0.9, alpha=0)
    with pytest.raises(NonFiniteError, match="'b'"):
        penalty_matrix({"a": noisy(0.5), "b": noisy(np.nan)}, 0.9)
