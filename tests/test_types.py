import numpy as np
import pytest

from loop.errors import ShapeError
from loop.types import Instances


def square(shape=(10, 12), box=(2, 3, 5, 7), **fields):
    x0, y0, x1, y1 = box
    return Instances.build(shape, [box], [np.ones((y1 - y0, x1 - x0), bool)], **fields)


def test_build_fills_in_defaults():
    cells = square(image_id="a")
    assert len(cells) == 1
    assert cells.boxes_xyxy.dtype == np.int32
    assert (cells.scores.tolist(), cells.labels.tolist(), cells.weights.tolist()) == ([1.0], [0], [1.0])
    assert (cells.image_id, cells.source, cells.model_version) == ("a", "human", "")


def test_no_cells_is_allowed():
    cells = Instances.build((4, 5))
    assert len(cells) == 0
    assert cells.boxes_xyxy.shape == (0, 4)
    assert cells.take([]).shape == (4, 5)


def test_a_cell_may_fill_the_image():
    assert len(square(box=(0, 0, 12, 10))) == 1


@pytest.mark.parametrize("box", [(0, 0, 13, 10), (0, 0, 12, 11), (-1, 0, 3, 3), (3, 3, 3, 5)])
def test_a_box_outside_the_image_or_empty_is_refused(box):
    with pytest.raises(ShapeError, match="expected 0 <= x0"):
        square(box=box)


def test_a_mask_of_another_size_than_its_box_is_refused():
    with pytest.raises(ShapeError, match=r"mask 0 is \(2, 2\); its box asks for \(4, 3\)"):
        Instances.build((10, 12), [(2, 3, 5, 7)], [np.ones((2, 2), bool)])


@pytest.mark.parametrize("field", ["scores", "labels", "weights"])
def test_every_mask_needs_one_entry_of_each_field(field):
    with pytest.raises(ShapeError, match=field):
        square(**{field: [1, 0]})


def test_boxes_and_masks_must_be_as_many():
    with pytest.raises(ShapeError, match="boxes_xyxy"):
        Instances.build((10, 12), [], [np.ones((2, 2), bool)])


def test_take_keeps_order_repeats_and_origin():
    cells = Instances.build(
        (9, 9),
        [(0, 0, 1, 1), (1, 1, 3, 3), (4, 4, 5, 6)],
        [np.ones((1, 1), bool), np.eye(2, dtype=bool), np.ones((2, 1), bool)],
        scores=[0.1, 0.2, 0.3],
        labels=[0, 1, 2],
        weights=[1.0, 0.5, 0.25],
        image_id="a",
        source="model",
        model_version="m-v1",
    )
    taken = cells.take([2, 0, 2])
    assert taken.labels.tolist() == [2, 0, 2]
    assert taken.boxes_xyxy.tolist() == [[4, 4, 5, 6], [0, 0, 1, 1], [4, 4, 5, 6]]
    assert taken.weights.tolist() == [0.25, 1.0, 0.25]
    np.testing.assert_allclose(taken.scores, [0.3, 0.1, 0.3])
    assert (taken.image_id, taken.source, taken.model_version) == ("a", "model", "m-v1")
    assert len(cells) == 3
