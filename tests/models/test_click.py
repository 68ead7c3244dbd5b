import numpy as np
import pytest

from loop.config import InstanceConfig
from loop.errors import NonFiniteError, ShapeError
from loop.labelstudio.results import Prompts
from loop.masks import from_masks, to_dense
from loop.models.click import Scene, cell_at, cell_near, cut_away

CONFIG = InstanceConfig()
SHAPE = (60, 90)


def disc(row, column, radius, shape=SHAPE):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


LEFT, RIGHT = disc(30, 20, 10), disc(30, 39, 10)
FAR = disc(30, 70, 8)


def picture(shape=SHAPE):
    """Three sure cells, the first two touching and parted by a predicted border."""
    probs = np.full((2, *shape), 0.01, np.float32)
    for cell in (LEFT, RIGHT, FAR):
        probs[0][cell] = 0.95
    probs[1][20:41, 29:31] = 0.9
    return probs


def prompts(positive=(), negative=(), boxes=()):
    """Points as (x, y), boxes as (x0, y0, x1, y1)."""
    points = [*positive, *negative]
    return Prompts(
        np.array(points, np.float64).reshape(-1, 2),
        np.array([True] * len(positive) + [False] * len(negative), bool),
        np.array(boxes, np.float64).reshape(-1, 4),
        "Cell",
    )


def mask_at(probs, given):
    found = cell_at(Scene(probs), given, CONFIG)
    assert len(found) == 1
    return to_dense(found)[0]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_point_gives_the_cell_under_it():
    found = cell_at(
        Scene(picture()), prompts([(70.4, 30.9)]), CONFIG, image_id="a", source="model", model_version="m-v2"
    )
    np.testing.assert_array_equal(to_dense(found)[0], FAR)
    assert (found.image_id, found.source, found.model_version) == ("a", "model", "m-v2")
    assert found.scores[0] == pytest.approx(0.95, abs=1e-4)


def test_touching_cells_are_told_apart():
    assert iou(mask_at(picture(), prompts([(15, 30)])), LEFT) > 0.9
    assert iou(mask_at(picture(), prompts([(44, 30)])), RIGHT) > 0.9


def test_a_point_just_beside_a_cell_means_it():
    np.testing.assert_array_equal(mask_at(picture(), prompts([(70, 19)])), FAR)


@pytest.mark.parametrize("point", [(5, 5), (89.9, 59.9), (-40, -3), (500, 500)])
def test_clear_background_gives_nothing(point):
    assert len(cell_at(Scene(picture()), prompts([point]), CONFIG)) == 0


def test_no_prompts_and_only_negative_points_give_nothing():
    assert len(cell_at(Scene(picture()), prompts(), CONFIG)) == 0
    assert len(cell_at(Scene(picture()), prompts(negative=[(70, 30)]), CONFIG)) == 0


@pytest.mark.parametrize("level", [0.08, 0.2, 0.45])
def test_a_faint_cell_is_grown_at_a_lower_threshold(level):
    probs = picture()
    faint = disc(12, 60, 7)
    probs[0][faint] = level
    np.testing.assert_array_equal(mask_at(probs, prompts([(62, 13)])), faint)


def test_growing_does_not_enter_cells_that_are_there():
    probs = picture()
    probs[0][disc(30, 82, 6) & ~FAR] = 0.4
    grown = mask_at(probs, prompts([(84, 30)]))
    assert not (grown & FAR).any()


def test_growing_that_would_leak_over_the_frame_takes_a_higher_threshold():
    probs = picture()
    haze = np.zeros(SHAPE, bool)
    haze[:18] = True
    probs[0][haze] = 0.25
    bright = disc(9, 45, 6)
    probs[0][bright] = 0.45
    np.testing.assert_array_equal(mask_at(probs, prompts([(45, 9)])), bright)


def test_a_cell_below_the_score_and_area_limits_can_still_be_clicked():
    probs = picture()
    probs[0][4:8, 4:8] = 0.6
    expected = np.zeros(SHAPE, bool)
    expected[4:8, 4:8] = True
    np.testing.assert_array_equal(mask_at(probs, prompts([(5, 5)])), expected)


def test_two_positive_points_merge_their_cells():
    np.testing.assert_array_equal(mask_at(picture(), prompts([(20, 30), (39, 30)])), LEFT | RIGHT)


def test_a_small_gap_between_merged_parts_is_closed():
    probs = picture()
    probs[0][12:17, 60:70], probs[0][12:17, 73:83] = 0.95, 0.95
    merged = mask_at(probs, prompts([(65, 14), (78, 14)]))
    assert merged[13:16, 60:83].all()
    assert not (merged & FAR).any()


def test_a_box_merges_the_cells_in_it():
    np.testing.assert_array_equal(mask_at(picture(), prompts(boxes=[(8, 18, 51, 43)])), LEFT | RIGHT)


def test_a_box_leaves_out_a_neighbour_that_only_reaches_in():
    found = mask_at(picture(), prompts(boxes=[(9, 18, 33, 42)]))
    assert iou(found, LEFT) > 0.9


def test_of_two_separate_cells_in_a_box_the_larger_is_taken():
    np.testing.assert_array_equal(
        mask_at(picture(), prompts(boxes=[(29.5, 15, 85, 45)])), mask_at(picture(), prompts([(44, 30)]))
    )


def test_a_box_inside_a_cell_gives_the_part_in_the_box():
    expected = np.zeros(SHAPE, bool)
    expected[27:34, 68:73] = True
    np.testing.assert_array_equal(mask_at(picture(), prompts(boxes=[(68, 27, 73, 34)])), expected)


def test_a_box_around_a_faint_cell_and_around_nothing():
    probs = picture()
    faint = disc(12, 60, 7)
    probs[0][faint] = 0.3
    np.testing.assert_array_equal(mask_at(probs, prompts(boxes=[(50, 2, 70, 22)])), faint)
    assert len(cell_at(Scene(probs), prompts(boxes=[(0, 0, 10, 10)]), CONFIG)) == 0


def test_a_negative_point_cuts_two_cells_that_the_model_took_for_one():
    probs = np.full((2, *SHAPE), 0.01, np.float32)
    probs[0][22:39, 10:50] = 0.95
    assert int(mask_at(probs, prompts([(15, 30)])).sum()) == 17 * 40
    kept = mask_at(probs, prompts([(15, 30)], negative=[(44, 30)]))
    assert 0.4 < kept.sum() / (17 * 40) < 0.6
    assert kept[30, 15]
    assert not kept[:, 35:].any()


def test_a_negative_point_cuts_what_a_box_took():
    probs = picture()
    kept = mask_at(probs, prompts(negative=[(42, 30)], boxes=[(8, 18, 51, 43)]))
    assert iou(kept, LEFT) > 0.85


def test_a_negative_point_elsewhere_changes_nothing():
    np.testing.assert_array_equal(mask_at(picture(), prompts([(70, 30)], negative=[(20, 30)])), FAR)


def test_positive_and_negative_on_the_same_pixel_leave_nothing():
    assert len(cell_at(Scene(picture()), prompts([(70, 30)], negative=[(70, 30)]), CONFIG)) == 0


def test_a_cell_larger_than_the_part_that_is_looked_at_first_is_whole():
    shape = (900, 1400)
    probs = np.zeros((2, *shape), np.float32)
    large = disc(450, 700, 400, shape)
    probs[0][large] = 0.9
    np.testing.assert_array_equal(mask_at(probs, prompts([(700, 450)])), large)


@pytest.mark.parametrize("point", [(25.5, 33.2), (70, 30)])
def test_the_place_in_a_large_image_does_not_matter(point):
    probs = np.full((2, 800, 1000), 0.01, np.float32)
    probs[:, 400:460, 500:590] = picture()
    whole = mask_at(probs, prompts([(point[0] + 500, point[1] + 400)]))
    assert not whole[:400].any()
    np.testing.assert_array_equal(whole[400:460, 500:590], mask_at(picture(), prompts([point])))


@pytest.mark.parametrize("shape", [(1, 1), (1, 12)])
def test_the_smallest_images(shape):
    probs = np.zeros((2, *shape), np.float32)
    probs[0] = 0.9
    assert mask_at(probs, prompts([(0, 0)])).all()


def test_bad_maps_are_refused():
    probs = picture()
    probs[0, 30, 70] = np.nan
    with pytest.raises(NonFiniteError, match="img-1"):
        cell_at(Scene(probs), prompts([(70, 30)]), CONFIG, image_id="img-1")
    with pytest.raises(ShapeError, match=r"\(1, 60, 90\)"):
        cell_at(Scene(probs[:1]), prompts([(70, 30)]), CONFIG)


def test_overlapping_cells_of_a_sparse_model_come_back_whole():
    rows, columns = np.ogrid[:60, :100]
    discs = [(rows - 30) ** 2 + (columns - x) ** 2 <= 15**2 for x in (40, 58)]
    cells = from_masks(discs, (60, 100), scores=[0.9, 0.8])
    probs = np.zeros((2, 60, 100), np.float32)
    probs[0] = 0.9 * np.any(discs, axis=0)
    scene = Scene(probs, instances=cells)
    for point, expected in (((30, 30), 0), ((70, 30), 1), ((49, 30), 0)):
        found = cell_at(scene, prompts([point]), CONFIG)
        np.testing.assert_array_equal(to_dense(found)[0], discs[expected])
    assert len(cell_at(scene, prompts([(5, 5)]), CONFIG)) == 0
    assert scene.nbytes == probs.nbytes + sum(mask.nbytes for mask in cells.masks)


def test_nuclei_part_the_cells_that_are_clicked():
    probs = np.zeros((2, 40, 60), np.float32)
    probs[0][12:28, 10:50] = 0.95
    nuclei = np.zeros((40, 60), np.float32)
    nuclei[18:22, 16:20] = nuclei[18:22, 40:44] = 0.9
    whole = cell_at(Scene(probs), prompts([(17, 20)]), CONFIG)
    half = cell_at(Scene(probs, nuclei), prompts([(17, 20)]), CONFIG)
    assert whole.masks[0].sum() == 16 * 40
    assert 0.3 < half.masks[0].sum() / whole.masks[0].sum() < 0.7


def two_pieces(gap):
    """One disc of radius 14 that the model takes for two, parted by a predicted border of `gap` px."""
    probs = np.full((2, *SHAPE), 0.01, np.float32)
    whole = disc(30, 45, 14)
    probs[0][whole] = 0.95
    ridge = np.zeros(SHAPE, bool)
    ridge[:, 45 - gap // 2 : 45 - gap // 2 + gap] = True
    probs[0][whole & ridge] = 0.1
    probs[1][whole & ridge] = 0.9
    return probs, whole


@pytest.mark.parametrize("gap", [1, 2, 3, 4])
def test_one_disc_predicted_as_two_is_merged_by_a_box_and_by_two_points(gap):
    probs, whole = two_pieces(gap)
    one = mask_at(probs, prompts([(36, 30)]))
    assert one.sum() < 0.6 * whole.sum()
    for given in (prompts(boxes=[(30, 15, 61, 46)]), prompts([(36, 30), (54, 30)])):
        merged = mask_at(probs, given)
        assert iou(merged, whole) > 0.95
        assert merged[30, 31:60].all()


def test_closing_a_gap_in_a_box_takes_nothing_of_a_neighbour():
    probs, whole = two_pieces(3)
    probs[0][15:17] = 0.0
    probs[0][2:15, 20:70] = 0.95
    merged = mask_at(probs, prompts(boxes=[(30, 12, 61, 46)]))
    assert iou(merged, whole) > 0.85
    assert not merged[:15].any()


def test_touching_discs_predicted_as_one_are_split_by_a_negative_point():
    probs = np.full((2, *SHAPE), 0.01, np.float32)
    probs[0][LEFT | RIGHT] = 0.95  # and no border between them
    without_split = CONFIG.model_copy(update={"split": 5.0})
    taken = to_dense(cell_at(Scene(probs), prompts([(20, 30)]), without_split))[0]
    assert iou(taken, LEFT | RIGHT) > 0.98
    for given, kept in (
        (prompts([(20, 30)], negative=[(39, 30)]), LEFT),
        (prompts([(42, 28)], negative=[(18, 33)]), RIGHT),
        (prompts(negative=[(39, 30)], boxes=[(8, 18, 51, 43)]), LEFT),
    ):
        found = cell_at(Scene(probs), given, without_split)
        assert iou(to_dense(found)[0], kept) > 0.9


def test_three_predicted_pieces_are_merged_by_three_points_and_one_is_given_back():
    probs = np.full((2, *SHAPE), 0.01, np.float32)
    for x in (15, 30, 45):
        probs[0][20:40, x : x + 13] = 0.95
    merged = mask_at(probs, prompts([(20, 30), (36, 30), (50, 30)]))
    assert merged[22:38, 15:58].all()
    kept = mask_at(probs, prompts([(20, 30), (36, 30)], negative=[(52, 30)]))
    assert kept[22:38, 15:42].all()
    assert not kept[:, 48:].any()


def test_a_cut_follows_the_predicted_border_where_there_is_one():
    region = np.zeros(SHAPE, bool)
    region[20:40, 10:70] = True
    border = np.zeros(SHAPE, np.float32)
    border[:, 25:27] = 1
    by_shape = cut_away(region, [(30, 15)], [(30, 60)])
    by_border = cut_away(region, [(30, 15)], [(30, 60)], border=border)
    assert by_border[22:38, 10:25].all()
    assert not by_border[:, 28:].any()
    assert by_shape.sum() > 1.5 * by_border.sum()
    assert not cut_away(region, [(30, 15)], [(30, 15)]).any()


def test_what_lies_near_a_point_in_a_label_image():
    cells = np.zeros((20, 20), np.int32)
    cells[5, 5], cells[5, 12] = 3, 7
    found = {column: cell_near(cells, (5, column)) for column in (0, 2, 5, 8, 9, 12, 15, 16, 40)}
    assert found == {0: 0, 2: 3, 5: 3, 8: 3, 9: 7, 12: 7, 15: 7, 16: 0, 40: 0}
    assert cell_near(cells, (8, 8)) == 0
