"""What a person did to offered cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.effort.edits import Edits, compare, count_edits
from loop.errors import InputError, ShapeError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import from_results, to_results
from loop.metrics.matching import iou_matrix
from loop.types import Instances

SHAPE = (40, 40)


def squares(*corners_and_sides: tuple[int, int, int], labels: list[int] | None = None) -> Instances:
    boxes = [(x, y, x + side, y + side) for x, y, side in corners_and_sides]
    masks = [np.ones((side, side), bool) for _, _, side in corners_and_sides]
    scores = np.linspace(0.5, 1, len(boxes)) if boxes else None
    return Instances.build(SHAPE, boxes, masks, labels=labels, scores=scores)


def test_one_of_each() -> None:
    offered = squares((0, 0, 10), (20, 0, 10), (0, 20, 10))
    drawn = squares((21, 0, 10), (20, 20, 8), (0, 0, 10))

    outcome = compare(offered, drawn)

    assert outcome.edits == Edits(kept=1, edited=1, deleted=1, added=1)
    assert outcome.kept.tolist() == [True, False, False]
    assert outcome.edited.tolist() == [False, True, False]
    assert outcome.added.tolist() == [False, True, False]
    # The second moved by one of ten columns: 90 px of 110 are common.
    np.testing.assert_allclose(outcome.iou, [1, 90 / 110, 0])
    assert outcome.scores is offered.scores
    assert count_edits(offered, drawn) == outcome.edits


def test_nothing_offered_nothing_drawn() -> None:
    none, two = squares(), squares((0, 0, 5), (10, 10, 5))

    assert count_edits(none, none) == Edits(0, 0, 0, 0)
    assert count_edits(none, two) == Edits(0, 0, 0, 2)
    assert count_edits(two, none) == Edits(0, 0, 2, 0)


def test_a_cell_under_another_class_was_edited() -> None:
    assert count_edits(squares((0, 0, 9), labels=[0]), squares((0, 0, 9), labels=[1])) == Edits(0, 1, 0, 0)


def test_a_cell_that_nobody_touched_stays_its_own_partner() -> None:
    # The untouched cell could be given to its larger neighbour and the new one to it, which makes two pairs.
    offered = squares((0, 0, 10), (0, 0, 13))
    drawn = squares((0, 0, 10), (0, 0, 8))

    assert compare(offered, drawn).kept.tolist() == [True, False]
    assert count_edits(offered, drawn) == Edits(1, 0, 1, 1)


def test_thresholds_are_inclusive() -> None:
    offered, drawn = squares((0, 0, 10)), Instances.build(SHAPE, [(0, 0, 10, 9)], [np.ones((9, 10), bool)])

    assert count_edits(offered, drawn, kept_iou=0.9) == Edits(1, 0, 0, 0)
    assert count_edits(offered, drawn, kept_iou=0.91, same_iou=0.9) == Edits(0, 1, 0, 0)
    assert count_edits(offered, drawn, kept_iou=0.95, same_iou=0.91) == Edits(0, 0, 1, 1)


@pytest.mark.parametrize(("same", "kept"), [(0, 0.9), (0.95, 0.9), (0.5, 1.1), (float("nan"), 0.9)])
def test_thresholds_out_of_range_are_refused(same: float, kept: float) -> None:
    with pytest.raises(InputError, match="same_iou"):
        count_edits(squares(), squares(), same_iou=same, kept_iou=kept)


def test_cells_of_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(ShapeError):
        count_edits(squares(), Instances.build((8, 8)))


cells = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(2, 14)), max_size=8)


@settings(deadline=None, max_examples=80)
@given(cells, cells)
def test_every_cell_is_counted_once(before: list[tuple[int, int, int]], after: list[tuple[int, int, int]]) -> None:
    offered, drawn = squares(*before), squares(*after)

    outcome = compare(offered, drawn)
    kept, edited, deleted, added = outcome.edits

    assert kept + edited + deleted == len(offered)
    assert kept + edited + added == len(drawn)
    assert not (outcome.kept & outcome.edited).any()
    assert compare(offered, offered).kept.all()
    assert (kept, edited) == brute_force(iou_matrix(offered, drawn))


def brute_force(iou: np.ndarray) -> tuple[int, int]:
    """Takes the best pair that is left, again and again."""
    left, kept, edited = iou.copy(), 0, 0
    while left.size and left.max() >= 0.5:
        row, column = np.unravel_index(int(left.argmax()), left.shape)
        kept, edited = (kept + 1, edited) if left[row, column] >= 0.9 else (kept, edited + 1)
        left[row], left[:, column] = -1, -1
    return kept, edited


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_small_cells_that_were_accepted_count_as_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    radii = rng.uniform(2.6, 6, (4, 2))  # 21 px and more
    rows, columns = np.mgrid[:15, :15] - 7
    masks = [(rows / ry) ** 2 + (columns / rx) ** 2 <= 1 for ry, rx in radii]
    offered = Instances.build(SHAPE, [(x, y, x + 15, y + 15) for x in (0, 20) for y in (0, 20)], masks)
    interface = Interface.parse(label_config())

    drawn = from_results(to_results(offered, interface), interface, SHAPE).instances

    assert count_edits(offered, drawn) == Edits(4, 0, 0, 0)
