"""Training on images that people labelled in part and on images that models labelled."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import read_image, write_png
from loop.data.synthetic import draw_cells
from loop.errors import CheckpointError
from loop.masks import to_label_image
from loop.models.segmenter import Segmenter
from loop.training import trainer
from loop.training.trainer import train
from loop.types import ImageRef, Sample

MODEL = ModelConfig(base=16, depth=2)
SMALL = ModelConfig(base=4, depth=2)
BY_HEART = TrainConfig(
    max_steps=40, crop=64, batch=2, learning_rate=1e-2, dice=False, warmup_steps=5, ema=0.9, device="cpu", seed=2,
    scale_jitter=1, rotate=0, elastic=0, intensity=0, veil=0,
)  # fmt: skip
QUICK = TrainConfig(max_steps=6, crop=32, batch=2, device="cpu", pseudo_share=0.5, pseudo_ramp=0.5, consistency=0.5)


def silent(step, values):
    return None


def drawn(tmp_path, n, first=0):
    found = []
    for i in range(first, first + n):
        pixels, cells = draw_cells(np.random.default_rng(i), (64, 64), 5)
        path = tmp_path / f"{i}.png"
        write_png(pixels, path)
        found.append(Sample(ImageRef(f"{i}", path, f"hash {i}", 64, 64, 3), cells))
    return found


def in_part(sample, *, told):
    """One of five cells drawn; `told`: the done area is what lies around them, else the image passes for complete."""
    kept, hidden = sample.instances.take([0]), sample.instances.take([1, 2, 3, 4])
    around = cv2.dilate((to_label_image(hidden) > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    known = ~around | (to_label_image(kept) > 0)
    return sample._replace(instances=kept, known=known if told else None)


def belief_in_hidden_cells(samples, taught):
    """How likely a net thinks the inside of the four cells that it was not shown, less the ground's likelihood."""
    trained = train(taught, MODEL, BY_HEART, log=silent)
    segmenter = Segmenter(trained.net, MODEL, InstanceConfig(), device="cpu")
    inside, ground = [], []
    for sample in samples:
        interior = segmenter.maps(read_image(sample.image.path).pixels)[0]
        labels = to_label_image(sample.instances)
        inside.append(interior[labels > 1].mean())
        ground.append(interior[labels == 0].mean())
    return float(np.mean(inside) - np.mean(ground))


def test_cells_outside_the_done_area_and_doubtful_ones_are_not_learnt_as_background(tmp_path):
    samples = drawn(tmp_path, 2)
    told = belief_in_hidden_cells(samples, [in_part(sample, told=True) for sample in samples])
    untold = belief_in_hidden_cells(samples, [in_part(sample, told=False) for sample in samples])
    weights = np.array([1, 0, 0, 0, 0], np.float32)
    open_ones = [s._replace(instances=replace(s.instances, weights=weights)) for s in samples]
    doubtful = belief_in_hidden_cells(samples, open_ones)
    assert told > untold + 0.2
    assert doubtful > untold + 0.2


def test_pseudo_labelled_images_change_what_is_learnt_and_the_same_ones_repeat_it(tmp_path):
    labelled, pseudo = drawn(tmp_path, 2), drawn(tmp_path, 2, first=2)
    alone, one, two = (train(labelled, SMALL, QUICK, log=silent, pseudo=p) for p in ([], pseudo, pseudo))
    assert one.losses == two.losses != alone.losses
    for left, right in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.fixture
def always_store(monkeypatch):
    monkeypatch.setattr(trainer, "STORE_EVERY_S", 0.0)


@pytest.mark.usefixtures("always_store")
def test_a_mixed_training_resumes_as_if_it_had_not_been_killed(tmp_path):
    labelled, pseudo = drawn(tmp_path, 2), drawn(tmp_path, 2, first=2)
    whole = train(labelled, SMALL, QUICK, log=silent, pseudo=pseudo)

    def stop_at_three():
        stop_at_three.asked += 1
        if stop_at_three.asked == 3:
            raise KeyboardInterrupt
        return False

    stop_at_three.asked = 0
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train(labelled, SMALL, QUICK, log=silent, pseudo=pseudo, state_dir=state, should_stop=stop_at_three)
    again = train(labelled, SMALL, QUICK, log=silent, pseudo=pseudo, state_dir=state)
    assert again.losses == whole.losses
    for left, right in zip(again.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.usefixtures("always_store")
def test_the_state_of_a_training_with_other_pseudo_labels_is_refused(tmp_path):
    labelled, pseudo = drawn(tmp_path, 2), drawn(tmp_path, 2, first=2)
    state = tmp_path / "state"
    train(labelled, SMALL, QUICK, log=silent, pseudo=pseudo, state_dir=state)
    with pytest.raises(CheckpointError, match="other"):
        train(labelled, SMALL, QUICK, log=silent, state_dir=state)
    half = [s._replace(instances=replace(s.instances, weights=s.instances.weights / 2)) for s in pseudo]
    with pytest.raises(CheckpointError, match="other"):
        train(labelled, SMALL, QUICK, log=silent, pseudo=half, state_dir=state)
