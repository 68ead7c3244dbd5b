"""Crops of pseudo-labelled images beside labelled ones, and images that are labelled in part."""

from dataclasses import replace

import numpy as np
import pytest

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import CropStream, Lesson
from loop.data.store import write_png
from loop.data.synthetic import draw_cells
from loop.errors import LabelError, ShapeError
from loop.types import ImageRef, Sample

MODEL = ModelConfig(in_channels=1, dark_background=False)
STILL = TrainConfig(
    crop=32,
    batch=4,
    scale_jitter=1,
    rotate=0,
    elastic=0,
    intensity=0,
    veil=0,
    seed=5,
    pseudo_share=0.5,
    consistency=0.5,
)


def flat(tmp_path, name, value, shape=(64, 64)):
    """A grey image of one value without cells, so that a crop tells which image it is of."""
    path = tmp_path / f"{name}.png"
    write_png(np.full((*shape, 1), value, np.uint8), path)
    _, cells = draw_cells(np.random.default_rng(0), shape, 0)
    return Sample(ImageRef(name, path, "", *shape, 1), cells)


def drawn(tmp_path, name, n=6, seed=0, shape=(64, 64)):
    pixels, cells = draw_cells(np.random.default_rng(seed), shape, n)
    path = tmp_path / f"{name}.png"
    write_png(pixels, path)
    return Sample(ImageRef(name, path, "", *shape, 3), cells)


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 40), (0.25, 20), (0.3, 24), (0.0, 0)])
def test_the_share_of_pseudo_crops_is_kept_over_batches(tmp_path, share, wanted):
    settings = STILL.model_copy(update={"pseudo_share": share})
    labelled, pseudo = drawn(tmp_path, "a"), drawn(tmp_path, "b", seed=1)
    stream = CropStream([labelled], ModelConfig(), settings, pseudo=[pseudo])
    batches = [stream.batch(i) for i in range(20)]
    assert sum(int(batch.pseudo.sum()) if batch.pseudo is not None else 0 for batch in batches) == wanted


def test_pseudo_crops_are_of_pseudo_images_and_the_flags_say_which(tmp_path):
    one, two = drawn(tmp_path, "a"), drawn(tmp_path, "b", seed=1)
    none, every = replace(two.instances, weights=np.zeros(6, np.float32)), one.instances
    stream = CropStream([Sample(one.image, every)], ModelConfig(), STILL, pseudo=[Sample(two.image, none)])
    for number in range(6):
        batch = stream.batch(number)
        ignored = (batch.weight == 0).any(axis=(1, 2, 3))
        assert not ignored[~batch.pseudo].any()
        cells = batch.target[:, 0].any(axis=(1, 2))
        assert (ignored == (cells & batch.pseudo)).all()


def test_without_pseudo_images_nothing_changes(tmp_path):
    labelled = [drawn(tmp_path, "a"), drawn(tmp_path, "b", seed=1)]
    plain = CropStream(labelled, ModelConfig(), STILL).batch(3)
    off = CropStream(labelled, ModelConfig(), STILL.model_copy(update={"pseudo_share": 0.9})).batch(3)
    np.testing.assert_array_equal(plain.image, off.image)
    assert (plain.pseudo, plain.weak, off.pseudo, off.weak) == (None, None, None, None)


def test_the_weak_crop_is_the_same_place_before_its_intensities_change(tmp_path):
    changed = STILL.model_copy(update={"intensity": 1.0, "dropout": 1.0, "veil": 1.0})
    one, two = drawn(tmp_path, "a"), drawn(tmp_path, "b", seed=1)
    still = CropStream([one], ModelConfig(), STILL, pseudo=[two]).batch(0)
    moved = CropStream([one], ModelConfig(), changed, pseudo=[two]).batch(0)
    np.testing.assert_array_equal(still.weak, moved.weak)
    np.testing.assert_array_equal(still.weak, still.image)
    assert not np.array_equal(moved.weak, moved.image)
    off = STILL.model_copy(update={"consistency": 0.0})
    assert CropStream([one], ModelConfig(), off, pseudo=[two]).batch(0).weak is None


def test_parts_of_a_batch_take_their_flags_along(tmp_path):
    batch = CropStream([drawn(tmp_path, "a")], ModelConfig(), STILL, pseudo=[drawn(tmp_path, "b", seed=1)]).batch(0)
    part = batch.part(1, 3)
    np.testing.assert_array_equal(part.pseudo, batch.pseudo[1:3])
    np.testing.assert_array_equal(part.weak, batch.weak[1:3])


def test_outside_the_known_area_nothing_counts(tmp_path):
    whole = drawn(tmp_path, "a", n=5)
    known = np.zeros((64, 64), bool)
    known[:, :32] = True
    part = CropStream([whole._replace(known=known)], ModelConfig(), STILL)
    full = CropStream([whole], ModelConfig(), STILL)
    seen = set()
    for number in range(8):
        one, other = part.batch(number), full.batch(number)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.target, other.target)
        assert set(np.unique(one.weight)) <= {0.0, 1.0}
        seen |= set(one.weight.mean(axis=(1, 2, 3)).round(3).tolist())
    assert len(seen) > 2  # crops of known, of unknown and of mixed places


def test_a_known_area_of_another_size_is_refused(tmp_path):
    wrong = drawn(tmp_path, "a")._replace(known=np.ones((64, 60), bool))
    with pytest.raises(ShapeError, match="done area"):
        CropStream([wrong], ModelConfig(), STILL)


def test_pseudo_images_without_nuclei_cannot_teach_the_head_nuclei(tmp_path):
    labelled = drawn(tmp_path, "a")
    labelled = labelled._replace(nuclei=labelled.instances)
    with pytest.raises(LabelError, match="b"):
        CropStream([labelled], ModelConfig(), STILL, Lesson(("interior", "nuclei")), [drawn(tmp_path, "b", seed=1)])
