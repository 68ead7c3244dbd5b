import math

import pytest
import torch
from torch.nn import functional

from loop.losses.focal import binary_focal, focal_terms


def test_focal_by_hand():
    logits = torch.logit(torch.tensor([0.8, 0.3], dtype=torch.float64))
    terms = focal_terms(logits, torch.tensor([1.0, 0.0]), alpha=0.25, gamma=2.0)
    expected = [-0.25 * 0.2**2 * math.log(0.8), -0.75 * 0.3**2 * math.log(0.7)]
    assert terms.tolist() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_by_hand():
    logits = torch.logit(torch.tensor([0.6], dtype=torch.float64))
    terms = focal_terms(logits, torch.tensor([0.25]), alpha=0.4, gamma=1.0)
    expected = -0.4 * 0.4 * 0.25 * math.log(0.6) - 0.6 * 0.6 * 0.75 * math.log(0.4)
    assert terms.tolist() == pytest.approx([expected], rel=1e-5)


def test_without_gamma_and_with_equal_sides_it_is_half_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(50, generator=generator) * 4, torch.rand(50, generator=generator)
    expected = functional.binary_cross_entropy_with_logits(logits, target) / 2
    torch.testing.assert_close(binary_focal(logits, target, torch.ones(50), alpha=0.5, gamma=0.0), expected)


def test_weights_by_hand():
    logits, target = torch.tensor([0.5, -1.0, 7.0]), torch.tensor([1.0, 1.0, 0.0])
    weight = torch.tensor([3.0, 1.0, 0.0])
    terms = focal_terms(logits, target).tolist()
    assert float(binary_focal(logits, target, weight)) == pytest.approx((3 * terms[0] + terms[1]) / 4, rel=1e-6)


def test_what_is_right_costs_nothing_and_the_sure_error_stays_finite():
    logits = torch.tensor([200.0, -200.0], requires_grad=True)
    assert focal_terms(logits, torch.tensor([1.0, 0.0])).tolist() == [0, 0]
    wrong = binary_focal(logits, torch.tensor([0.0, 1.0]), torch.ones(2))
    wrong.backward()
    assert wrong.item() == pytest.approx((0.75 * 200 + 0.25 * 200) / 2)
    assert bool(torch.isfinite(logits.grad).all())


def test_nothing_that_counts_gives_zero_and_a_finite_gradient():
    logits = torch.randn(4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = binary_focal(logits, torch.ones(4), torch.zeros(4))
    value.backward()
    assert value.item() == 0
    assert bool(torch.isfinite(logits.grad).all())
