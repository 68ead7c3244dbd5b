import numpy as np
import pytest

from loop.errors import NonFiniteError, ShapeError
from loop.types import Instances
from loop.uncertainty.aggregate import mean_over_cells


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


def test_without_cells_it_is_the_mean_of_the_frame():
    uncertainty = np.linspace(0, 0.6, 24, dtype=np.float32).reshape(4, 6)
    assert mean_over_cells(uncertainty, Instances.build((4, 6))) == pytest.approx(0.3, abs=1e-6)


def test_nan_is_refused_with_the_image_named():
    uncertainty = np.zeros((4, 6), np.float32)
    uncertainty[3, 3] = np.nan
    with pytest.raises(NonFiniteError, match="plate-7"):
        mean_over_cells(uncertainty, two_cells())


def test_another_size_is_refused():
    with pytest.raises(ShapeError, match=r"\(4, 5\).*\(4, 6\)"):
        mean_over_cells(np.zeros((4, 5), np.float32), two_cells())
