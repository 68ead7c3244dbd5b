import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.metrics.calibration import Bin, brier_error, expected_calibration_error, reliability, spearman

SAID = [0.05, 0.15, 0.85, 0.95, 1.0, 0.5]
SO = [False, True, True, True, False, True]


def test_reliability_by_hand():
    table = reliability(SAID, SO, bins=2)
    assert table[0] == Bin(0.0, 0.5, 2, pytest.approx(0.1), 0.5)
    assert table[1] == Bin(0.5, 1.0, 4, pytest.approx(0.825), 0.75)


def test_calibration_error_by_hand():
    # two bins: |0.1 - 0.5| of two cells, |0.825 - 0.75| of four
    assert expected_calibration_error(SAID, SO, bins=2) == pytest.approx((2 * 0.4 + 4 * 0.075) / 6)
    # three bins of two cells: 0.05 0.15 | 0.5 0.85 | 0.95 1.0
    by_mass = (2 * abs(0.1 - 0.5) + 2 * abs(0.675 - 1) + 2 * abs(0.975 - 0.5)) / 6
    assert expected_calibration_error(SAID, SO, bins=3, binning="mass") == pytest.approx(by_mass)


def test_equal_confidences_share_a_bin_of_equal_mass():
    table = reliability([0.3] * 8, [True] * 2 + [False] * 6, bins=4, binning="mass")
    assert table == [Bin(pytest.approx(0.3), 1.0, 8, pytest.approx(0.3), 0.25)]


def test_brier_by_hand():
    assert brier_error([0.2, 0.9], [True, True]) == pytest.approx((0.64 + 0.01) / 2)
    assert brier_error([1, 0], [True, False]) == 0
    assert brier_error([1, 0], [False, True]) == 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 40), values=st.integers(2, 50))
def test_spearman_is_scipys(seed, n, values):
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, values, n), rng.integers(0, values, n)
    if len(set(one.tolist())) > 1 and len(set(other.tolist())) > 1:
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_spearman_of_what_has_no_order_is_nothing():
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    assert spearman([], []) == 0
    assert spearman([1], [1]) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=50), st.integers(1, 12))
def test_every_cell_is_in_one_bin(pairs, bins):
    said, so = [p for p, _ in pairs], [q for _, q in pairs]
    for binning in ("width", "mass"):
        table = reliability(said, so, bins=bins, binning=binning)
        assert sum(row.cells for row in table) == len(pairs)
        assert len(table) <= bins
        assert all(row.low - 1e-9 <= row.confidence <= row.high + 1e-9 for row in table)
        assert 0 <= expected_calibration_error(said, so, bins=bins, binning=binning) <= 1


def test_nothing_has_no_error():
    assert reliability([], []) == []
    assert reliability([], [], binning="mass") == []
    assert expected_calibration_error([], []) == 0
    assert brier_error([], []) == 0


def test_what_is_no_confidence_is_refused():
    with pytest.raises(InputError, match=r"1\.5"):
        brier_error([0.5, 1.5], [True, True])
    with pytest.raises(NonFiniteError, match="number 1"):
        reliability([0.5, float("nan")], [True, True])
    with pytest.raises(ShapeError, match="one a cell"):
        reliability([0.5], [True, True])
    with pytest.raises(InputError, match="bins=0"):
        reliability([0.5], [True], bins=0)
