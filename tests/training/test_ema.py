import pytest
import torch
from torch import nn

from loop.training.ema import AveragedWeights


def net_of(value):
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, value)
    return net


def test_by_hand():
    net = net_of(0.0)
    average = AveragedWeights(net, decay=0.5)
    nn.init.constant_(net.weight, 11.0)
    average.update(net, 1)  # decay 2 / 11
    average.update(net, 100)  # decay 0.5
    average.copy_to(net)
    first = 11.0 * 9 / 11
    assert net.weight.item() == pytest.approx((first + 11.0) / 2)


def test_the_net_itself_is_left_alone_until_asked():
    net = net_of(1.0)
    average = AveragedWeights(net, decay=0.9)
    average.update(net_of(5.0), 50)
    assert net.weight.item() == 1.0
    assert torch.is_grad_enabled()
