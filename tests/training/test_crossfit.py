"""Predictions of images by models that learnt neither from them nor from their groups."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.errors import InputError
from loop.models import SEGMENTERS
from loop.training.crossfit import Unseen, UnseenStore, crossfit, folds_of
from loop.training.trainer import Trained
from loop.types import ImageRef, Instances, Sample

SMALL = ModelConfig(name="unet", base=4, depth=2)
QUICK = TrainConfig(max_steps=2, crop=32, batch=2, device="cpu")
PLAIN = InstanceConfig(min_score=0.99, min_area=1, foreground=0.1)


def sample(i, group="", modality="x"):
    return Sample(ImageRef(f"i{i}", None, "", 8, 8, 3, group=group, modality=modality), Instances.build((8, 8)))


@pytest.fixture
def samples(tmp_path):
    found = []
    for i in range(6):
        pixels, cells = draw_cells(np.random.default_rng(i), (48, 48), 3)
        path = tmp_path / f"i{i}.png"
        write_png(pixels, path)
        found.append(Sample(replace(describe(path), group=f"g{i // 2}"), cells))
    return found


class Recorder:
    """Trains nothing, and remembers what it was given."""

    def __init__(self, dies_at=None):
        self.taught = []
        self.dies_at = dies_at

    def __call__(self, samples, model, config, /, *, log, instances=None):
        if len(self.taught) == self.dies_at:
            raise KeyboardInterrupt
        self.taught.append([s.image for s in samples])
        log(1, {"loss": float(len(self.taught))})
        return Trained(SEGMENTERS[model.name](model), 1, 0.0, (1.0,), instances)


def test_no_model_is_given_an_image_or_group_that_it_is_asked_about(samples):
    recorder, told, folds = Recorder(), [], {}

    def fold_done(fold, found):
        folds[fold] = sorted(found)

    found = crossfit(
        samples, SMALL, QUICK, PLAIN, folds=3, log=lambda *said: told.append(said), train=recorder, fold_done=fold_done
    )
    assert [one.instances.image_id for one in found] == [s.image.image_id for s in samples]
    assert sorted(image for part in folds.values() for image in part) == [s.image.image_id for s in samples]
    by_id = {s.image.image_id: s.image for s in samples}
    assert len(recorder.taught) == 3
    for fold, asked in folds.items():
        learnt = recorder.taught[fold]
        assert learnt
        assert not {image.image_id for image in learnt} & set(asked)
        assert not {image.group for image in learnt} & {by_id[name].group for name in asked}
    assert told == [(0, 3, 1, {"loss": 1.0}), (1, 3, 1, {"loss": 2.0}), (2, 3, 1, {"loss": 3.0})]


def test_cells_of_low_score_are_kept_and_the_map_lies_between_0_and_1(samples):
    found = crossfit(samples, SMALL, QUICK, PLAIN, log=lambda *said: None, train=Recorder())
    assert sum(len(one.instances) for one in found) > 0  # an untrained network is sure of nothing
    for one in found:
        assert one.interior.shape == (48, 48)
        assert one.interior.dtype == np.float32
        assert 0 <= one.interior.min() <= one.interior.max() <= 1


def test_a_killed_crossfit_goes_on_with_the_folds_that_are_missing(samples, tmp_path):
    store = UnseenStore(tmp_path / "folds")
    by_id = {s.image.image_id: s.image for s in samples}

    def keep(fold, found):
        for image_id, one in found.items():
            store.save(by_id[image_id], one)

    with pytest.raises(KeyboardInterrupt):
        crossfit(samples, SMALL, QUICK, PLAIN, log=lambda *_: None, train=Recorder(dies_at=2), fold_done=keep)
    loaded = {image_id: store.load(image) for image_id, image in by_id.items()}
    done = {image_id: one for image_id, one in loaded.items() if one is not None}
    assert len(done) == 4
    again = Recorder()
    found = crossfit(samples, SMALL, QUICK, PLAIN, log=lambda *_: None, train=again, done=done)
    assert len(again.taught) == 1
    assert not {image.image_id for image in again.taught[0]} - set(done)
    for s, one in zip(samples, found, strict=True):
        kept = done.get(s.image.image_id)
        assert kept is None or np.array_equal(kept.interior, one.interior)


def test_what_is_stored_comes_back_the_same(samples, tmp_path):
    found = crossfit(samples[:4], SMALL, QUICK, PLAIN, folds=2, log=lambda *_: None)
    folder = tmp_path / "stored"
    store = UnseenStore(folder)
    assert store.load(samples[0].image) is None
    for s, one in zip(samples, found, strict=False):
        store.save(s.image, one)
        back = store.load(s.image)
        assert isinstance(back, Unseen)
        assert np.array_equal(back.interior, one.interior)
        assert np.array_equal(back.instances.boxes_xyxy, one.instances.boxes_xyxy)
    next(folder.iterdir()).write_bytes(b"no array")
    assert sum(store.load(s.image) is None for s in samples[:4]) == 1


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 6), st.sampled_from("xyz")), min_size=2, max_size=15),
    folds=st.integers(2, 5),
    seed=st.integers(0, 100),
)
def test_folds_hold_whole_groups_whatever_the_order(groups, folds, seed):
    images = []
    for g, (size, modality) in enumerate(groups):
        images += [sample(len(images) + k, f"g{g}", modality) for k in range(size)]
    place = folds_of(images, folds)
    assert set(place) == set(range(min(folds, len(groups))))
    where = {}
    for one, fold in zip(images, place, strict=True):
        assert where.setdefault(one.image.group, fold) == fold
    order = np.random.default_rng(seed).permutation(len(images))
    assert folds_of([images[i] for i in order], folds) == [place[i] for i in order]


def test_folds_are_balanced_in_modality():
    images = [sample(i, modality="common" if i < 18 else "rare") for i in range(24)]
    place = folds_of(images, 3)
    assert Counter(place) == {0: 8, 1: 8, 2: 8}
    assert Counter(place[18:]) == {0: 2, 1: 2, 2: 2}


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InputError, match="folds=1"):
        folds_of([sample(0), sample(1)], 1)
    with pytest.raises(InputError, match="of 1 group"):
        folds_of([sample(0, "g"), sample(1, "g")], 2)
    with pytest.raises(InputError, match="each image once"):
        folds_of([sample(0), sample(0)], 2)
