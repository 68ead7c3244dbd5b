import math

import pytest
import torch

from loop.losses.bce import weighted_bce
from loop.losses.dice import soft_dice

SURE = 40.0


def logits_of(*probs):
    return torch.logit(torch.tensor(probs, dtype=torch.float64))


def test_bce_by_hand():
    target = torch.tensor([1.0, 0.0, 1.0])
    loss = weighted_bce(logits_of(0.5, 0.2, 0.9), target, torch.ones(3))
    assert float(loss) == pytest.approx(-(math.log(0.5) + math.log(0.8) + math.log(0.9)) / 3, rel=1e-6)


def test_bce_weights_by_hand():
    target = torch.tensor([1.0, 0.0])
    loss = weighted_bce(logits_of(0.5, 0.2), target, torch.tensor([3.0, 1.0]))
    assert float(loss) == pytest.approx(-(3 * math.log(0.5) + math.log(0.8)) / 4, rel=1e-6)


def test_dice_by_hand():
    target = torch.tensor([1.0, 1.0, 0.0])
    loss = soft_dice(logits_of(0.5, 0.5, 0.5), target, torch.ones(3), smooth=0.0)
    assert float(loss) == pytest.approx(1 - 2 * 1.0 / (1.5 + 2), rel=1e-6)


@pytest.mark.parametrize("loss", [weighted_bce, soft_dice])
def test_a_perfect_prediction_costs_nothing_and_its_opposite_most(loss):
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    perfect, opposite = SURE * (2 * target - 1), SURE * (1 - 2 * target)
    assert float(loss(perfect, target, torch.ones(2, 2))) == pytest.approx(0, abs=1e-6)
    half = float(loss(torch.zeros(2, 2), target, torch.ones(2, 2)))
    assert half < float(loss(opposite, target, torch.ones(2, 2)))


@pytest.mark.parametrize("loss", [weighted_bce, soft_dice])
def test_an_empty_target_costs_nothing_when_nothing_is_predicted_and_more_the_more_is(loss):
    empty = torch.zeros(8, 8)
    nothing = float(loss(torch.full((8, 8), -SURE), empty, torch.ones(8, 8)))
    some = torch.full((8, 8), -SURE)
    some[:2] = SURE
    more = torch.full((8, 8), SURE)
    assert nothing == pytest.approx(0, abs=1e-6)
    assert nothing < float(loss(some, empty, torch.ones(8, 8))) < float(loss(more, empty, torch.ones(8, 8)))


@pytest.mark.parametrize("loss", [weighted_bce, soft_dice])
def test_pixels_of_weight_zero_do_not_count(loss):
    target = torch.tensor([1.0, 0.0, 1.0, 0.0])
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0])
    one = loss(torch.tensor([1.0, -2.0, 9.0, 9.0]), target, weight)
    other = loss(torch.tensor([1.0, -2.0, -9.0, 3.0]), target, weight)
    assert float(one) == float(other)


@pytest.mark.parametrize("loss", [weighted_bce, soft_dice])
def test_nothing_that_counts_gives_zero_and_a_finite_gradient(loss):
    logits = torch.randn(4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = loss(logits, torch.ones(4), torch.zeros(4))
    value.backward()
    assert value.item() == 0
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("loss", [weighted_bce, soft_dice])
def test_order_of_pixels_does_not_matter(loss):
    generator = torch.Generator().manual_seed(1)
    logits, target = torch.randn(50, generator=generator), torch.rand(50, generator=generator).round()
    weight = torch.rand(50, generator=generator)
    order = torch.randperm(50, generator=generator)
    shuffled = loss(logits[order], target[order], weight[order])
    assert float(shuffled) == pytest.approx(float(loss(logits, target, weight)), rel=1e-5)
