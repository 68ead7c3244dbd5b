import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loop.effort.edits import Edits
from loop.effort.summary import Piece, share, summarise


def test_the_figures_of_three_annotations_by_hand():
    found = summarise(
        [
            Piece(Edits(6, 2, 2, 1), 0.8, 30.0, predicted=True),
            Piece(Edits(8, 1, 1, 3), 0.5, None, predicted=True),
            Piece(Edits(0, 0, 0, 5), None, 55.0, predicted=False),
        ]
    )
    assert (found.images, found.offered) == (3, 20)
    assert (found.kept.mean, found.edited.mean, found.deleted.mean) == (14 / 20, 3 / 20, 3 / 20)
    assert found.edited_iou == pytest.approx((2 * 0.8 + 0.5) / 3)
    assert found.added_per_image == 2.0
    assert found.seconds_per_cell == (30 + 55) / (6 + 2 + 1 + 5)


def test_what_was_drawn_from_nothing_says_nothing_of_models():
    found = summarise([Piece(Edits(0, 0, 0, 4), None, 20.0, predicted=False)])
    assert (found.kept, found.edited, found.deleted, found.edited_iou, found.added_per_image) == (None,) * 5
    assert found.seconds_per_cell == 5.0
    assert summarise([]).images == 0
    assert summarise([Piece(Edits(0, 0, 0, 0), None, 9.0, predicted=True)]).seconds_per_cell is None


@pytest.mark.parametrize(("hits", "n"), [(3, 10), (0, 10), (10, 10), (1, 2)])
def test_one_cell_an_image_is_wilsons_interval(hits, n):
    found = share([1] * hits + [0] * (n - hits), [1] * n)
    p = hits / n
    # The shares that lie 1.96 of their own deviations from p; between images it is estimated with n - 1.
    z2 = stats.norm.ppf(0.975) ** 2 / (n - 1 if 0 < p < 1 else n)
    assert sorted(np.roots([1 + z2, -(2 * p + z2), p**2])) == pytest.approx([found.low, found.high], abs=1e-6)


def test_cells_of_one_image_count_as_ten():
    found = share([300], [300])
    interval = stats.binomtest(10, 10).proportion_ci(0.95, "wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, interval.low, 1.0), abs=1e-6)


def test_images_that_differ_widen_the_interval():
    alike, different = share([30, 31, 29, 30], [60] * 4), share([2, 58, 1, 59], [60] * 4)
    assert alike.mean == different.mean
    assert different.high - different.low > 1.5 * (alike.high - alike.low)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        cells = rng.integers(20, 80, 25)
        found = share(rng.binomial(cells, rng.beta(7, 3, 25)).tolist(), cells.tolist())
        held += found.low <= 0.7 <= found.high
    assert 0.91 <= held / 600 <= 0.985


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted), max_size=8))
def test_the_share_lies_in_its_interval(images):
    found = share([hits for hits, _ in images], [cells for _, cells in images])
    if not sum(cells for _, cells in images):
        assert found is None
    else:
        assert 0 <= found.low <= found.mean <= found.high <= 1
