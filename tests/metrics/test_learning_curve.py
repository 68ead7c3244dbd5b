"""Curves with a known truth, flat ones, and too few points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.learning_curve import fit_learning_curve, forecast


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def power(x: np.ndarray, c: float, a: float, b: float) -> np.ndarray:
    return c - a * x**-b


def test_points_without_noise_give_the_curve_back() -> None:
    x = np.array([10.0, 20.0, 40.0, 80.0])
    b = float(np.geomspace(0.1, 2.0, 20)[10])
    found = fit_learning_curve(x, power(x, 0.7, 1.5, b), [0.01] * 4, rng=rng())
    assert found is not None
    assert (found.c, found.a, found.b) == pytest.approx((0.7, 1.5, b), rel=1e-6)
    assert [found.ap(cost) for cost in x] == pytest.approx(power(x, 0.7, 1.5, b).tolist())
    assert found.ap(1e-6) == 0.0


def test_the_fit_is_as_near_to_the_points_as_that_of_scipy() -> None:
    generator = rng(3)
    x = np.array([12.0, 20, 28, 36, 44])
    for _ in range(5):
        y = power(x, 0.8, 2.0, 0.6) + generator.normal(size=5) * 0.02
        found = fit_learning_curve(x, y, [0.02] * 5, rng=rng(), resamples=1)
        assert found is not None

        def misfit(p: np.ndarray, y: np.ndarray = y) -> float:
            return float(((y - power(x / 44, *p)) ** 2).sum())

        bounds = [(0, 1), (0, None), (0.1, 2.0)]
        best = min(minimize(misfit, [0.7, 0.2, b], bounds=bounds).fun for b in (0.2, 0.6, 1.5))
        ours = float(((y - [found.c - found.a * cost**-found.b for cost in x]) ** 2).sum())
        assert ours <= best * 1.05 + 1e-5


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = rng(1)
    held = []
    for _ in range(200):
        x = 12 + 8.0 * np.arange(6)
        c, b = generator.uniform(0.4, 0.95), generator.uniform(0.2, 1.5)
        a = (c - generator.uniform(0.1, c)) * x[0] ** b
        true = a * (x[-1] ** -b - (x[-1] + 50) ** -b)
        y = power(x, c, a, b) + generator.normal(size=6) * 0.02
        found = forecast(fit_learning_curve(x, y, [0.02] * 6, rng=generator, resamples=300), 50)
        assert found is not None
        held.append(found.low <= true <= found.high)
    assert 0.85 <= np.mean(held) <= 0.98


def test_a_flat_curve_promises_next_to_nothing() -> None:
    x = 12 + 8.0 * np.arange(8)
    exact = forecast(fit_learning_curve(x, np.full(8, 0.6), [0.01] * 8, rng=rng()), 50)
    assert exact is not None
    assert 0 <= exact.low <= exact.mean < 0.003
    assert exact.high < 0.01


def test_few_or_noisy_points_say_little() -> None:
    x, y = [12.0, 20.0, 28.0], [0.4, 0.5, 0.55]
    sure = forecast(fit_learning_curve(x, y, [0.01] * 3, rng=rng()), 50)
    noisy = forecast(fit_learning_curve(x, y, [0.05] * 3, rng=rng()), 50)
    assert sure is not None
    assert noisy is not None
    assert noisy.high - noisy.low > sure.high - sure.low > 0.05
    scattered = [0.3, 0.6, 0.4, 0.65, 0.45]
    wide = forecast(fit_learning_curve([12, 20, 28, 36, 44], scattered, [0.01] * 5, rng=rng()), 50)
    assert wide is not None
    assert wide.high - wide.low > 0.1


def test_fewer_than_three_costs_give_no_curve_and_no_forecast() -> None:
    assert fit_learning_curve([], [], [], rng=rng()) is None
    assert fit_learning_curve([12, 12, 20, 20], [0.4, 0.5, 0.5, 0.6], [0.1] * 4, rng=rng()) is None
    assert forecast(None, 50) is None


@given(
    scores=st.lists(st.floats(0, 1), min_size=3, max_size=7),
    error=st.floats(0, 0.2),
    more=st.floats(0, 1000),
    seed=st.integers(0, 100),
)
def test_it_never_falls_and_the_forecast_grows_with_the_work(
    scores: list[float], error: float, more: float, seed: int
) -> None:
    costs = [5.0 + 3 * i for i in range(len(scores))]
    curve = fit_learning_curve(costs, scores, [error] * len(scores), rng=rng(seed), resamples=30)
    assert curve is not None
    assert (np.diff([curve.ap(cost) for cost in np.linspace(1, 500, 40)]) >= 0).all()
    less, farther = forecast(curve, more), forecast(curve, more + 10)
    assert less is not None
    assert farther is not None
    assert 0 <= less.low <= less.mean <= less.high
    assert farther.mean >= less.mean - 1e-12
    assert farther.high >= less.high - 1e-12


def test_the_same_state_gives_the_same_and_the_order_of_points_does_not_matter() -> None:
    x, y = np.array([12.0, 20.0, 28.0, 36.0]), np.array([0.3, 0.4, 0.45, 0.47])
    one = fit_learning_curve(x, y, [0.02] * 4, rng=rng(5))
    other = fit_learning_curve(x, y, [0.02] * 4, rng=rng(5))
    back = fit_learning_curve(x[::-1], y[::-1], [0.02] * 4, rng=rng(5))
    assert one is not None
    assert other is not None
    assert back is not None
    assert forecast(one, 9) == forecast(other, 9)
    assert (back.c, back.a, back.b) == pytest.approx((one.c, one.a, one.b))


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ShapeError, match="one of each a point"):
        fit_learning_curve([1, 2, 3], [0.1, 0.2], [0.1] * 3, rng=rng())
    with pytest.raises(NonFiniteError, match="a score of the learning curve is nan"):
        fit_learning_curve([1, 2, 3], [0.1, np.nan, 0.2], [0.1] * 3, rng=rng())
    with pytest.raises(InputError, match="costs above 0"):
        fit_learning_curve([0, 2, 3], [0.1, 0.2, 0.2], [0.1] * 3, rng=rng())
    with pytest.raises(InputError, match="resamples is 0"):
        fit_learning_curve([1, 2, 3], [0.1, 0.2, 0.2], [0.1] * 3, rng=rng(), resamples=0)
    with pytest.raises(InputError, match="more is -1"):
        forecast(None, -1)
    with pytest.raises(InputError, match="confidence is 1"):
        forecast(None, 1, confidence=1)
