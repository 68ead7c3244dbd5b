import numpy as np
import pytest

from loop.config import TrainConfig
from loop.data.augment import blank_out, plain_map, random_intensity, random_map

STILL = TrainConfig(scale_jitter=1, rotate=0, elastic=0)


def picture(height=40, width=50, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, (height, width)).astype(np.uint16)
    return np.repeat((labels * 50).astype(np.uint8)[..., None], 3, axis=2), labels


def test_a_plain_map_cuts_out_the_crop_exactly():
    pixels, labels = picture()
    cut = plain_map(16, (20.5, 15.5))
    np.testing.assert_array_equal(cut.layers(labels[None])[0], labels[8:24, 13:29])
    np.testing.assert_allclose(cut.image(pixels) * 255, pixels[8:24, 13:29], atol=1e-3)


def test_beyond_the_edge_the_image_is_mirrored():
    _, labels = picture(height=8, width=6)
    crop = plain_map(16, (2.5, 3.5)).layers(labels[None])[0]
    np.testing.assert_array_equal(crop, np.pad(labels, ((4, 4), (5, 5)), mode="reflect"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2)])
def test_the_smallest_images_fill_a_crop(shape):
    pixels, labels = np.full((*shape, 1), 90, np.uint8), np.ones(shape, np.uint16)
    warp = random_map(np.random.default_rng(0), 32, (0.0, 0.0), TrainConfig())
    np.testing.assert_allclose(warp.image(pixels), 90 / 255, atol=1e-6)
    assert (warp.layers(labels[None])[0] == 1).all()


def test_without_scale_turn_and_bend_only_flips_and_quarter_turns_are_left():
    _, labels = picture()
    plain = plain_map(16, (20.5, 15.5)).layers(labels[None])[0]
    eight = {np.rot90(f, k).tobytes() for f in (plain, plain[:, ::-1]) for k in range(4)}
    rng = np.random.default_rng(0)
    seen = {random_map(rng, 16, (20.5, 15.5), STILL).layers(labels[None])[0].tobytes() for _ in range(200)}
    assert seen == eight


def test_image_and_labels_are_warped_alike():
    blob = np.zeros((200, 200), np.uint16)
    blob[60:130, 80:120] = 3
    pixels = ((blob > 0) * 255).astype(np.uint8)[..., None]
    rng = np.random.default_rng(2)
    for _ in range(20):
        warp = random_map(rng, 128, (100.0, 100.0), TrainConfig(scale_jitter=2, elastic=3))
        bright = warp.image(pixels)[..., 0] > 0.5
        assert np.mean(bright != (warp.layers(blob[None])[0] > 0)) < 0.005


def test_scale_stays_within_the_jitter():
    blob = np.zeros((300, 300), np.uint16)
    blob[130:170, 130:170] = 1
    rng = np.random.default_rng(0)
    config = TrainConfig(scale_jitter=1.5, rotate=0, elastic=0)
    sides = [np.sqrt(random_map(rng, 160, (149.5, 149.5), config).layers(blob[None])[0].sum()) / 40 for _ in range(200)]
    assert 1 / 1.5 - 0.05 < min(sides) < 0.75
    assert 1.4 < max(sides) < 1.5 + 0.05


def test_same_generator_state_same_crop():
    pixels, labels = picture()
    maps = [random_map(np.random.default_rng(5), 24, (10, 10), TrainConfig()) for _ in range(2)]
    np.testing.assert_array_equal(maps[0].layers(labels[None])[0], maps[1].layers(labels[None])[0])
    crops = [random_intensity(np.random.default_rng(6), maps[0].image(pixels), 1.0, 0.5) for _ in range(2)]
    np.testing.assert_array_equal(crops[0], crops[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_intensities_stay_near_their_range_and_the_crop_is_not_changed(channels):
    rng = np.random.default_rng(0)
    crop = rng.random((32, 32, channels), dtype=np.float32)
    before = crop.copy()
    for _ in range(100):
        out = random_intensity(rng, crop, 1.0, 0.3)
        assert (out.shape, out.dtype) == (crop.shape, np.float32)
        assert np.isfinite(out).all()
        assert out.min() > -1
        assert out.max() < 2.5
    np.testing.assert_array_equal(crop, before)


def test_strength_zero_changes_nothing_and_inversion_is_exact():
    crop = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
    np.testing.assert_allclose(random_intensity(np.random.default_rng(1), crop, 0.0, 0.0), crop, atol=1e-6)
    np.testing.assert_allclose(random_intensity(np.random.default_rng(1), crop, 0.0, 1.0), 1 - crop, atol=1e-6)


def test_a_zoomed_map_shows_half_of_the_field_around_the_same_middle():
    _, labels = picture(64, 64)
    large = np.repeat(np.repeat(labels, 2, axis=0), 2, axis=1)
    zoomed = plain_map(64, (63.5, 63.5)).zoomed(2.0).map(large.astype(np.float32))
    narrow = plain_map(32, (63.5, 63.5)).map(large.astype(np.float32))
    np.testing.assert_allclose(zoomed[16:48:2, 16:48:2].mean(), narrow[8:24, 8:24].mean(), rtol=0.1)
    assert zoomed.shape == (64, 64)


def test_inside_is_where_pixels_of_the_image_are_taken_from():
    expected = np.zeros((16, 16), bool)
    expected[4:12, 5:11] = True
    np.testing.assert_array_equal(plain_map(16, (2.5, 3.5)).inside((8, 6)), expected)


def test_blanked_rectangles_take_the_mean():
    crop = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32)
    blanked = blank_out(np.random.default_rng(1), crop)
    changed = (blanked != crop).any(axis=2)
    assert 0 < changed.mean() < 0.2
    np.testing.assert_allclose(blanked[changed], np.broadcast_to(crop.mean(axis=(0, 1)), (changed.sum(), 3)), rtol=1e-5)
