import math

import numpy as np
import pytest
import torch

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import Batch, CropStream
from loop.data.store import write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError
from loop.losses.gan import lowest_discriminator_loss
from loop.training import adversarial
from loop.training.adversarial import FIGURES, AdversarialLearner, Losses, Watch
from loop.training.distributed import Group
from loop.types import ImageRef, Sample

ALONE = Group(0, 1, torch.device("cpu"))
NET = ModelConfig(name="pix2pix", base=4, depth=2, heads=("interior", "border", "distance"))
FOUR = TrainConfig(crop=32, batch=4, device="cpu", precision="fp32", learning_rate=2e-3, ema=0.9)
FLOOR = lowest_discriminator_loss(0.1)
WELL = Losses(0.2, 1.0, 0.5)


def config(**changes):
    return TrainConfig(**{**FOUR.model_dump(), **changes})


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    found = []
    for i in range(3):
        pixels, cells = draw_cells(np.random.default_rng(i), (64, 64), 6)
        write_png(pixels, folder / f"{i}.png")
        found.append(Sample(ImageRef(f"{i}", folder / f"{i}.png", "", 64, 64, 3), cells))
    return found


def run(samples, steps, settings=FOUR, learner=None, rate=None, **kinds):
    """Steps of a learner, a new one where none is given; the batches are those of its step numbers."""
    learner = learner or AdversarialLearner(NET, settings, ALONE, **kinds)
    stream = CropStream(samples, NET, settings, learner.lesson)
    losses = []
    for _ in range(steps):
        numbers = [learner.steps * settings.accumulate + k for k in range(settings.accumulate)]
        losses.append(float(learner.step([stream.batch(k) for k in numbers], rate or settings.learning_rate)))
    return learner, losses


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def said(series, floor=FLOOR):
    """What a watch says first of a series of losses, and the number of the step; ("", steps) if nothing."""
    watch = Watch(floor)
    for number, losses in enumerate(series, start=1):
        reason = watch.take(losses)
        if reason:
            return reason, number
    return "", len(series)


def test_a_short_run_lowers_the_error_of_the_planes(samples):
    learner, _ = run(samples, 10)
    first = learner.figures()
    run(samples, 60, learner=learner)
    learner.figures()
    run(samples, 10, learner=learner)
    last = learner.figures()
    assert learner.ended == ""
    assert set(first) == set(FIGURES)
    assert last["loss_l1"] < 0.6 * first["loss_l1"]
    assert 0 < last["score_fake"] < last["score_real"] < 1
    assert learner.figures() == {}
    assert not learner.finish().training


def test_without_adversary_the_loss_is_the_error_of_the_planes(samples):
    """The first loss by hand, from the planes that the same dropout gives."""
    settings = config(gan_l1_weight=50.0, border_weight=3.0)
    learner = AdversarialLearner(NET, settings, ALONE)
    batch = CropStream(samples, NET, settings, learner.lesson).batch(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with torch.no_grad():
            planes = learner.net(torch.from_numpy(batch.image)).sigmoid().numpy()
    errors = np.abs(planes - batch.target).mean(axis=(0, 2, 3))
    loss = float(learner.step([batch], 1e-3))
    figures = learner.figures()
    assert figures["loss_l1"] == pytest.approx(float(np.average(errors, weights=[1, 3, 1])), rel=1e-4)
    assert loss == pytest.approx(50 * figures["loss_l1"] + figures["loss_adversarial"], rel=1e-5)


def test_pixels_that_do_not_count_teach_neither_network(samples):
    batch = CropStream(samples, NET, FOUR, AdversarialLearner(NET, FOUR, ALONE).lesson).batch(0)
    weight = batch.weight.copy()
    weight[:, :, 10:30] = 0
    other = batch.target.copy()
    other[:, :, 10:30] = 1 - other[:, :, 10:30]
    found = []
    for target in (batch.target, other):
        learner = AdversarialLearner(NET, FOUR, ALONE)
        learner.step([batch._replace(target=target, weight=weight)], 1e-3)
        found.append(copied(learner.tensors()))
    assert same(*found)


def test_pseudo_labelled_crops_count_as_the_ramp_says(samples):
    batch = CropStream(samples, NET, FOUR, AdversarialLearner(NET, FOUR, ALONE).lesson).batch(0)
    pseudo = np.array([True, True, False, False])
    blank = batch.weight * ~pseudo[:, None, None, None]
    found = []
    for given, ramp in ((batch._replace(pseudo=pseudo), 0.0), (batch._replace(weight=blank), 1.0)):
        learner = AdversarialLearner(NET, FOUR, ALONE)
        learner.step([given], 1e-3, ramp)
        found.append(copied(learner.tensors()))
    assert same(*found)


def test_the_ramp_holds_for_both_networks_where_all_crops_are_pseudo_labelled(samples):
    batch = CropStream(samples, NET, FOUR, AdversarialLearner(NET, FOUR, ALONE).lesson).batch(0)
    batch = batch._replace(pseudo=np.ones(4, bool))
    found = []
    for ramp in (1.0, 0.01):
        learner = AdversarialLearner(NET, config(gan_l1_weight=1.0), ALONE)  # gradients that are not clipped
        loss = learner.step([batch], 1e-3, ramp)
        nets = (learner.net, learner.discriminator)
        found.append([float(loss), *(torch.cat([p.grad.flatten() for p in net.parameters()]) for net in nets)])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(part), 0.01 * torch.as_tensor(whole), rtol=1e-3, atol=1e-7)


def test_pieces_teach_what_the_whole_does(samples, monkeypatch):
    """Both networks get the same gradients from a batch and from its halves; dropout, drawn anew, is left out."""
    monkeypatch.setattr("loop.models.pix2pix.DROPOUT", 0.0)
    batch = CropStream(samples, NET, FOUR, AdversarialLearner(NET, FOUR, ALONE).lesson).batch(0)
    grads = []
    for parts in ([batch], [batch.part(0, 2), batch.part(2, 4)]):
        learner = AdversarialLearner(NET, FOUR, ALONE, spectral=False)  # the power iteration moves with each pass
        learner.step(parts, 1e-3)
        grads.append([p.grad for net in (learner.net, learner.discriminator) for p in net.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_the_discriminators_rate_falls_with_the_generators(samples):
    learner, _ = run(samples, 1, config(gan_rate=6e-4), rate=1e-3)
    assert [options["lr"] for options in learner._opponent.param_groups] == [pytest.approx(3e-4)]
    assert [options["lr"] for options in learner._optimiser.param_groups] == [1e-3]
    assert learner._optimiser.param_groups[0]["betas"] == (0.5, 0.999)


def test_the_same_seed_gives_the_same_and_leaves_torchs_generator_alone(samples):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, _ = run(samples, 3)
    two, _ = run(samples, 3)
    other, _ = run(samples, 3, config(seed=1))
    assert same(one.tensors(), two.tensors())
    assert not torch.equal(one.average.tensors[0], other.average.tensors[0])
    learner = AdversarialLearner(NET, FOUR, ALONE)
    stream = CropStream(samples, NET, FOUR, learner.lesson)
    torch.set_rng_state(before)
    learner.step([stream.batch(0)], 1e-3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_learner_goes_on_bit_by_bit(samples):
    settings = config(accumulate=2, batch=2)
    whole, losses = run(samples, 25, settings)
    half, _ = run(samples, 21, settings)
    stored = copied(half.tensors())
    again = AdversarialLearner(NET, settings, ALONE)
    again.restore(stored, 21)
    assert same(again.tensors(), stored)
    _, rest = run(samples, 4, settings, learner=again)
    assert rest == losses[21:]
    assert same(again.tensors(), whole.tensors())


def test_steps_gone_wild_end_with_the_last_good_weights(samples):
    learner, _ = run(samples, 50)
    error = learner.figures()["loss_l1"]
    before = [tensor.clone() for tensor in learner.average.tensors]
    run(samples, 60, learner=learner, rate=50.0)
    assert learner.ended
    ended_at, weights = learner.ended, [p.detach().clone() for p in learner.finish().parameters()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)
    distances = [float((one - two).abs().max()) for one, two in zip(weights, before, strict=True)]
    assert max(distances) < 0.5  # a step of that rate moves a weight by 50
    batch = CropStream(samples, NET, FOUR, learner.lesson).batch(0)
    with torch.no_grad():
        planes = learner.net(torch.from_numpy(batch.image)).sigmoid().numpy()
    assert float(np.abs(planes - batch.target).mean()) < error
    learner.net.train()
    loss = learner.step([batch], 1e-3)
    assert math.isfinite(float(loss))
    assert learner.ended == ended_at
    assert all(torch.equal(p, kept) for p, kept in zip(learner.finish().parameters(), weights, strict=True))
    again = AdversarialLearner(NET, FOUR, ALONE)
    again.restore(copied(learner.tensors()), learner.steps)
    assert again.ended == ended_at


@pytest.mark.parametrize("rate", [1e3, 1e8])
def test_wild_from_the_first_step_gives_the_first_weights_back(samples, rate):
    settings = config(gan_rate=rate)
    learner = AdversarialLearner(NET, settings, ALONE)
    first = [tensor.clone() for tensor in learner.average.tensors]
    run(samples, 60, settings, learner=learner, rate=rate)
    assert learner.ended
    assert all(torch.equal(p, kept) for p, kept in zip(learner.finish().parameters(), first, strict=True))


def test_several_processes_are_refused():
    with pytest.raises(ConfigError, match="one process"):
        AdversarialLearner(NET, FOUR, Group(0, 2, torch.device("cpu")))


def test_a_calm_series_is_never_called_over():
    rng = np.random.default_rng(0)
    falling = 0.05 + 0.4 * np.exp(-np.arange(600) / 100)
    series = [Losses(float(e * rng.uniform(0.7, 1.3)), float(rng.uniform(0.5, 5)), 0.4) for e in falling]
    assert said(series) == ("", 600)


@pytest.mark.parametrize("name", Losses._fields)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_at_once(name, value):
    reason, step = said([WELL] * 3 + [WELL._replace(**{name: value})])
    assert step == 4
    assert name in reason
    assert str(value) in reason


def test_planes_that_get_worse_end_it_and_one_bad_batch_does_not():
    assert said([WELL] * 60 + [WELL._replace(l1=0.8)] + [WELL] * 60) == ("", 121)
    reason, step = said([WELL] * 60 + [WELL._replace(l1=0.8)] * 60)
    assert "error rose" in reason
    assert 61 < step <= 80  # 0.2 + 0.6 (1 - 0.95^n) passes 0.4 at n = 8


def test_a_lost_generator_ends_it():
    reason, step = said([WELL] * 60 + [WELL._replace(adversarial=40.0)] * 60)
    assert "ran away" in reason
    assert 61 < step <= 80


def test_a_discriminator_without_error_ends_it_only_when_that_lasts():
    flawless = WELL._replace(discriminator=FLOOR + 0.001)
    assert said([WELL] * 10 + [flawless] * 100 + [WELL] * 60 + [flawless] * 100)[0] == ""
    reason, step = said([WELL] * 10 + [flawless] * 400)
    assert "no error" in reason
    assert 10 + adversarial.LONG < step < 10 + adversarial.LONG + 120


def test_signs_of_trouble_are_no_moment_to_keep_weights():
    watch = Watch(FLOOR)
    for _ in range(60):
        watch.take(WELL)
    assert watch.is_well
    watch.take(WELL._replace(l1=3.0))
    assert not watch.is_well


def test_a_batch_of_ignored_pixels_alone_teaches_nothing_and_is_finite():
    learner = AdversarialLearner(NET, FOUR, ALONE)
    image = np.zeros((4, 3, 32, 32), np.float32)
    empty = Batch(image, np.zeros((4, 3, 32, 32), np.float32), np.zeros((4, 1, 32, 32), np.float32))
    assert math.isfinite(float(learner.step([empty], 1e-3)))
    assert learner.ended == ""
