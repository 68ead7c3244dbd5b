import numpy as np
import pytest
from scipy import ndimage

from loop.data.synthetic import draw_cells
from loop.data.targets import cell_masks, distance_map, pixel_weights, targets, visible_cells
from loop.errors import LabelError
from loop.masks import to_layers

BOTH = ("interior", "border")


def test_border_by_hand():
    labels = np.zeros((1, 5, 7), np.uint16)
    labels[0, 1:4, 1:4], labels[0, 1:4, 4:6] = 1, 2
    interior, border = targets(labels, BOTH)
    np.testing.assert_array_equal(interior, labels[0] > 0)
    middle = np.zeros((5, 7), bool)
    middle[2, 2] = True
    np.testing.assert_array_equal(border == 0, middle)


def test_border_is_the_inner_and_the_outer_band_of_each_cell():
    _, cells = draw_cells(np.random.default_rng(3), (64, 64), 5, touching=True)
    layers = to_layers(cells)
    assert len(layers) == 1
    expected = np.zeros((64, 64), bool)
    around = np.ones((3, 3))
    for i in range(1, 6):
        cell = layers[0] == i
        expected |= ndimage.binary_dilation(cell, around) & ~ndimage.binary_erosion(cell, around, border_value=1)
    np.testing.assert_array_equal(targets(layers, BOTH)[1] > 0, expected)


def test_layers_are_joined_by_hand():
    layers = np.zeros((2, 4, 6), np.uint16)
    layers[0, :, :4], layers[1, :, 2:] = 1, 2
    nuclei = np.zeros((1, 4, 6), np.uint16)
    nuclei[0, 1, 1] = 5
    interior, background, overlap, found = targets(layers, ("interior", "background", "overlap", "nuclei"), nuclei)
    assert interior.all()
    assert not background.any()
    np.testing.assert_array_equal(overlap, [[0, 0, 1, 1, 0, 0]] * 4)
    assert np.argwhere(found).tolist() == [[1, 1]]
    with pytest.raises(LabelError, match="nuclei"):
        targets(layers, ("nuclei",))
    assert targets(layers, ()).shape == (0, 4, 6)


def test_masks_of_visible_cells():
    layers = np.zeros((2, 4, 6), np.uint16)
    layers[0, :, :4], layers[1, :, 2:] = 3, 1
    layers[1, 0, 0] = 2  # one pixel of a third cell is seen: too little to learn from
    assert visible_cells(layers) == [1, 3]
    np.testing.assert_array_equal(cell_masks(layers), [layers[1] == 1, layers[0] == 3])
    assert cell_masks(np.zeros((1, 4, 6), np.uint16)).shape == (0, 4, 6)


def test_a_cell_of_weight_zero_is_ignored_with_its_border():
    labels = np.zeros((1, 7, 7), np.uint16)
    labels[0, 2:5, 2:5] = 1
    weights = pixel_weights(labels, np.zeros(1, np.float32))
    expected = np.ones((7, 7))
    expected[1:6, 1:6] = 0
    np.testing.assert_array_equal(weights, expected)
    assert (weights[targets(labels, BOTH)[1] > 0] == 0).all()


def test_weights_by_cell():
    labels = np.zeros((1, 3, 20), np.uint16)
    labels[0, :, 2:6], labels[0, :, 12:16] = 1, 2
    row = pixel_weights(labels, np.array([0.5, 2.0], np.float32))[1]
    np.testing.assert_array_equal(row[[0, 1, 3, 6, 8, 11, 12, 13, 16]], [1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1])


def test_distance_by_hand():
    labels = np.zeros((1, 5, 8), np.uint16)
    labels[0, 1:4, 1:4], labels[0, 1, 5], labels[0, 3:5, 5:8] = 1, 2, 4
    expected = np.zeros((5, 8))
    expected[1:4, 1:4] = 0.5  # one px inside; the middle is two
    expected[2, 2] = 1
    expected[1, 5] = 1  # a cell of one px is all middle
    expected[3:5, 5:8] = [np.array([1, 1, 1]) / 2, np.array([1, 2, 2]) / 2]  # the lower and right edges are cut off
    (found,) = targets(labels, ("distance",))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("seed", range(4))
def test_distance_is_that_of_each_cell_alone(seed):
    _, cells = draw_cells(np.random.default_rng(seed), (64, 64), 6, touching=True)
    layers = to_layers(cells)
    other = np.roll(layers[:, ::-1], 9, axis=2).copy()  # cells over cells, some cut by the edge
    layers = np.concatenate([layers, np.where(other > 0, other + 6, 0).astype(np.uint16)])
    expected = np.zeros((64, 64))
    for layer in layers:
        for i in np.unique(layer[layer > 0]):
            depth = ndimage.distance_transform_edt(layer == i)
            expected = np.maximum(expected, depth / depth.max())
    np.testing.assert_allclose(distance_map(layers), expected, atol=1e-5)


def test_distance_without_an_edge_or_without_cells():
    assert bool((distance_map(np.full((1, 6, 4), 3, np.uint16)) == 1).all())
    assert not distance_map(np.zeros((1, 6, 4), np.uint16)).any()
    assert not distance_map(np.zeros((0, 6, 4), np.uint16)).any()
