import math

import pytest
import torch

from loop.losses.consistency import consistency_loss


def test_it_is_zero_where_both_agree_and_grows_with_the_difference():
    teacher = torch.tensor([0.9, 0.05, 0.99])
    agree = consistency_loss(torch.logit(teacher), teacher)
    assert float(agree) == pytest.approx(0, abs=1e-6)
    near, far = (consistency_loss(torch.logit(torch.tensor([p, 0.05, 0.99])), teacher) for p in (0.8, 0.3))
    assert 0 < float(near) < float(far)


def test_it_is_the_divergence_of_two_coins_worked_by_hand():
    p, q = 0.9, 0.6
    by_hand = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = consistency_loss(torch.logit(torch.tensor([q])), torch.tensor([p]))
    assert float(found) == pytest.approx(by_hand, rel=1e-5)


def test_unsure_pixels_do_not_count():
    teacher = torch.tensor([0.9, 0.55])
    logits = torch.tensor([0.0, 3.0])
    assert float(consistency_loss(logits, teacher)) == pytest.approx(
        float(consistency_loss(logits[:1], teacher[:1])), rel=1e-6
    )


@pytest.mark.parametrize("teacher", [torch.full((2, 1, 4, 4), 0.5), torch.zeros((0, 1, 4, 4))])
def test_without_a_sure_pixel_it_is_zero_and_has_a_gradient(teacher):
    logits = torch.zeros_like(teacher, requires_grad=True)
    loss = consistency_loss(logits, teacher)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_no_gradient_goes_into_the_teacher():
    teacher = torch.tensor([0.9], requires_grad=True)
    consistency_loss(torch.tensor([0.1], requires_grad=True), teacher).backward()
    assert teacher.grad is None
