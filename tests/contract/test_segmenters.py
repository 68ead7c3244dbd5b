"""What every network in SEGMENTERS must hold."""

import numpy as np
import pytest
import torch

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.errors import ShapeError
from loop.models import SEGMENTERS
from loop.models.blocks import initialise
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import load_checkpoint, save_checkpoint
from loop.training.trainer import criterion

ALL = pytest.mark.parametrize("name", SEGMENTERS)


def build(name, in_channels=3, seed=0):
    config = ModelConfig(name=name, in_channels=in_channels, base=4, depth=2)
    net = SEGMENTERS[name](config)
    initialise(net, torch.Generator().manual_seed(seed))
    return net, config


@ALL
@pytest.mark.parametrize("in_channels", [1, 3])
def test_forward_gives_two_maps_of_the_images_size_and_embed_one_vector(name, in_channels):
    net, _ = build(name, in_channels)
    x = torch.rand(2, in_channels, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, embedding = net(x), net.embed(x)
    assert net.heads == ("interior", "border")
    assert logits.shape == (2, 2, 64, 64)
    assert embedding.shape[0] == 2
    assert embedding.ndim == 2
    assert bool(torch.isfinite(logits).all())


@ALL
def test_train_and_eval_give_the_same_type(name):
    net, _ = build(name)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert type(net.train()(x)) is type(net.eval()(x)) is torch.Tensor


@ALL
@pytest.mark.parametrize("cells", [True, False])
def test_backward_reaches_every_parameter_also_without_cells(name, cells):
    net, _ = build(name)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(1, 2, 64, 64)
    if cells:
        target[:, :, 20:40, 20:40] = 1
    criterion(net(x), target, torch.ones(1, 1, 64, 64), TrainConfig()).backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())
    assert any(bool(p.grad.abs().sum() > 0) for p in net.parameters())


@ALL
def test_one_image_gives_the_same_alone_and_in_a_batch(name):
    net, _ = build(name)
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]), atol=1e-4, rtol=1e-4)


@ALL
def test_save_and_load_give_equal_output(name, tmp_path):
    net, config = build(name)
    save_checkpoint(tmp_path, net, config, InstanceConfig())
    loaded = load_checkpoint(tmp_path, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    before = Segmenter(net, config, InstanceConfig(), device="cpu").maps(pixels)
    after = Segmenter(loaded.net, loaded.model_config, loaded.instance_config, device="cpu").maps(pixels)
    np.testing.assert_array_equal(before, after)


@ALL
def test_a_size_that_does_not_fit_is_refused_with_the_size_to_pad_to(name):
    net, _ = build(name)
    with pytest.raises(ShapeError, match=r"pad to \(68, 64\)"):
        net(torch.zeros(1, 3, 66, 64))
    with pytest.raises(ShapeError, match=r"\(B, 3, H, W\)"):
        net(torch.zeros(1, 1, 64, 64))


@ALL
def test_same_seed_same_weights_whatever_the_global_generator_says(name):
    one, _ = build(name)
    torch.rand(7)
    two, _ = build(name)
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)
