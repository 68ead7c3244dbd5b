from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import CropStream, label_map, pixel_weights, targets
from loop.data.store import write_png
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, InputError, LabelError, ShapeError
from loop.types import ImageRef, Instances, Sample

CONFIG = TrainConfig(crop=48, batch=3)


def sample(tmp_path, name="a", n=4, shape=(64, 64), seed=0, **meta):
    pixels, cells = draw_cells(np.random.default_rng(seed), shape, n)
    path = tmp_path / f"{name}.png"
    write_png(pixels, path)
    return Sample(ImageRef(name, path, "", *shape, 3, **meta), cells)


def test_batches_have_their_shapes_and_hold_what_they_say(tmp_path):
    batch = CropStream([sample(tmp_path)], ModelConfig(), CONFIG).batch(0)
    assert batch.image.shape == (3, 3, 48, 48)
    assert batch.target.shape == (3, 2, 48, 48)
    assert batch.weight.shape == (3, 1, 48, 48)
    assert {a.dtype for a in batch} == {np.dtype(np.float32)}
    assert set(np.unique(batch.target)) == {0.0, 1.0}
    assert (batch.weight == 1).all()


def test_a_batch_is_a_function_of_seed_and_number(tmp_path):
    samples = [sample(tmp_path, "a"), sample(tmp_path, "b", seed=1)]
    one, two = CropStream(samples, ModelConfig(), CONFIG), CropStream(samples, ModelConfig(), CONFIG)
    later = two.batch(7)
    for left, right in zip(one.batch(7), later, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(one.batch(8).image, later.image)
    other = CropStream(samples, ModelConfig(), TrainConfig(crop=48, batch=3, seed=1))
    assert not np.array_equal(other.batch(7).image, later.image)


def test_images_without_cells_and_smaller_than_the_crop_teach_background(tmp_path):
    batch = CropStream([sample(tmp_path, n=0, shape=(16, 20))], ModelConfig(in_channels=1), CONFIG).batch(0)
    assert batch.image.shape == (3, 1, 48, 48)
    assert not batch.target.any()
    assert (batch.weight == 1).all()


def test_most_crops_hold_cells_even_where_they_are_rare(tmp_path):
    stream = CropStream([sample(tmp_path, n=1, shape=(400, 400))], ModelConfig(), CONFIG)
    held = [stream.batch(i).target[:, 0].any(axis=(1, 2)) for i in range(30)]
    assert np.mean(held) > 0.6


def test_a_rare_modality_is_drawn_more_often_than_its_share(tmp_path):
    dark = [sample(tmp_path, f"d{i}", n=0, modality="dark") for i in range(16)]
    path = tmp_path / "rare.png"
    write_png(np.zeros((64, 64, 3), np.uint8), path)
    whole = Instances.build((64, 64), [(0, 0, 64, 64)], [np.ones((64, 64), bool)])
    rare = Sample(ImageRef("rare", path, "", 64, 64, 3, modality="rare"), whole)
    stream = CropStream([*dark, rare], ModelConfig(), CONFIG)
    share = np.mean([stream.batch(i).target[:, 0].any(axis=(1, 2)) for i in range(60)])
    assert 0.1 < share < 0.35  # 1 / (1 + 4) by the rule, 1 / 17 without it


def test_a_middle_grey_image_is_inverted_half_of_the_time(tmp_path):
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[:32, ::8], pixels[32:, ::8] = 0, 255
    path = tmp_path / "grey.png"
    write_png(pixels, path)
    grey = Sample(ImageRef("grey", path, "", 64, 64, 3), Instances.build((64, 64)))
    config = TrainConfig(crop=64, batch=1, intensity=0, scale_jitter=1, rotate=0, elastic=0)
    first = {CropStream([grey], ModelConfig(), config).batch(i).image.round(2).max() for i in range(5)}
    assert first
    sums = [CropStream([grey], ModelConfig(), config).batch(i).image.mean() for i in range(40)]
    assert 8 < sum(s > 0.5 for s in sums) < 32


def test_no_samples_and_wrong_sizes_are_refused(tmp_path):
    with pytest.raises(InputError, match="0 labelled images"):
        CropStream([], ModelConfig(), CONFIG)
    good = sample(tmp_path, "mouse-4")
    with pytest.raises(ShapeError, match=r"mouse-4.*\(64, 64\).*\(9, 9\)"):
        CropStream([Sample(good.image, Instances.build((9, 9)))], ModelConfig(), CONFIG)
    with pytest.raises(ImageError, match=r"gone\.png"):
        CropStream(
            [Sample(ImageRef("gone", Path("gone.png"), "", 9, 9, 3), Instances.build((9, 9)))], ModelConfig(), CONFIG
        )


def test_the_smaller_of_two_overlapping_cells_is_on_top():
    cells = Instances.build((6, 6), [(2, 2, 4, 4), (0, 0, 6, 6)], [np.ones((2, 2), bool), np.ones((6, 6), bool)])
    expected = np.full((6, 6), 2)
    expected[2:4, 2:4] = 1
    np.testing.assert_array_equal(label_map(cells), expected)


def test_more_cells_than_sixteen_bits_hold_are_refused():
    n = 65536
    boxes = np.tile(np.array([[0, 0, 1, 1]], np.int32), (n, 1))
    with pytest.raises(LabelError, match=r"slide-1.*65536 cells"):
        label_map(Instances.build((1, 1), boxes, [np.ones((1, 1), bool)] * n, image_id="slide-1"))


def test_border_by_hand():
    labels = np.zeros((5, 7), np.uint16)
    labels[1:4, 1:4], labels[1:4, 4:6] = 1, 2
    interior, border = targets(labels)
    np.testing.assert_array_equal(interior, labels > 0)
    middle = np.zeros((5, 7), bool)
    middle[2, 2] = True
    np.testing.assert_array_equal(border == 0, middle)


def test_border_is_the_inner_and_the_outer_band_of_each_cell():
    _, cells = draw_cells(np.random.default_rng(3), (64, 64), 5, touching=True)
    labels = label_map(cells)
    expected = np.zeros(labels.shape, bool)
    around = np.ones((3, 3))
    for i in range(1, 6):
        cell = labels == i
        expected |= ndimage.binary_dilation(cell, around) & ~ndimage.binary_erosion(cell, around, border_value=1)
    np.testing.assert_array_equal(targets(labels)[1] > 0, expected)


def test_a_cell_of_weight_zero_is_ignored_with_its_border():
    labels = np.zeros((7, 7), np.uint16)
    labels[2:5, 2:5] = 1
    weights = pixel_weights(labels, np.zeros(1, np.float32))
    expected = np.ones((7, 7))
    expected[1:6, 1:6] = 0
    np.testing.assert_array_equal(weights, expected)
    assert (weights[targets(labels)[1] > 0] == 0).all()


def test_weights_by_cell():
    labels = np.zeros((3, 20), np.uint16)
    labels[:, 2:6], labels[:, 12:16] = 1, 2
    row = pixel_weights(labels, np.array([0.5, 2.0], np.float32))[1]
    np.testing.assert_array_equal(row[[0, 1, 3, 6, 8, 11, 12, 13, 16]], [1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1])
