import math

import pytest
import torch
from torch import nn

from loop.losses.gan import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    lowest_discriminator_loss,
    weighted_l1,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_one_that_can_only_guess_loses_the_logarithm_of_two():
    guess = torch.zeros(2, 1, 3, 3)
    assert float(discriminator_loss(guess, guess)) == pytest.approx(math.log(2))
    assert float(generator_loss(guess)) == pytest.approx(math.log(2))


def test_by_hand():
    real, fake = torch.tensor([math.log(3.0)]), torch.tensor([-math.log(4.0)])  # probabilities 3/4 and 1/5
    plain = -0.5 * (math.log(3 / 4) + math.log(4 / 5))
    smoothed = -0.5 * (0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4) + math.log(4 / 5))
    assert float(discriminator_loss(real, fake)) == pytest.approx(plain, rel=1e-6)
    assert float(discriminator_loss(real, fake, smooth=0.1)) == pytest.approx(smoothed, rel=1e-6)
    assert float(generator_loss(fake)) == pytest.approx(-math.log(1 / 5), rel=1e-6)


@pytest.mark.parametrize("smooth", [0.0, 0.1, 0.3])
def test_no_scores_lose_less_than_the_lowest_loss(smooth):
    lowest = lowest_discriminator_loss(smooth)
    best = torch.tensor([30.0 if smooth == 0 else math.log((1 - smooth) / smooth)])
    assert float(discriminator_loss(best, torch.tensor([-60.0]), smooth=smooth)) == pytest.approx(lowest, abs=1e-6)
    for seed in range(20):
        real, fake = 3 * random(50, seed=seed), 3 * random(50, seed=seed + 100)
        assert float(discriminator_loss(real, fake, smooth=smooth)) > lowest


def test_extreme_scores_stay_finite():
    real = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = discriminator_loss(real, -real, smooth=0.1) + generator_loss(real)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(real.grad).all())


def test_penalty_of_a_linear_judge_by_hand():
    weight = torch.tensor([2.0, -1.0, 2.0], requires_grad=True)  # squared norm 9
    x = random(4, 3).requires_grad_()
    penalty = gradient_penalty(x @ weight, x)
    assert float(penalty.detach()) == pytest.approx(4.5)
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach())  # half the square: its gradient is the weight


def test_penalty_does_not_depend_on_how_often_a_crop_is_seen():
    """Four patches that each see a quarter of a crop cost what one patch costs that sees such a quarter alone."""
    x = random(2, 8).requires_grad_()
    quarters = x.reshape(2, 4, 2).sum(dim=2)
    alone = x[:, :2].sum(dim=1)
    assert float(gradient_penalty(quarters, x).detach()) == pytest.approx(float(gradient_penalty(alone, x).detach()))


def test_penalty_and_its_gradient_against_differences():
    """Both derivatives by central differences, of a small judge in double precision."""
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 2)).double()
    x = random(2, 2, 5, 5).double()

    def penalty():
        total, step = 0.0, 1e-5
        for crop in x:
            for place in range(crop.numel()):
                shift = torch.zeros(crop.numel(), dtype=torch.float64)
                shift[place] = step
                shift = shift.view(crop.shape)
                with torch.no_grad():
                    up, down = judge((crop + shift)[None]).sum(), judge((crop - shift)[None]).sum()
                total += 0.5 * float((up - down) / (2 * step)) ** 2
        return total / (len(x) * 4)  # 2 x 2 scores a crop

    known = x.clone().requires_grad_()
    found = gradient_penalty(judge(known), known)
    assert float(found.detach()) == pytest.approx(penalty(), rel=1e-4)
    found.backward()
    weight = judge[0].weight
    step = 1e-4
    for place in [(0, 0, 0, 0), (2, 1, 1, 2)]:
        with torch.no_grad():
            weight[place] += step
            up = penalty()
            weight[place] -= 2 * step
            down = penalty()
            weight[place] += step
        assert float(weight.grad[place]) == pytest.approx((up - down) / (2 * step), rel=1e-2, abs=1e-8)


def test_l1_by_hand_and_nothing_where_nothing_counts():
    planes = torch.tensor([[[[0.2, 1.0]], [[0.5, 0.0]]]], requires_grad=True)  # (1, 2, 1, 2)
    target = torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]]])
    pixel = torch.tensor([[[[1.0, 0.0]]]])
    heads = torch.tensor([1.0, 3.0])[:, None, None]
    loss = weighted_l1(planes, target, pixel * heads)
    assert float(loss.detach()) == pytest.approx((1 * 0.2 + 3 * 0.5) / 4)
    loss.backward()
    torch.testing.assert_close(planes.grad, torch.tensor([[[[0.25, 0.0]], [[-0.75, 0.0]]]]))
    assert float(weighted_l1(planes, target, 0 * pixel).detach()) == 0


def test_l1_against_numpy_style_sums():
    planes, target, weight = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    above = below = 0.0
    for b in range(2):
        for k in range(3):
            for y in range(4):
                for x in range(5):
                    w = float(weight[b, 0, y, x])
                    above += w * abs(float(planes[b, k, y, x]) - float(target[b, k, y, x]))
                    below += w
    assert float(weighted_l1(planes, target, weight)) == pytest.approx(above / below, rel=1e-5)
