import numpy as np
import pytest

from loop.config import PseudoConfig
from loop.errors import NonFiniteError, ShapeError
from loop.masks import from_masks, to_dense
from loop.pseudo.lesson import known_ground, shown, teach
from loop.types import Instances, Origin

CONFIG = PseudoConfig(keep=0.7, doubt=0.2, sure_share=0.5)
SHAPE = (20, 30)
CENTRES = (2.5, 9.5, 16.5, 23.5)


def cells():
    """Four cells of 4 x 4 px in a row, at columns 1, 8, 15 and 22."""
    masks = np.zeros((4, *SHAPE), bool)
    for i, x in enumerate((1, 8, 15, 22)):
        masks[i, 5:9, x : x + 4] = True
    found = from_masks(list(masks), SHAPE, scores=[0.1, 0.2, 0.3, 0.4], image_id="a", source="pseudo")
    return Instances.build(
        SHAPE,
        found.boxes_xyxy,
        found.masks,
        labels=[0, 1, 0, 1],
        image_id="a",
        source="pseudo",
        origins=[Origin("pseudo", f"sam:{i}") for i in range(4)],
    )


SURE = np.array([0.9, 0.5, 0.1, 0.7], np.float32)


def test_sure_cells_teach_doubtful_ones_are_ignored_hopeless_ones_left_out():
    lesson = teach(cells(), SURE, CONFIG)
    np.testing.assert_allclose(lesson.weights, [0.9, 0, 0.7])
    np.testing.assert_allclose(lesson.scores, [0.9, 0.5, 0.7])
    np.testing.assert_array_equal(lesson.labels, [0, 1, 1])
    assert [origin.by for origin in lesson.origins] == ["sam:0", "sam:1", "sam:3"]
    assert lesson.source == "pseudo"
    assert lesson.image_id == "a"


def test_the_thresholds_themselves_belong_to_what_lies_above():
    lesson = teach(cells(), np.float32([0.75, 0.25, 0.5, 0.25]), PseudoConfig(keep=0.5, doubt=0.25))
    np.testing.assert_allclose(lesson.weights, [0.75, 0, 0.5, 0])


def test_ground_is_known_around_what_teaches_and_unknown_around_what_does_not():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    gap = np.array([np.hypot(np.maximum(abs(x - c) - 1.5, 0), np.maximum(abs(y - 6.5) - 1.5, 0)) for c in CENTRES])
    near, doubtful = np.minimum(gap[0], gap[3]) <= 5, np.minimum(gap[1], gap[2])
    config = CONFIG.model_copy(update={"ground_px": 5})
    for margin in (0, 2):
        known = known_ground(cells(), SURE, config, margin_px=margin)
        taught = np.minimum(gap[0], gap[3]) == 0
        np.testing.assert_array_equal(known, near & ~(doubtful <= margin) | taught)
    assert not known_ground(cells(), np.zeros(4, np.float32), config).any()


def test_the_margin_of_a_doubtful_cell_leaves_a_sure_neighbour_known():
    masks = np.zeros((2, *SHAPE), bool)
    masks[0, 5:9, 5:9] = masks[1, 5:9, 9:13] = True
    known = known_ground(from_masks(list(masks), SHAPE), np.float32([0.9, 0.3]), CONFIG)
    assert known[masks[0]].all()
    assert not known[masks[1]].any()


def test_shown_is_all_but_the_hopeless_with_its_confidence():
    found = shown(cells(), SURE, CONFIG)
    np.testing.assert_allclose(found.scores, [0.9, 0.5, 0.7])
    np.testing.assert_array_equal(found.weights, [1, 1, 1])
    np.testing.assert_array_equal(to_dense(found), to_dense(cells())[[0, 1, 3]])


@pytest.mark.parametrize("function", [teach, shown])
def test_no_cells_are_no_lesson(function):
    assert len(function(Instances.build(SHAPE), np.zeros(0, np.float32), CONFIG)) == 0
    assert not known_ground(Instances.build(SHAPE), np.zeros(0, np.float32), CONFIG).any()
    assert known_ground(Instances.build((0, 0)), np.zeros(0, np.float32), CONFIG).shape == (0, 0)


@pytest.mark.parametrize("function", [teach, shown, known_ground])
def test_confidences_that_do_not_fit_are_refused(function):
    with pytest.raises(ShapeError, match="4 cells"):
        function(cells(), SURE[:3], CONFIG)
    with pytest.raises(NonFiniteError, match="'a'"):
        function(cells(), np.float32([0.5, np.nan, 0.5, 0.5]), CONFIG)


def test_an_image_of_mostly_doubtful_cells_teaches_nothing():
    doubtful = np.array([0.9, 0.6, 0.5, 0.3], np.float32)  # 0.9 of 2.3 cells to be expected
    assert not teach(cells(), doubtful, CONFIG).weights.any()
    laxer = CONFIG.model_copy(update={"sure_share": 0.39})
    np.testing.assert_allclose(teach(cells(), doubtful, laxer).weights, [0.9, 0, 0, 0])
