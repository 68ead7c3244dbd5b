from pathlib import Path

import pytest
import torch
from torch import nn

from loop.config import ModelConfig, load_config
from loop.models import new_net
from loop.models.pix2pix import PatchDiscriminator, Pix2Pix


def image(n=2, side=32, channels=3):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def small(**changes):
    return ModelConfig(name="pix2pix", base=4, depth=3, **changes)


def judge(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(3, 2, 4, **changes)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    net = new_net(small())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(image()), net(image()), rtol=0, atol=0)
        net.train()
        one, two = net(image()), net(image())
    assert not torch.equal(one, two)
    assert torch.equal(net.embed(image()), net.eval().embed(image()))


@pytest.mark.parametrize(("depth", "dropped"), [(2, 1), (3, 2), (4, 3), (5, 3)])
def test_half_is_dropped_after_the_inner_blocks_of_the_decoder(depth, dropped):
    net = Pix2Pix(ModelConfig(base=4, depth=depth))
    kinds = [isinstance(block, nn.Sequential) for block in net.decoder.blocks]
    assert kinds == [True] * dropped + [False] * (depth - dropped)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5] * dropped


def test_skip_connections_carry_fine_detail():
    """One bright pixel moves the logits there, whatever the coarse features say."""
    net = new_net(small(heads=("interior",))).eval()
    for block in net.encoder.blocks[1:]:
        block.register_forward_hook(lambda module, given, features: torch.zeros_like(features))
    dark = torch.zeros(1, 3, 32, 32)
    bright = dark.clone()
    bright[..., 16, 16] = 1
    with torch.no_grad():
        moved = (net(bright) - net(dark)).abs()[0, 0]
    assert float(moved[14:19, 14:19].max()) > 10 * float(moved.median())


def test_its_settings_name_three_planes():
    config = load_config(Path(__file__).parents[2] / "configs" / "model" / "pix2pix.yaml")
    net = new_net(config.model)
    assert isinstance(net, Pix2Pix)
    assert net.heads == ("interior", "border", "distance")
    assert config.train.gan_rate < config.train.learning_rate
    assert config.train.gan_l1_weight == 100


def test_a_score_sees_a_patch_of_seventy_pixels():
    """The gradient of the middle score is nonzero in a square of 70 x 70 px; the norms, which see all, are left out."""
    net = judge(spectral=False)
    for i, layer in enumerate(net.layers):
        if isinstance(layer, nn.GroupNorm):
            net.layers[i] = nn.Identity()
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1.0)
    planes = torch.zeros(1, 2, 160, 160, requires_grad=True)
    scores = net(image(1, 160), planes)
    assert scores.shape == (1, 1, 18, 18)
    scores[0, 0, 9, 9].backward()
    rows, columns = (planes.grad[0, 0] != 0).any(dim=1), (planes.grad[0, 0] != 0).any(dim=0)
    assert int(rows.sum()) == int(columns.sum()) == 70


def test_spectral_norm_keeps_the_largest_singular_value_at_one():
    net = judge()
    for _ in range(30):  # each pass in training mode takes the power iteration a step further
        net(image(1, 32), torch.rand(1, 2, 32, 32))
    net.eval()
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d):
            values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
            assert float(values[0]) == pytest.approx(1, abs=0.05)


def test_plain_weights_are_drawn_small():
    convs = [layer for layer in judge(spectral=False).layers if isinstance(layer, nn.Conv2d)]
    assert [tuple(layer.weight.shape[:2]) for layer in convs] == [(4, 5), (8, 4), (16, 8), (32, 16), (1, 32)]
    assert float(convs[3].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_it_judges_the_image_together_with_the_planes():
    net = judge().eval()
    planes = torch.rand(1, 2, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(net(image(1), planes), net(1 - image(1), planes))
        assert not torch.allclose(net(image(1), planes), net(image(1), 1 - planes))
