import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from loop.config import InstanceConfig
from loop.errors import ShapeError
from loop.labelstudio.results import Prompts
from loop.masks import from_masks, to_dense
from loop.models.apart import leave_out
from loop.models.click import Scene, cell_at

SHAPE = (20, 30)


def square(y0, x0, y1, x1):
    mask = np.zeros(SHAPE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def left(cell, *others):
    found = leave_out(from_masks([cell], SHAPE), from_masks(others, SHAPE))
    return to_dense(found)[0] if len(found) else None


CELL = square(5, 5, 15, 15)


def test_a_neighbour_that_is_reached_into_keeps_its_pixels():
    np.testing.assert_array_equal(left(CELL, square(5, 13, 15, 23)), square(5, 5, 15, 13))


def test_what_lies_mostly_inside_is_replaced():
    inner = square(8, 8, 12, 12)
    np.testing.assert_array_equal(left(CELL, inner), CELL)
    np.testing.assert_array_equal(left(CELL, square(6, 13, 8, 17)), CELL)  # half of it
    np.testing.assert_array_equal(left(CELL, square(6, 13, 8, 18)), CELL & ~square(6, 13, 8, 18))  # two fifths


def test_a_part_of_a_drawn_clump_is_not_eaten_by_it():
    np.testing.assert_array_equal(left(CELL, square(5, 5, 15, 29)), CELL)


def test_the_largest_piece_stays():
    wall = square(0, 8, 20, 10) | square(0, 0, 2, 8)
    np.testing.assert_array_equal(left(CELL, wall), square(5, 10, 15, 15))


def test_nothing_may_be_left():
    assert left(CELL, square(0, 0, 20, 9), square(0, 9, 8, 30), square(8, 9, 20, 30)) is None


def test_no_cell_no_others_and_everything_else_stays():
    none = from_masks([], SHAPE)
    cell = from_masks([CELL], SHAPE, scores=[0.7], labels=[2], image_id="a", source="model", model_version="m-v1")
    assert len(leave_out(none, from_masks([CELL], SHAPE))) == 0
    np.testing.assert_array_equal(to_dense(leave_out(cell, none))[0], CELL)
    cut = leave_out(cell, from_masks([square(5, 13, 15, 23)], SHAPE))
    assert (cut.scores[0], cut.labels[0]) == (pytest.approx(0.7), 2)
    assert (cut.image_id, cut.source, cut.model_version) == ("a", "model", "m-v1")
    with pytest.raises(ShapeError, match="same image"):
        leave_out(cell, from_masks([], (5, 5)))


@st.composite
def blobs(draw):
    y, x = draw(st.integers(0, 19)), draw(st.integers(0, 29))
    return square(y, x, draw(st.integers(y + 1, 20)), draw(st.integers(x + 1, 30)))


@settings(max_examples=150, deadline=None)
@given(blobs(), st.lists(blobs(), max_size=5))
def test_the_cell_minus_what_is_not_replaced(cell, others):
    expected = cell.copy()
    kept = [
        other for other in others if 2 * (other & cell).sum() < other.sum() and 2 * (other & cell).sum() < cell.sum()
    ]
    for other in kept:
        expected &= ~other
    found = left(cell, *others)
    assert all(found is None or not (found & other).any() for other in kept)
    pieces, n = ndimage.label(expected, np.ones((3, 3)))
    if n == 0:
        assert found is None
    else:
        sizes = np.bincount(pieces.ravel())[1:]
        assert found.sum() == sizes.max()
        assert len(np.unique(pieces[found])) == 1
        assert (expected | ~found).all()


def test_pieces_on_screen_are_merged_by_a_box_and_their_neighbour_keeps_its_pixels():
    pieces, neighbour = [square(5, 5, 15, 10), square(5, 11, 15, 16)], square(5, 16, 15, 26)
    probs = np.full((2, *SHAPE), 0.01, np.float32)
    probs[0][5:15, 5:18] = 0.95  # the model reaches 2 px into the neighbour
    box = Prompts(np.zeros((0, 2)), np.zeros(0, bool), np.array([[4.0, 4, 19, 16]]), "Cell")
    found = cell_at(Scene(probs), box, InstanceConfig())
    apart = leave_out(found, from_masks([*pieces, neighbour], SHAPE))
    np.testing.assert_array_equal(to_dense(apart)[0], square(5, 5, 15, 16))


def test_a_drawn_clump_is_divided_by_a_negative_point():
    clump = square(5, 2, 15, 26)
    probs = np.full((2, *SHAPE), 0.01, np.float32)
    probs[0][clump] = 0.95
    points = Prompts(np.array([[6.0, 10], [21.0, 10]]), np.array([True, False]), np.zeros((0, 4)), "Cell")
    found = cell_at(Scene(probs), points, InstanceConfig())
    half = to_dense(leave_out(found, from_masks([clump], SHAPE)))[0]
    assert 0.4 < half.sum() / clump.sum() < 0.6
