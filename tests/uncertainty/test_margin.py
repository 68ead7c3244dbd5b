import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loop.uncertainty.entropy import binary_entropy
from loop.uncertainty.margin import binary_margin


@given(st.floats(0, 1, width=32))
def test_it_is_one_minus_the_gap_between_the_two_answers(p: float) -> None:
    best, second = sorted([p, 1 - p], reverse=True)
    np.testing.assert_allclose(binary_margin(np.array([p], np.float32)), [1 - (best - second)], atol=1e-6)


def test_entropy_and_margin_rise_towards_a_half_and_fall_beyond() -> None:
    probs = np.linspace(0, 1, 101, dtype=np.float32)
    for rising in (binary_entropy(probs), binary_margin(probs)):
        assert (np.diff(rising[:51]) > 0).all()
        assert (np.diff(rising[50:]) < 0).all()
        assert rising.dtype == np.float32
    np.testing.assert_array_equal(binary_margin(np.array([0, 0.5, 1], np.float32)), [0, 1, 0])


def test_nan_stays_nan() -> None:
    assert np.isnan(binary_margin(np.array([np.nan], np.float32))).all()
