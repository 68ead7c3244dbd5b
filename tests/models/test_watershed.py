import numpy as np
import pytest
from scipy import ndimage

from loop.config import InstanceConfig
from loop.data.synthetic import draw_cells
from loop.data.targets import targets
from loop.errors import NonFiniteError, ShapeError
from loop.masks import from_label_image as instances_from_label_image
from loop.masks import to_dense, to_layers
from loop.metrics.matching import iou_matrix
from loop.models.dense import instances_from_heads
from loop.models.watershed import fill_holes, instances_from_maps, smoothed_energy

CONFIG = InstanceConfig(min_area=5)


def maps(shape=(40, 60)):
    return np.zeros((2, *shape), np.float32)


def disc(shape, row, column, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("touching", [False, True])
def test_perfect_maps_give_the_cells_back(seed, touching):
    _, cells = draw_cells(np.random.default_rng(seed), (96, 96), 5, touching)
    found = instances_from_maps(targets(to_layers(cells), ("interior", "border")), InstanceConfig(min_area=8))
    iou = iou_matrix(found, cells)
    assert len(found) == len(cells)
    assert iou.max(axis=0).min() > 0.8


def test_no_cells():
    found = instances_from_maps(maps(), CONFIG, image_id="a", model_version="m-v1")
    assert (len(found), found.shape, found.image_id, found.source, found.model_version) == (
        0,
        (40, 60),
        "a",
        "model",
        "m-v1",
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (7, 2)])
def test_images_of_one_cell_all_over(shape):
    probs = maps(shape)
    probs[0] = 0.9
    found = instances_from_maps(probs, InstanceConfig(min_area=1))
    assert len(found) == 1
    assert found.masks[0].all()
    assert found.scores[0] == pytest.approx(0.9)


def test_the_border_splits_a_bar():
    probs = maps()
    probs[0][12:28, 10:50] = 0.95
    together = instances_from_maps(probs, CONFIG)
    probs[1][:, 29:31] = 0.9
    apart = instances_from_maps(probs, CONFIG)
    assert (len(together), len(apart)) == (1, 2)
    assert sorted(int(m.sum()) for m in apart.masks) == [16 * 20, 16 * 20]


def test_two_touching_discs_part_at_their_neck_unless_that_is_turned_off():
    probs = maps()
    left, right = disc((40, 60), 20, 20, 10), disc((40, 60), 20, 37, 10)
    probs[0][left | right] = 0.95
    apart = instances_from_maps(probs, CONFIG)
    assert len(apart) == 2
    for found, cell in zip(to_dense(apart), (left, right), strict=True):
        assert (found & cell).sum() / (found | cell).sum() > 0.9
    assert len(instances_from_maps(probs, InstanceConfig(split=5))) == 1


def test_score_is_the_mean_interior_probability_and_low_scores_are_dropped():
    probs = maps()
    sure, unsure = disc((40, 60), 12, 15, 6), disc((40, 60), 25, 45, 6)
    probs[0][sure] = np.random.default_rng(0).uniform(0.8, 1, int(sure.sum())).astype(np.float32)
    probs[0][unsure] = 0.6
    both = instances_from_maps(probs, InstanceConfig(min_score=0))
    np.testing.assert_allclose(sorted(both.scores), [0.6, probs[0][sure].mean()], rtol=1e-5)
    kept = instances_from_maps(probs, InstanceConfig(min_score=0.75))
    np.testing.assert_array_equal(to_dense(kept)[0], sure)


def test_small_cells_are_dropped_and_kept_by_area():
    probs = maps()
    probs[0][5:9, 5:10] = 1.0
    assert len(instances_from_maps(probs, InstanceConfig(min_area=20))) == 1
    assert len(instances_from_maps(probs, InstanceConfig(min_area=21))) == 0


def test_a_cell_without_a_seed_is_still_found():
    probs = maps()
    cell = disc((40, 60), 20, 30, 5)
    probs[0][cell], probs[1][cell] = 0.8, 0.7
    found = instances_from_maps(probs, CONFIG)
    np.testing.assert_array_equal(to_dense(found)[0], cell)


def test_cells_are_of_one_part_without_holes():
    probs = maps((80, 80))
    rng = np.random.default_rng(0)
    probs[0] = ndimage.gaussian_filter(rng.random((80, 80)), 2) * 4 - 1.5
    probs[0] = probs[0].clip(0, 1)
    found = instances_from_maps(probs, InstanceConfig(min_area=1, min_score=0))
    assert len(found) > 3
    assert to_dense(found).sum(axis=0).max() == 1
    for mask in found.masks:
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1


def test_holes_by_hand():
    labels = np.zeros((12, 16), np.int32)
    labels[1:8, 1:8] = 1
    labels[3:5, 3:5] = 0  # a hole: filled
    labels[1:8, 8:15] = 2
    labels[3, 7:9] = 0  # between two cells: stays
    labels[9:12, 0:4] = 3
    labels[10, 1] = 0  # a hole of one pixel: filled
    labels[11, 3] = 0  # at the edge of the image: stays
    expected = labels.copy()
    expected[3:5, 3:5], expected[10, 1] = 1, 3
    np.testing.assert_array_equal(fill_holes(labels), expected)


def test_a_ring_around_more_than_itself_stays_a_ring():
    labels = np.zeros((30, 30), np.int32)
    labels[2:28, 2:28] = 1
    labels[4:26, 4:26] = 0
    np.testing.assert_array_equal(fill_holes(labels), labels)


def test_nan_is_refused_with_the_image_named_and_wrong_shapes_too():
    probs = maps()
    probs[1, 3, 4] = np.nan
    with pytest.raises(NonFiniteError, match=r"1 of 4800.*well-A1"):
        instances_from_maps(probs, CONFIG, image_id="well-A1")
    with pytest.raises(ShapeError, match=r"\(3, 4, 4\)"):
        instances_from_maps(np.zeros((3, 4, 4), np.float32), CONFIG)


def test_nuclei_part_what_the_shape_does_not():
    probs = maps()
    probs[0][12:28, 10:50] = 0.95
    nuclei = np.zeros((40, 60), np.float32)
    nuclei[18:22, 16:20] = nuclei[18:22, 40:44] = 0.9
    assert len(instances_from_maps(probs, CONFIG)) == 1
    found = instances_from_maps(probs, CONFIG, nuclei=nuclei)
    assert len(found) == 2
    assert all(mask.sum() > 200 for mask in found.masks)


def test_a_cell_without_a_nucleus_is_kept_and_a_speck_is_no_nucleus():
    probs = maps()
    probs[0][5:15, 5:15] = probs[0][5:15, 40:50] = 0.95
    nuclei = np.zeros((40, 60), np.float32)
    nuclei[8:12, 8:12] = 0.9
    nuclei[10, 44] = 0.9
    found = instances_from_maps(probs, InstanceConfig(min_area=20), nuclei=nuclei)
    assert sorted(int(mask.sum()) for mask in found.masks) == [100, 100]


def test_a_distance_map_parts_what_interior_and_border_do_not():
    """Two cells in one blob of even interior without a border, which the distances alone tell apart."""
    probs = maps()
    probs[0, 10:30, 10:50] = 0.9
    config = CONFIG.model_copy(update={"seed": 0.55})
    assert len(instances_from_maps(probs, config)) == 1
    labels = np.zeros((1, 40, 60), np.uint16)
    labels[0, 10:30, 10:30], labels[0, 10:30, 30:50] = 1, 2
    distance = targets(labels, ("distance",))[0]
    found = instances_from_maps(probs, config, distance=distance)
    iou = iou_matrix(found, instances_from_label_image(labels[0]))
    assert len(found) == 2
    assert iou.max(axis=0).min() > 0.9


@pytest.mark.parametrize("touching", [False, True])
def test_perfect_maps_with_distances_give_the_cells_back(touching):
    _, cells = draw_cells(np.random.default_rng(1), (96, 96), 5, touching)
    heads = ("interior", "border", "distance")
    found = instances_from_heads(targets(to_layers(cells), heads), heads, InstanceConfig(min_area=8))
    assert len(found) == len(cells)
    assert iou_matrix(found, cells).max(axis=0).min() > 0.8


def test_energy_by_hand():
    probs = maps((1, 2))
    probs[0], probs[1] = [[0.9, 0.6]], [[0.1, 0.2]]
    config = InstanceConfig(smooth_px=0)
    distance = np.array([[0.4, 1.0]], np.float32)
    np.testing.assert_allclose(smoothed_energy(probs, config), [[0.8, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(smoothed_energy(probs, config, distance), [[0.6, 0.7]], rtol=1e-6)


def test_distances_that_are_no_numbers_are_refused():
    distance = np.full((40, 60), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match="distances of image 'a'"):
        instances_from_maps(maps(), CONFIG, distance=distance, image_id="a")
