import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import CropStream
from loop.data.store import write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError, InputError
from loop.losses.consistency import consistency_loss
from loop.models import SEGMENTERS
from loop.models.seu_net import SEUNet
from loop.training.criterion import taught
from loop.training.distributed import Group
from loop.training.learner import Learner, ramped
from loop.types import ImageRef, Instances, Sample

ALONE = Group(0, 1, torch.device("cpu"))
DENSE = ModelConfig(base=4, depth=2)
SPARSE = ModelConfig(name="sparse_seu_net", base=4, depth=2, queries=20, width=8, overlap=False, objectness=True)
FOUR = TrainConfig(crop=32, batch=4, device="cpu", precision="fp32", dice=False, pseudo_share=0.5, consistency=0.5)


def config(**changes):
    return TrainConfig(**{**FOUR.model_dump(), **changes})


@pytest.fixture
def samples(tmp_path):
    found = []
    for i in range(3):
        pixels, cells = draw_cells(np.random.default_rng(i), (64, 64), 5)
        write_png(pixels, tmp_path / f"{i}.png")
        found.append(Sample(ImageRef(f"{i}", tmp_path / f"{i}.png", "", 64, 64, 3), cells))
    return found


def taught_by(samples, model, settings, batches_of):
    """The loss of a first step and the gradients it leaves, clipped; `batches_of` cuts up one batch of four crops."""
    learner = Learner(model, settings, ALONE)
    batch = CropStream(samples, model, FOUR, learner.lesson).batch(0)
    loss = learner.step(batches_of(batch), 1e-3)
    return float(loss), [p.grad for p in learner.net.parameters()], learner


def whole(batch):
    return [batch]


def halves(batch):
    return [batch.part(0, 2), batch.part(2, 4)]


def assert_close(one, two):
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    for left, right in zip(one[1], two[1], strict=True):
        assert torch.allclose(left, right, rtol=1e-3, atol=1e-5)


def test_two_batches_teach_what_one_of_twice_the_size_does(samples):
    assert_close(taught_by(samples, DENSE, FOUR, whole), taught_by(samples, DENSE, config(batch=2), halves))


def test_with_dice_they_teach_nearly_that(samples):
    one = taught_by(samples, DENSE, config(dice=True), whole)
    two = taught_by(samples, DENSE, config(dice=True, batch=2), halves)
    assert one[0] == pytest.approx(two[0], rel=0.1)
    assert one[0] != pytest.approx(two[0], rel=1e-6)
    left, right = (torch.cat([g.flatten() for g in taught[1]]) for taught in (one, two))
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.97


class Greedy(SEUNet):
    """A net that runs out of memory with more than one image at once."""

    def forward(self, x):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)


def test_pieces_that_fit_teach_what_the_batch_does(samples, monkeypatch, caplog):
    monkeypatch.setitem(SEGMENTERS, "greedy", Greedy)
    greedy = ModelConfig(**{**DENSE.model_dump(), "name": "greedy"})
    with caplog.at_level(logging.WARNING):
        pieces = taught_by(samples, greedy, FOUR, whole)
    assert [r.getMessage().split(": ")[-1] for r in caplog.records] == ["halved to 2", "halved to 1"]
    assert_close(pieces, taught_by(samples, DENSE, FOUR, whole))
    caplog.clear()
    pieces[2].step([CropStream(samples, DENSE, FOUR).batch(1)], 1e-3)
    assert not caplog.records


def test_several_processes_are_told_what_to_set_instead(samples, monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "greedy", Greedy)
    learner = Learner(ModelConfig(**{**DENSE.model_dump(), "name": "greedy"}), config(accumulate=3), ALONE)
    learner._group = Group(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"one of the 2 GPUs; set train.batch: 2 and train.accumulate: 6"):
        learner.step([CropStream(samples, DENSE, FOUR).batch(0)], 1e-3)


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_every_parameter_gets_a_gradient_even_without_a_cell(tmp_path, model):
    pixels, none = draw_cells(np.random.default_rng(0), (64, 64), 0)
    write_png(pixels, tmp_path / "e.png")
    empty = [Sample(ImageRef("e", tmp_path / "e.png", "", 64, 64, 3), none)]
    _, gradients, _ = taught_by(empty, model, FOUR, whole)
    assert all(gradient is not None for gradient in gradients)


def test_what_was_stored_goes_on_bit_for_bit_with_the_same_strides(samples):
    _, _, first = taught_by(samples, DENSE, FOUR, whole)
    second = Learner(DENSE, FOUR, ALONE)
    second.restore(first.tensors(), first.steps)
    batch = CropStream(samples, DENSE, FOUR, first.lesson).batch(1)
    assert float(first.step([batch], 1e-3)) == float(second.step([batch], 1e-3))
    assert first.steps == second.steps == 2
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    for parameter in second.net.parameters():
        assert second._optimiser.state[parameter]["exp_avg"].stride() == parameter.stride()


def broken_compile(net):
    def call(*args, **kwargs):
        raise RuntimeError("no compiler found\nand a long tail")

    return call


def test_a_net_that_cannot_be_compiled_is_refused_where_it_was_asked_for(samples, monkeypatch):
    monkeypatch.setattr(torch, "compile", broken_compile)
    with pytest.raises(ConfigError, match=r"\(no compiler found\); install .* or set train.compile: off"):
        taught_by(samples, DENSE, config(compile="on"), whole)


def test_without_a_working_compiler_auto_goes_on_uncompiled(samples, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", broken_compile)
    expected = taught_by(samples, DENSE, FOUR, whole)
    learner = Learner(DENSE, FOUR, ALONE)
    learner._call, learner._proven = broken_compile(learner.net), False  # as auto leaves it on a GPU
    batch = CropStream(samples, DENSE, FOUR, learner.lesson).batch(0)
    with caplog.at_level(logging.WARNING):
        assert float(learner.step([batch], 1e-3)) == expected[0]
    assert ["(no compiler found): it is trained uncompiled" in r.getMessage() for r in caplog.records] == [True]


def test_an_error_of_the_net_itself_is_not_taken_for_the_compilers(samples, monkeypatch):
    class Broken(SEUNet):
        def forward(self, x):
            raise RuntimeError("of the net")

    monkeypatch.setitem(SEGMENTERS, "broken", Broken)
    with pytest.raises(RuntimeError, match="of the net"):
        taught_by(samples, ModelConfig(**{**DENSE.model_dump(), "name": "broken"}), FOUR, whole)


def test_on_a_cpu_auto_does_not_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", broken_compile)
    learner = Learner(DENSE, config(compile="auto"), ALONE)
    assert learner._call is learner.net


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
@pytest.mark.skipif(
    "CELLOOP_SLOW_TESTS" not in os.environ, reason="compiling takes most of a minute of one core; set it to 1"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_net_teaches_what_an_uncompiled_one_does(samples):
    assert_close(
        taught_by(samples, DENSE, config(compile="on"), whole), taught_by(samples, DENSE, FOUR, whole)
    )  # fmt: skip


def test_more_cells_than_a_crop_may_hold_are_refused_by_name(tmp_path):
    masks = np.zeros((64, 64), np.int32)
    write_png(np.full((64, 64, 3), 50, np.uint8), tmp_path / "pile.png")
    boxes = [(20, 20, 44, 44)] * 30
    cells = type(draw_cells(np.random.default_rng(0), (64, 64), 1).instances).build(
        masks.shape, boxes, [np.ones((24, 24), np.bool_)] * 30
    )
    sample = Sample(ImageRef("pile", tmp_path / "pile.png", "", 64, 64, 3), cells)
    with pytest.raises(InputError, match=r"pile: more than 18 cells .* model.queries"):
        taught_by([sample], SPARSE, FOUR, whole)


def test_the_ramp_scales_what_pseudo_crops_teach(samples):
    settings = config(consistency=0.0)
    learner = Learner(DENSE, settings, ALONE)
    batch = CropStream(samples[:1], DENSE, settings, learner.lesson, samples[1:]).batch(0)
    truth = taught(batch, ALONE.device)
    half, factor = ramped(truth, batch, 0.5)
    expected = batch.weight * np.where(batch.pseudo, 0.5, 1.0).astype(np.float32)[:, None, None, None]
    np.testing.assert_allclose(half.weight.numpy(), expected)
    assert factor == 1
    assert ramped(truth, batch, 1.0) == (truth, 1)
    without, _ = ramped(truth, batch, 0.0)
    assert not without.weight[torch.from_numpy(batch.pseudo)].any()


@pytest.mark.parametrize("model", [DENSE, SPARSE])
@pytest.mark.parametrize("crops", [1, 2])
def test_the_ramp_holds_where_all_crops_are_pseudo_labelled(samples, model, crops):
    """The losses are means over the weights, so weights that are all a tenth would teach as much as ones."""
    found = []
    for ramp in (1.0, 0.1):
        learner = Learner(model, config(dice=True), ALONE)
        batch = CropStream(samples, model, FOUR, learner.lesson).batch(0).part(0, crops)
        learner._ramp = ramp
        loss = learner._gradients([batch._replace(pseudo=np.ones(crops, bool))])
        found.append([loss, *(p.grad for p in learner.net.parameters())])
    for whole_lesson, tenth in zip(*found, strict=True):
        torch.testing.assert_close(tenth, 0.1 * whole_lesson, rtol=1e-3, atol=1e-6)


def test_the_ramp_scales_the_cells_of_a_sparse_network(samples):
    learner = Learner(SPARSE, FOUR, ALONE)
    batch = CropStream(samples[:1], SPARSE, FOUR, learner.lesson, samples[1:]).batch(0)
    scaled, _ = ramped(taught(batch, ALONE.device), batch, 0.25)
    for is_pseudo, before, after in zip(batch.pseudo, batch.mask_weights, scaled.mask_weights, strict=True):
        np.testing.assert_allclose(after.numpy(), before * (0.25 if is_pseudo else 1.0))


def test_consistency_adds_the_distance_to_the_averaged_weights_on_pseudo_crops(samples):
    plain, strict = (Learner(DENSE, config(consistency=weight), ALONE) for weight in (0.0, 2.0))
    stream = CropStream(samples[:1], DENSE, config(consistency=2.0), plain.lesson, samples[1:])
    batch = stream.batch(0)
    chosen = torch.from_numpy(batch.pseudo)
    with torch.no_grad():
        strong, weak = (plain.net(torch.from_numpy(images))[chosen] for images in (batch.image, batch.weak))
        expected = 2.0 * consistency_loss(strong, torch.sigmoid(weak))
    losses = [float(learner.step([batch], 1e-3)) for learner in (plain, strict)]
    assert losses[1] - losses[0] == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("model", [DENSE, SPARSE, SPARSE.model_copy(update={"overlap": True})])
def test_every_family_learns_from_pseudo_crops(samples, model):
    cells = [replace(sample.instances, weights=np.full(len(sample.instances), 0.6, np.float32)) for sample in samples]
    overlapping = [sample._replace(instances=both(own)) for sample, own in zip(samples, cells, strict=True)]
    learner = Learner(model, FOUR, ALONE)
    batch = CropStream(overlapping[:1], model, FOUR, learner.lesson, overlapping[1:]).batch(0)
    assert np.isfinite(float(learner.step([batch], 1e-3, 0.5)))


def both(cells):
    """The cells, the first of them twice, a pixel apart."""
    boxes = np.concatenate([cells.boxes_xyxy, cells.boxes_xyxy[:1]])
    weights = np.concatenate([cells.weights, cells.weights[:1]])
    return Instances.build(cells.shape, boxes, [*cells.masks, cells.masks[0]], weights=weights)


@pytest.mark.parametrize("name", ["unet", "sparse_seu_net"])
def test_dropout_is_drawn_from_the_seed_and_the_step_whatever_the_global_generator(samples, name):
    model = ModelConfig(name=name, base=4, depth=2, queries=20, width=8, dropout=0.5)

    def weights(noise):
        learner = Learner(model, FOUR, ALONE)
        stream = CropStream(samples, model, FOUR, learner.lesson)
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            before = torch.random.get_rng_state()
            for number in range(3):
                learner.step([stream.batch(number)], 1e-2)
            assert torch.equal(torch.random.get_rng_state(), before)
        return torch.cat([parameter.detach().flatten() for parameter in learner.net.parameters()])

    assert torch.equal(weights(1), weights(2))
