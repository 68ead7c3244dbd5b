import math

import numpy as np
import pytest
import torch

from loop.errors import ConfigError, ShapeError
from loop.losses.overlap import overlap_loss

ALPHA, GAMMA = 0.25, 2.0


def tensors(seed=0, shape=(2, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = (torch.rand(shape, generator=generator) > 0.6).double()
    probability = torch.rand(shape, generator=generator).double()
    weight = (torch.rand(shape, generator=generator) * 2).double()
    weight[0, 0] = 0
    return logits, target, probability, weight


def focal(logit, y):
    p = 1 / (1 + math.exp(-logit))
    return -ALPHA * (1 - p) ** GAMMA * y * math.log(p) - (1 - ALPHA) * p**GAMMA * (1 - y) * math.log(1 - p)


def by_hand(logits, target, probability, weight, use):
    total, weights = 0.0, 0.0
    for s, y, p, w in zip(*(t.flatten().tolist() for t in (logits, target, probability, weight)), strict=True):
        total += w * (focal(s, y * (1 - 0.25 * p)) if use == "target" else p * focal(s, y))
        weights += w
    return total / weights


@pytest.mark.parametrize("use", ["target", "loss"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_uses_by_hand(use, seed):
    given = tensors(seed)
    logits, target, probability, weight = given
    found = overlap_loss(logits, target, probability, weight, use=use, alpha=ALPHA, gamma=GAMMA)
    assert found.shape == ()
    assert float(found) == pytest.approx(by_hand(*given, use), rel=1e-5)


@pytest.mark.parametrize("use", ["target", "loss"])
def test_without_a_map_it_is_the_focal_loss(use):
    logits, target, _, weight = tensors()
    found = overlap_loss(logits, target, None, weight, use=use, alpha=ALPHA, gamma=GAMMA)
    expected = by_hand(logits, target, torch.ones_like(target), weight, "loss")
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_target_use_still_teaches_an_overlap_where_the_probability_is_one():
    logits = torch.zeros(1, 1, 1, requires_grad=True)
    one = torch.ones(1, 1, 1)
    for _ in range(2000):
        loss = overlap_loss(logits, one, one, one, use="target", alpha=ALPHA, gamma=GAMMA)
        (step,) = torch.autograd.grad(loss, logits)
        logits = (logits - 5 * step).detach().requires_grad_()
    grid = np.linspace(1e-4, 1 - 1e-4, 99999)  # the minimum of the loss of y' = 0.75, looked for on a grid
    values = -ALPHA * (1 - grid) ** 2 * 0.75 * np.log(grid) - 0.75 * grid**2 * 0.25 * np.log(1 - grid)
    assert grid[values.argmin()] == pytest.approx(0.5, abs=1e-3)
    assert float(logits.detach().sigmoid()) == pytest.approx(0.5, abs=1e-2)


def test_loss_use_teaches_more_where_cells_are_near_each_other():
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    probability = torch.tensor([[[0.1, 1.0]]])
    target, weight = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    overlap_loss(logits, target, probability, weight, use="loss", alpha=ALPHA, gamma=GAMMA).backward()
    low, high = logits.grad.flatten().tolist()
    assert high == pytest.approx(10 * low, rel=1e-5)


@pytest.mark.parametrize("use", ["target", "loss"])
def test_nothing_that_counts_gives_zero_and_a_finite_gradient(use):
    logits = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    zero = torch.zeros(1, 3, 3)
    value = overlap_loss(logits, zero, torch.ones(1, 3, 3), zero, use=use, alpha=ALPHA, gamma=GAMMA)
    value.backward()
    assert value.item() == 0
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("use", ["target", "loss"])
@pytest.mark.parametrize("sure", [-80.0, 80.0])
def test_sure_logits_stay_finite(use, sure):
    logits, target, probability, weight = tensors()
    value = overlap_loss(torch.full_like(logits, sure), target, probability, weight, use=use, alpha=ALPHA, gamma=GAMMA)
    assert math.isfinite(float(value))


def test_refusals():
    logits, target, probability, weight = tensors()
    with pytest.raises(ConfigError, match="expected target"):
        overlap_loss(logits, target, probability, weight, use="both", alpha=ALPHA, gamma=GAMMA)
    with pytest.raises(ShapeError, match="probability"):
        overlap_loss(logits, target, probability[:1], weight, use="loss", alpha=ALPHA, gamma=GAMMA)
