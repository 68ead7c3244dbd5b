import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from loop.uncertainty.entropy import LN2, binary_entropy


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_equals_scipy_and_stays_in_its_range(probs):
    got = binary_entropy(np.array(probs, np.float64))
    expected = [entropy([p, 1 - p]) for p in probs]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32
    assert got.min() >= 0
    assert got.max() <= np.float32(LN2)


def test_ends_and_middle():
    np.testing.assert_allclose(binary_entropy(np.array([0.0, 0.5, 1.0], np.float32)), [0, np.log(2), 0], atol=1e-7)


def test_nan_stays_nan():
    got = binary_entropy(np.array([np.nan, 0.5], np.float32))
    assert np.isnan(got[0])
    assert got[1] == pytest.approx(LN2)
