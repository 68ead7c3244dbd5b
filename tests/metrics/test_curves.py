import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.curves import aubc, common_budget, cost_to, foreground_efficiency, rising, score_at


def test_a_constant_curve_has_its_own_height_as_area():
    assert aubc([3, 10, 400], [0.1, 0.1, 0.1]) == pytest.approx(0.1)


def test_area_by_hand():
    # two trapezoids: (0.2 + 0.4) / 2 x 10 + (0.4 + 0.8) / 2 x 30 = 3 + 18, over 40
    assert aubc([10, 20, 50], [0.2, 0.4, 0.8]) == pytest.approx(21 / 40)


def test_until_cuts_within_a_segment():
    # the score at 35 is 0.6: 3 + (0.4 + 0.6) / 2 x 15 = 10.5, over 25
    assert aubc([10, 20, 50], [0.2, 0.4, 0.8], until=35) == pytest.approx(10.5 / 25)


def test_until_at_a_point_is_the_curve_that_ends_there():
    assert aubc([0, 1, 2, 9], [0, 1, 0, 5], until=2) == pytest.approx(aubc([0, 1, 2], [0, 1, 0]))
    assert aubc([0, 1, 2], [0, 1, 0], until=2) == pytest.approx(0.5)


@given(
    st.lists(st.floats(0.1, 100), min_size=2, max_size=8),
    st.floats(-5, 5),
    st.floats(0.1, 50),
    st.randoms(use_true_random=False),
)
def test_unit_and_origin_of_the_cost_do_not_matter(steps, shift, unit, random):
    cost, score = np.cumsum(steps), [random.random() for _ in steps]
    area = aubc(cost, score)
    assert aubc(shift + unit * cost, score) == pytest.approx(area, abs=1e-9)
    assert min(score) - 1e-9 <= area <= max(score) + 1e-9


@pytest.mark.parametrize("until", [10, 9, 51])
def test_until_outside_is_refused(until):
    with pytest.raises(InputError, match="until"):
        aubc([10, 20, 50], [0.2, 0.4, 0.8], until=until)


def test_a_single_point_has_no_area():
    with pytest.raises(InputError, match="at least 2"):
        aubc([1], [0.5])


@pytest.mark.parametrize("cost", [[1, 1, 2], [1, 3, 2]])
def test_a_cost_that_does_not_rise_is_refused(cost):
    for measure in (aubc, lambda c, s: cost_to(c, s, 0.5), lambda c, s: score_at(c, s, 1)):
        with pytest.raises(InputError, match="does not rise"):
            measure(cost, [0.1, 0.2, 0.3])


def test_lengths_numbers_and_emptiness_are_checked():
    with pytest.raises(ShapeError, match="one score a cost"):
        aubc([1, 2], [0.1])
    with pytest.raises(NonFiniteError, match="point 1"):
        aubc([1, 2], [0.1, np.nan])
    with pytest.raises(InputError, match="no points"):
        cost_to([], [], 0.5)


def test_common_budget_is_the_smallest_last_cost():
    assert common_budget([[1, 5, 9], [1, 7], [1, 2, 3, 100]]) == 7
    with pytest.raises(InputError, match="at least one"):
        common_budget([])
    with pytest.raises(InputError, match="no points"):
        common_budget([[]])


def test_cost_to_a_score_by_hand():
    cost, score = [10, 20, 50, 60], [0.2, 0.4, 0.8, 0.5]
    assert cost_to(cost, score, 0.6) == pytest.approx(35)
    assert cost_to(cost, score, 0.8) == pytest.approx(50)
    assert cost_to(cost, score, 0.1) == 10
    assert cost_to(cost, score, 0.81) is None


def test_cost_to_takes_the_first_time_where_the_score_falls_again():
    assert cost_to([0, 10, 20, 30], [0.0, 1.0, 0.0, 1.0], 0.5) == pytest.approx(5)


def test_score_at_interpolates_and_refuses_outside():
    assert score_at([10, 20], [0.0, 1.0], 17) == pytest.approx(0.7)
    for at in (9, 21):
        with pytest.raises(InputError, match="range of the cost"):
            score_at([10, 20], [0.0, 1.0], at)


def test_points_that_cost_nothing_more_leave_only_the_last():
    x, y = rising([5, 5, 8, 8, 8, 9], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert x.tolist() == [5, 8, 9]
    assert y.tolist() == [0.2, 0.5, 0.6]
    with pytest.raises(InputError, match="falls"):
        rising([5, 4], [0, 0])


@pytest.mark.parametrize("beta", [0.0005, 0.004, 0.03])
def test_a_made_curve_gives_its_rate_back(beta):
    x = np.array([40.0, 90, 150, 300, 500])
    y = 0.8 - 0.5 * np.exp(-beta * (x - 40))
    assert foreground_efficiency(x, y, 0.8, 0.3) == pytest.approx(beta, rel=1e-4)


def test_the_rate_of_a_noisy_curve_is_that_of_scipy():
    rng = np.random.default_rng(3)
    x = np.array([40.0, 90, 150, 300, 500])
    y = 0.8 - 0.5 * np.exp(-0.006 * (x - 40)) + rng.normal(0, 0.02, 5)
    (expected,), _ = curve_fit(lambda t, b: 0.8 - 0.5 * np.exp(-b * (t - 40)), x, y, p0=[0.01], bounds=(0, 1))
    assert foreground_efficiency(x, y, 0.8, 0.3) == pytest.approx(expected, rel=1e-4)


def test_rates_at_the_edges():
    assert foreground_efficiency([0, 1, 2], [0.5, 0.4, 0.3], 0.9, 0.5) == 0
    assert foreground_efficiency([0, 1, 2], [0.5, 0.9, 0.9], 0.9, 0.5) <= 1e4 / 2
    assert foreground_efficiency([0, 1], [0.9, 0.95], 0.9, 0.9) is None
    with pytest.raises(InputError, match="at least 2"):
        foreground_efficiency([0], [0.5], 0.9, 0.5)
