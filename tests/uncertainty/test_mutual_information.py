import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy

from loop.errors import ShapeError
from loop.uncertainty.mutual_information import mutual_information

PROBS = arrays(np.float32, st.tuples(st.integers(1, 6), st.just(2), st.just(3)), elements=st.floats(0, 1, width=32))


@settings(deadline=None)
@given(PROBS)
def test_it_equals_the_entropies_of_scipy_and_stays_in_its_range(probs: np.ndarray) -> None:
    got = mutual_information(probs)
    p = probs.astype(np.float64)
    mean = p.mean(axis=0)
    expected = entropy([mean, 1 - mean]) - entropy(np.stack([p, 1 - p])).mean(axis=0)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert (got.shape, got.dtype) == ((2, 3), np.float32)
    assert got.min() >= 0
    assert got.max() <= np.float32(np.log(2))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_looks_that_agree_have_none_however_unsure_they_are(p: float, m: int) -> None:
    np.testing.assert_allclose(mutual_information(np.full((m, 2, 2), p, np.float32)), 0, atol=1e-6)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_half_say_no_and_half_say_yes(m: int) -> None:
    probs = np.zeros((m, 1, 1), np.float32)
    probs[::2] = 1
    np.testing.assert_allclose(mutual_information(probs), np.log(2), atol=1e-7)


def test_it_rises_as_two_looks_part() -> None:
    apart = np.linspace(0, 0.5, 30, dtype=np.float32)
    got = mutual_information(np.stack([0.5 - apart, 0.5 + apart])[:, None])
    assert (np.diff(got[0]) > 0).all()


def test_nan_stays_nan_and_no_looks_are_refused() -> None:
    probs = np.full((2, 1, 2), 0.5, np.float32)
    probs[1, 0, 0] = np.nan
    assert np.isnan(mutual_information(probs)).tolist() == [[True, False]]
    for shape in ((0, 2, 2), (2, 2)):
        with pytest.raises(ShapeError, match="M of 1 or more"):
            mutual_information(np.zeros(shape, np.float32))
