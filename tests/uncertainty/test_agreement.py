from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.synthetic import draw_cells
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.masks import to_dense
from loop.types import Instances
from loop.uncertainty.agreement import agreement

SIDE = 10


def squares(*lefts: int, score: float = 1.0, top: int = 5, shape: tuple[int, int] = (40, 80)) -> Instances:
    """Squares of 10 x 10 px in one row, at these columns."""
    boxes = [(x, top, x + SIDE, top + SIDE) for x in lefts]
    masks = [np.ones((SIDE, SIDE), bool) for _ in lefts]
    return Instances.build(shape, boxes, masks, scores=[score] * len(lefts), image_id="well-C4", source="model")


def test_equal_looks_are_certain_but_for_their_scores() -> None:
    got = agreement([squares(5, 30, score=0.8)] * 3)
    np.testing.assert_allclose(got.certainty, [0.8, 0.8])
    assert got.disagreement == pytest.approx(0.2)
    np.testing.assert_array_equal(got.spatial, [1, 1])
    np.testing.assert_array_equal(got.occurrence, [1, 1])
    np.testing.assert_array_equal(to_dense(got.cells), to_dense(squares(5, 30)))


def test_the_three_certainties_by_hand() -> None:
    """Three looks: one square at columns 10 to 20, once moved by 2; a second square in one look alone."""
    got = agreement([squares(10, score=0.9), squares(12, score=0.6), squares(10, 50, score=0.9)])
    spatial = (1 + 80 / 120 + 1) / 3  # at least half of three observations: the unmoved square
    np.testing.assert_allclose(got.semantic, [0.8, 0.9], atol=1e-6)
    np.testing.assert_allclose(got.spatial, [spatial, 1])
    np.testing.assert_allclose(got.occurrence, [1, 1 / 3])
    np.testing.assert_allclose(got.certainty, [0.8 * spatial, 0.9 / 3], atol=1e-6)
    assert got.disagreement == pytest.approx(1 - (0.8 * spatial + 0.3) / 2, abs=1e-6)
    assert got.cells.boxes_xyxy[1].tolist() == [50, 5, 60, 15]
    assert (got.cells.image_id, got.cells.source) == ("well-C4", "model")


@pytest.mark.parametrize("m", [2, 3, 5, 8])
def test_it_rises_as_masks_shift(m: int) -> None:
    found = [agreement([squares(5), *[squares(5 + shift)] * (m - 1)]).disagreement for shift in range(12)]
    assert found[0] == 0
    assert (np.diff(found[:4]) > 0).all()  # beyond, IoU is below 0.5: two cells that some looks do not see
    assert (np.diff(found) >= -1e-12).all()
    assert found[-1] == pytest.approx(0.5)


def test_it_rises_as_cells_disappear() -> None:
    found = [agreement([squares(5, 30)] * (6 - gone) + [squares(30)] * gone).disagreement for gone in range(6)]
    assert (np.diff(found) > 0).all()
    assert found[3] == pytest.approx(1 - (0.5 + 1) / 2)


def test_it_rises_as_scores_fall() -> None:
    found = [agreement([squares(5, score=s), squares(6, score=s)]).disagreement for s in np.linspace(1, 0, 11)]
    assert (np.diff(found) > 0).all()
    assert found[-1] == 1


def test_images_without_cells_are_certain() -> None:
    got = agreement([squares(), squares()])
    assert (len(got.cells), got.disagreement) == (0, 0.0)
    assert agreement([squares(), squares(5)]).disagreement == pytest.approx(0.5)


def test_a_look_gives_one_observation_of_a_cell() -> None:
    got = agreement([squares(10), squares(10, 11)])
    np.testing.assert_array_equal(got.occurrence, [1, 0.5])
    assert got.spatial[0] == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 5))
def test_it_equals_a_count_over_whole_frames(seed: int, m: int) -> None:
    """Cells that do not touch, in each look moved by a pixel or left out: no doubt who belongs to whom."""
    rng = np.random.default_rng(seed)
    lefts = np.arange(3) * 25 + 5
    seen = rng.random((m, 3)) < 0.7
    moved = rng.integers(0, 3, (m, 3))
    scores = rng.random((m, 3)).astype(np.float32)
    looks = [replace(squares(*(lefts + moved[k])[seen[k]].tolist()), scores=scores[k][seen[k]]) for k in range(m)]
    expected = []
    for i in range(3):
        if not seen[:, i].any():
            continue
        frames = np.stack([to_dense(squares(int(lefts[i] + moved[k, i])))[0] for k in range(m) if seen[k, i]])
        middle = frames.mean(axis=0) >= 0.5
        iou = [(frame & middle).sum() / (frame | middle).sum() for frame in frames]
        expected.append(np.mean(iou) * scores[seen[:, i], i].mean() * seen[:, i].mean())
    got = agreement(looks)
    np.testing.assert_allclose(np.sort(got.certainty), np.sort(expected), atol=1e-6)
    assert got.disagreement == pytest.approx(1 - np.mean(expected) if expected else 0, abs=1e-6)


def test_crowded_looks_stay_in_range() -> None:
    looks = [draw_cells(np.random.default_rng(i), (64, 64), 8)[1] for i in range(4)]
    got = agreement(looks)
    assert got.certainty.min() > 0
    assert got.certainty.max() <= 1
    assert 0 <= got.disagreement <= 1
    assert got.occurrence.sum() * 4 == pytest.approx(sum(map(len, looks)))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        agreement([])
    with pytest.raises(InputError, match="threshold"):
        agreement([squares(5), squares(5)], same_cell=0)
    with pytest.raises(ShapeError, match=r"\(40, 90\)"):
        agreement([squares(5), squares(5, shape=(40, 90))])
    with pytest.raises(NonFiniteError, match="well-C4"):
        agreement([squares(5), squares(5, score=np.nan)])
