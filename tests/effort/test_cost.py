"""Learnt seconds of an action."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from loop.config import EffortConfig
from loop.effort.cost import CostModel, Observation, fit_cost
from loop.effort.edits import Edits
from loop.errors import InputError, NonFiniteError

PRIOR = EffortConfig()
WEAK = EffortConfig(prior_images=1e-6)
TRUE = CostModel(15.0, 1.2, 10.0, 2.5, 20.0)


def work(n: int, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    """Images whose costs are TRUE's, times noise of mean 1."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        edits = Edits(*rng.poisson([20, 4, 2, 4]).tolist())
        found.append(Observation(edits, TRUE.seconds(edits) * rng.lognormal(-(noise**2) / 2, noise)))
    return found


def costs(model: CostModel) -> np.ndarray:
    return np.array(astuple(model)[:5])


def test_seconds_of_an_image_by_hand() -> None:
    assert TRUE.seconds(Edits(kept=10, edited=1, deleted=2, added=0.5)) == 15 + 12 + 10 + 5 + 10
    assert TRUE.seconds(Edits(0, 0, 0, 0)) == 15


def test_without_observations_it_is_the_prior() -> None:
    assert fit_cost([], PRIOR) == CostModel.prior(PRIOR) == CostModel(8.0, 0.5, 6.0, 1.5, 8.0, 0)


def test_exact_costs_come_back_without_noise() -> None:
    fitted = fit_cost(work(40), WEAK)

    np.testing.assert_allclose(costs(fitted), costs(TRUE), rtol=1e-5)
    assert fitted.images == 40


def test_costs_agree_with_scipy_where_nothing_is_robust_about_them() -> None:
    """With equal images and small noise the weights are equal and Huber's loss is the square: bounded least squares."""
    edits = Edits(5, 1, 1, 1)
    seconds = [CostModel.prior(PRIOR).seconds(edits) * f for f in (1.02, 1.03, 1.04, 1.05)]

    fitted = fit_cost([Observation(edits, s) for s in seconds], PRIOR)

    counts = np.array([[1.0, *edits]] * 4)
    weights = 1 / (counts @ costs(fitted))
    pull = np.sqrt(10.0) / 5
    rows = np.concatenate([counts * weights[:, None], np.diag(pull / costs(CostModel.prior(PRIOR)))])
    best = lsq_linear(rows, np.concatenate([np.array(seconds) * weights, np.full(5, pull)]), (0, np.inf))
    np.testing.assert_allclose(costs(fitted), best.x, rtol=1e-4)


def test_an_action_that_was_never_seen_keeps_its_prior() -> None:
    fitted = fit_cost([Observation(Edits(3, 0, 0, 4), 120.0)] * 20, PRIOR)

    assert fitted.edit_s == pytest.approx(PRIOR.edit_s)
    assert fitted.delete_s == pytest.approx(PRIOR.delete_s)
    assert fitted.add_s > PRIOR.add_s


def test_the_prior_loses_weight_as_images_come_in() -> None:
    away = [np.abs(np.log(costs(fit_cost(work(n), PRIOR)) / costs(TRUE))).max() for n in (1, 10, 100, 1000)]

    assert away == sorted(away, reverse=True)
    assert away[-1] < 0.25


def test_no_cost_is_negative() -> None:
    """Kept cells that seem to save time cost nothing."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(50):
        edits = Edits(*rng.poisson([20, 4, 2, 4]).tolist())
        found.append(Observation(edits, 200 + 10 * edits.added - 4 * edits.kept + 0 * edits.edited))

    assert min(astuple(fit_cost(found, WEAK))) == 0


def test_a_lunch_break_moves_no_image_by_more_than_a_tenth() -> None:
    fair = work(30, noise=0.2)
    lunch = [*fair[:-1], fair[-1]._replace(seconds=fair[-1].seconds + 3600)]

    before, after = fit_cost(fair, PRIOR), fit_cost(lunch, PRIOR)

    for observation in fair:
        assert after.seconds(observation.edits) == pytest.approx(before.seconds(observation.edits), rel=0.1)
    # A week away pulls no harder than an hour.
    week = [*fair[:-1], fair[-1]._replace(seconds=604_800.0)]
    np.testing.assert_allclose(costs(fit_cost(week, PRIOR)), costs(after), rtol=0.01)


def test_one_measured_hour_alone_does_not_make_images_cost_an_hour() -> None:
    edits = Edits(20, 3, 2, 2)

    assert fit_cost([Observation(edits, 3600.0)], PRIOR).seconds(edits) < 2 * CostModel.prior(PRIOR).seconds(edits)


def test_a_prior_of_zero_seconds_is_taken() -> None:
    fitted = fit_cost([Observation(Edits(9, 0, 0, 0), 10.0)], EffortConfig(image_s=0, keep_s=0))

    assert fitted.image_s >= 0
    assert 0 < fitted.seconds(Edits(9, 0, 0, 0)) <= 10


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_seconds_that_are_no_number_are_refused_by_name(seconds: float) -> None:
    with pytest.raises(NonFiniteError, match="slide-7"):
        fit_cost([Observation(Edits(1, 0, 0, 0), seconds, "slide-7")], PRIOR)


def test_counts_that_are_no_number_are_refused_by_place() -> None:
    with pytest.raises(NonFiniteError, match="observation 1"):
        fit_cost([work(1)[0], Observation(Edits(1, math.nan, 0, 0), 5.0)], PRIOR)


@pytest.mark.parametrize(
    ("edits", "seconds"), [(Edits(1, 0, 0, 0), -1.0), (Edits(1, 0, 0, 0), 0.0), (Edits(-1, 0, 0, 0), 5)]
)
def test_negative_numbers_are_refused_by_name(edits: Edits, seconds: float) -> None:
    with pytest.raises(InputError, match="slide-7"):
        fit_cost([Observation(edits, seconds, "slide-7")], PRIOR)


edits_of = st.builds(Edits, *[st.integers(0, 300)] * 4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.builds(Observation, edits_of, st.floats(0.01, 1e6)), max_size=12))
def test_any_work_gives_finite_costs(observations: list[Observation]) -> None:
    fitted = fit_cost(observations, PRIOR)

    assert np.isfinite(costs(fitted)).all()
    assert (costs(fitted) >= 0).all()
    assert fitted.images == len(observations)


@settings(deadline=None, max_examples=30)
@given(edits_of, st.integers(0, 3))
def test_more_work_takes_longer(edits: Edits, which: int) -> None:
    more = edits._replace(**{edits._fields[which]: edits[which] + 1})

    assert TRUE.seconds(more) > TRUE.seconds(edits)
    assert replace(TRUE, images=3).seconds(edits) == TRUE.seconds(edits)
