from collections.abc import Callable

import numpy as np
import pytest

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.types import Instances
from loop.uncertainty.aggregate import (
    cell_means,
    covered,
    mean_of_top,
    mean_over_cells,
    mean_over_frame,
    sum_over_frame,
    sum_per_foreground,
)

ALL: list[Callable[..., object]] = [
    cell_means,
    mean_of_top,
    mean_over_cells,
    mean_over_frame,
    sum_over_frame,
    sum_per_foreground,
]


def two_cells(image_id="plate-7"):
    return Instances.build(
        (4, 6),
        [(0, 0, 2, 2), (4, 0, 6, 4)],
        [np.ones((2, 2), bool), np.array([[1, 0]] * 4, bool)],
        image_id=image_id,
    )


def test_each_cell_counts_alike_by_hand():
    uncertainty = np.zeros((4, 6), np.float32)
    uncertainty[:2, :2] = [[0.1, 0.2], [0.3, 0.4]]
    uncertainty[:, 4] = 0.5
    uncertainty[:, 5] = 0.6
    assert mean_over_cells(uncertainty, two_cells()) == pytest.approx((0.25 + 0.5) / 2)
    assert cell_means(uncertainty, two_cells()) == pytest.approx([0.25, 0.5])


def test_without_cells_it_is_the_mean_of_the_frame():
    uncertainty = np.linspace(0, 0.6, 24, dtype=np.float32).reshape(4, 6)
    assert mean_over_cells(uncertainty, Instances.build((4, 6))) == pytest.approx(0.3, abs=1e-6)
    assert cell_means(uncertainty, Instances.build((4, 6))).shape == (0,)


def test_a_cell_without_a_pixel_has_no_uncertainty():
    cells = Instances.build((4, 6), [(0, 0, 2, 2)], [np.zeros((2, 2), bool)])
    assert mean_over_cells(np.ones((4, 6), np.float32), cells) == 0


def test_the_frame_by_hand():
    uncertainty = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert mean_over_frame(uncertainty, two_cells()) == 11.5
    assert sum_over_frame(uncertainty, two_cells()) == 276
    assert sum_per_foreground(uncertainty, two_cells()) == 276 / 8
    assert sum_per_foreground(uncertainty, Instances.build((4, 6))) == pytest.approx(276 / (0.05 * 24))


def test_an_image_surely_empty_does_not_come_before_an_uncertain_one() -> None:
    box = [(0, 0, 40, 40)]
    full = Instances.build((100, 100), box, [np.ones((40, 40), bool)])
    speck = Instances.build((100, 100), [(90, 90, 91, 91)], [np.ones((1, 1), bool)])
    doubtful = np.zeros((100, 100), np.float32)
    doubtful[:40, :40] = 0.5
    sure = np.full((100, 100), 0.01, np.float32)
    for nothing in (Instances.build((100, 100)), speck):
        assert sum_per_foreground(sure, nothing) == pytest.approx(0.01 / 0.05)
    assert sum_per_foreground(doubtful, full) == 0.5


def test_overlapping_cells_cover_a_pixel_once():
    one = two_cells()
    twice = one.take([0, 0, 1, 1])
    assert np.array_equal(covered(one), covered(twice))
    assert covered(one).sum() == 8
    assert not covered(Instances.build((4, 6))).any()


@pytest.mark.parametrize(("share", "expected"), [(1, 11.5), (0.25, 20.5), (0.1, 22.5), (0.001, 23.0)])
def test_the_most_uncertain_pixels_alone(share, expected):
    uncertainty = np.random.default_rng(0).permutation(24).astype(np.float32).reshape(4, 6)
    assert mean_of_top(uncertainty, two_cells(), share=share) == expected


def test_a_share_out_of_its_range_is_refused():
    for share in (0, 1.5, np.nan):
        with pytest.raises(InputError, match="share"):
            mean_of_top(np.zeros((4, 6), np.float32), two_cells(), share=share)


@pytest.mark.parametrize("aggregate", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_refused_with_the_image_named(aggregate, bad):
    uncertainty = np.zeros((4, 6), np.float32)
    uncertainty[3, 3] = bad
    with pytest.raises(NonFiniteError, match="plate-7"):
        aggregate(uncertainty, two_cells())


@pytest.mark.parametrize("aggregate", ALL)
def test_another_size_is_refused(aggregate):
    with pytest.raises(ShapeError, match=r"\(4, 5\).*\(4, 6\)"):
        aggregate(np.zeros((4, 5), np.float32), two_cells())


@pytest.mark.parametrize("aggregate", [mean_of_top, mean_over_cells, mean_over_frame, sum_over_frame])
def test_more_of_it_anywhere_that_counts_is_more(aggregate):
    uncertainty = np.full((4, 6), 0.1, np.float32)
    found = []
    for _ in range(4):
        uncertainty[0, 0] += 0.1
        found.append(aggregate(uncertainty, two_cells()))
    assert (np.diff(found) > 0).all()
