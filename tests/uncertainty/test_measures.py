import numpy as np
import pytest

from loop.data.synthetic import draw_cells
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.masks import to_dense
from loop.types import Instances
from loop.uncertainty.measures import FROM_ONE_LOOK, FROM_SEVERAL_LOOKS, MEASURES, measures_of, measures_of_looks

LN2 = np.log(2)


def seen(seed: int = 0) -> tuple[np.ndarray, Instances]:
    rng = np.random.default_rng(seed)
    _, cells = draw_cells(rng, (48, 64), 6)
    return rng.random((48, 64), dtype=np.float32), cells


@pytest.mark.parametrize("seed", range(4))
def test_each_measure_by_brute_force(seed: int) -> None:
    p, cells = seen(seed)
    q = p.astype(np.float64)
    entropy = -q * np.log(q) - (1 - q) * np.log1p(-q)
    margin = 1 - np.abs(q - (1 - q))
    dense = to_dense(cells)
    inside = [entropy[mask].mean() for mask in dense]
    expected = {
        "entropy": entropy.mean(),
        "entropy_sum": entropy.sum(),
        "entropy_top": np.sort(entropy.ravel())[-round(0.05 * entropy.size) :].mean(),
        "entropy_foreground": entropy.sum() / dense.any(axis=0).sum(),
        "entropy_cells": np.mean(inside),
        "margin": np.mean([margin[mask].mean() for mask in dense]),
        "doubtful_cells": sum(value > 0.35 for value in inside),
    }
    got = measures_of(p, cells)
    assert tuple(got) == FROM_ONE_LOOK
    assert got == pytest.approx(expected, rel=1e-5)
    assert (*FROM_ONE_LOOK, *FROM_SEVERAL_LOOKS) == MEASURES


def test_every_measure_rises_as_the_model_hesitates() -> None:
    _, cells = seen()
    inside = to_dense(cells).any(axis=0)
    found = []
    for sure in np.linspace(1, 0.5, 9):
        found.append(measures_of(np.where(inside, sure, 1 - sure).astype(np.float32), cells))
    for name in FROM_ONE_LOOK:
        rising = np.array([measures[name] for measures in found])
        assert rising[0] == pytest.approx(0, abs=1e-5)
        assert (np.diff(rising) >= 0).all() if name == "doubtful_cells" else (np.diff(rising) > 0).all()
    assert found[-1]["doubtful_cells"] == len(cells)


def test_an_empty_image() -> None:
    half = np.full((4, 5), 0.5, np.float32)
    got = measures_of(half, Instances.build((4, 5)))
    expected = {"entropy_sum": 20 * LN2, "entropy_foreground": LN2 / 0.05, "margin": 1, "doubtful_cells": 0}
    assert got == pytest.approx(dict.fromkeys(FROM_ONE_LOOK, LN2) | expected)


def test_nan_is_refused_with_the_image_named() -> None:
    p = np.full((4, 5), 0.5, np.float32)
    p[1, 1] = np.nan
    with pytest.raises(NonFiniteError, match="plate-7"):
        measures_of(p, Instances.build((4, 5), image_id="plate-7"))
    with pytest.raises(NonFiniteError, match="plate-7"):
        measures_of_looks(np.stack([p, p]), [Instances.build((4, 5), image_id="plate-7")] * 2)


def test_several_looks_by_hand() -> None:
    """One cell of two pixels that the looks dispute, one that both are sure of."""
    cells = Instances.build((2, 4), [(0, 0, 2, 1), (2, 1, 4, 2)], [np.ones((1, 2), bool)] * 2)
    looks = np.zeros((2, 2, 4), np.float32)
    looks[0, 0, :2] = 1
    looks[:, 1, 2:] = 1
    got = measures_of_looks(looks, [cells, cells.take([1])])
    assert tuple(got) == FROM_SEVERAL_LOOKS
    assert got["bald"] == pytest.approx((LN2 + 0) / 2, abs=1e-6)
    assert got["disagreement"] == pytest.approx(1 - (0.5 + 1) / 2)


def test_looks_that_see_no_cell_count_over_the_frame() -> None:
    looks = np.zeros((2, 2, 4), np.float32)
    looks[0, 0, 0] = 1
    none = Instances.build((2, 4))
    assert measures_of_looks(looks, [none, none]) == pytest.approx({"bald": LN2 / 8, "disagreement": 0}, abs=1e-6)


def test_maps_and_cells_of_different_looks_are_refused() -> None:
    none = Instances.build((2, 4))
    with pytest.raises(ShapeError, match="2 maps"):
        measures_of_looks(np.zeros((2, 2, 4), np.float32), [none])
    with pytest.raises(ShapeError, match=r"\(2, 5\)"):
        measures_of_looks(np.zeros((1, 2, 5), np.float32), [none])
    with pytest.raises(InputError, match="at least one"):
        measures_of_looks(np.zeros((0, 2, 4), np.float32), [])
