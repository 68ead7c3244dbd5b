from pathlib import Path

import numpy as np
import pytest

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import CropStream, Lesson
from loop.data.store import write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError, ImageError, InputError, LabelError, ShapeError
from loop.masks import from_masks
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
    assert {a.dtype for a in batch[:3]} == {np.dtype(np.float32)}
    assert (batch.overlap_map, batch.masks, batch.mask_weights) == (None, (), ())
    assert set(np.unique(batch.target)) == {0.0, 1.0}
    assert (batch.weight == 1).all()


def test_a_batch_is_a_function_of_seed_and_number(tmp_path):
    samples = [sample(tmp_path, "a"), sample(tmp_path, "b", seed=1)]
    one, two = CropStream(samples, ModelConfig(), CONFIG), CropStream(samples, ModelConfig(), CONFIG)
    later = two.batch(7)
    for left, right in zip(one.batch(7)[:3], later[:3], strict=True):
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


def overlapping(tmp_path, name="o"):
    """Two discs that share a lens, nuclei in their middles."""
    rows, columns = np.ogrid[:64, :64]
    discs = [(rows - 32) ** 2 + (columns - x) ** 2 <= 15**2 for x in (24, 40)]
    nuclei = [(rows - 32) ** 2 + (columns - x) ** 2 <= 4**2 for x in (20, 44)]
    path = tmp_path / f"{name}.png"
    write_png((60 * np.sum(discs, axis=0)).astype(np.uint8)[..., None], path)
    return Sample(ImageRef(name, path, "", 64, 64, 1), from_masks(discs, (64, 64)), from_masks(nuclei, (64, 64)))


STILL = TrainConfig(crop=64, batch=1, intensity=0, scale_jitter=1, rotate=0, elastic=0)


def test_all_heads_are_taught_and_masks_stay_whole_where_cells_overlap(tmp_path):
    one = overlapping(tmp_path)
    heads = ("interior", "nuclei", "border", "background", "overlap")
    batch = CropStream([one], ModelConfig(), STILL, Lesson(heads, most_cells=9)).batch(3)
    interior, nuclei, border, background, overlap = batch.target[0]
    first, second = (mask.astype(np.float32) for mask in batch.masks[0])
    np.testing.assert_array_equal(interior, np.maximum(first, second))
    np.testing.assert_array_equal(background, 1 - interior)
    np.testing.assert_array_equal(overlap, first * second)
    assert overlap.sum() > 50
    assert 0 < nuclei.sum() < interior.sum() / 4
    assert (interior[nuclei > 0] == 1).all()
    assert border[overlap > 0].any()
    assert batch.mask_weights[0].tolist() == [1, 1]


def test_heads_without_labels_are_refused_by_name(tmp_path):
    plain = sample(tmp_path, "plain")
    with pytest.raises(LabelError, match=r"head nuclei.*first plain.*model\.heads"):
        CropStream([overlapping(tmp_path), plain], ModelConfig(), STILL, Lesson(("interior", "nuclei")))
    with pytest.raises(LabelError, match="no two cells overlap in any of the 1 images"):
        CropStream([plain], ModelConfig(), STILL, Lesson(("interior", "overlap")))


def test_an_overlap_map_travels_with_the_crop(tmp_path):
    config = STILL.model_copy(update={"overlap_map": "v4"})
    batch = CropStream([overlapping(tmp_path)], ModelConfig(), config, Lesson(("overlap",))).batch(0)
    assert batch.overlap_map is not None
    assert batch.overlap_map.shape == (1, 1, 64, 64)
    lens = batch.target[0, 0] > 0
    assert batch.overlap_map[0, 0][lens].mean() > batch.overlap_map[0, 0][~lens].mean()


def test_a_crop_with_too_many_cells_is_taken_larger_and_none_is_dropped(tmp_path):
    many = sample(tmp_path, "many", n=60, shape=(160, 160))
    config = STILL.model_copy(update={"crop": 160})
    free = CropStream([many], ModelConfig(), config, Lesson((), most_cells=60)).batch(0)
    tight = CropStream([many], ModelConfig(), config, Lesson((), most_cells=12)).batch(0)
    assert len(tight.masks[0]) <= 12 < len(free.masks[0])
    labelled = np.any(tight.masks[0], axis=0)
    sizes = [np.mean([mask.sum() for mask in batch.masks[0]]) for batch in (free, tight)]
    assert sizes[1] > 2 * sizes[0]  # the same cells, seen larger
    assert labelled.any()


def test_cells_on_top_of_each_other_beyond_the_queries_name_the_image(tmp_path):
    path = tmp_path / "stack.png"
    write_png(np.zeros((64, 64, 1), np.uint8), path)
    whole = Instances.build((64, 64), [(0, 0, 64, 64)] * 20, [np.ones((64, 64), bool)] * 20)
    stream = CropStream([Sample(ImageRef("stack", path, "", 64, 64, 1), whole)], ModelConfig(), STILL, Lesson((), 9))
    with pytest.raises(InputError, match=r"stack: more than 9 cells.*model\.queries"):
        stream.batch(0)


def test_masks_are_not_mirrored_at_the_images_edge(tmp_path):
    path = tmp_path / "small.png"
    write_png(np.full((32, 32, 1), 90, np.uint8), path)
    cell = Instances.build((32, 32), [(4, 4, 12, 12)], [np.ones((8, 8), bool)])
    stream = CropStream([Sample(ImageRef("small", path, "", 32, 32, 1), cell)], ModelConfig(), STILL, Lesson((), 9))
    for i in range(8):
        for mask in stream.batch(i).masks[0]:
            assert mask.sum() <= 64


def test_one_cell_that_fills_the_frame_is_interior_everywhere(tmp_path):
    path = tmp_path / "full.png"
    write_png(np.full((64, 64, 1), 90, np.uint8), path)
    whole = Sample(
        ImageRef("full", path, "", 64, 64, 1), Instances.build((64, 64), [(0, 0, 64, 64)], [np.ones((64, 64), bool)])
    )
    target = CropStream([whole], ModelConfig(), STILL).batch(0).target[0]
    assert (target[0] == 1).all()
    assert (target[1] == 0).all()


def test_full_balance_draws_every_kind_alike(tmp_path):
    dark = [sample(tmp_path, f"d{i}", n=0, modality="dark") for i in range(15)]
    path = tmp_path / "rare.png"
    write_png(np.zeros((64, 64, 3), np.uint8), path)
    whole = Instances.build((64, 64), [(0, 0, 64, 64)], [np.ones((64, 64), bool)])
    rare = Sample(ImageRef("rare", path, "", 64, 64, 3, modality="rare"), whole)
    stream = CropStream([*dark, rare], ModelConfig(), CONFIG.model_copy(update={"balance": 1.0}))
    share = np.mean([stream.batch(i).target[:, 0].any(axis=(1, 2)) for i in range(60)])
    assert 0.4 < share < 0.6


def test_blanked_rectangles_leave_the_labels_alone(tmp_path):
    one = sample(tmp_path)
    plain, blanked = (
        CropStream([one], ModelConfig(), STILL.model_copy(update={"dropout": share})).batch(2) for share in (0.0, 1.0)
    )
    assert (plain.image != blanked.image).any()
    np.testing.assert_array_equal(plain.target, blanked.target)


def test_an_overlap_map_without_an_overlap_head_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"overlap_map=v4.*no overlap head"):
        CropStream([sample(tmp_path)], ModelConfig(), STILL.model_copy(update={"overlap_map": "v4"}))
