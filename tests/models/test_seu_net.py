import pytest
import torch

from loop.config import ModelConfig, load_config
from loop.errors import ConfigError
from loop.models.blocks import ConvBlock, SqueezeExcite
from loop.models.seu_net import SEUNet
from loop.models.unet import UNet


def test_squeeze_and_excitation_by_hand():
    block = SqueezeExcite(2, reduction=1)
    with torch.no_grad():
        for layer in (block.squeeze, block.excite):
            layer.weight.zero_()
            layer.bias.zero_()
        block.squeeze.weight[0, 0] = 1.0  # the mean of channel 0 alone decides
        block.excite.weight[1, 0] = 2.0  # and it moves channel 1 alone
        x = torch.tensor([[[[1.0, 3.0]], [[5.0, 7.0]]]])
        y = block(x)
    torch.testing.assert_close(y[0, 0], 0.5 * x[0, 0])
    torch.testing.assert_close(y[0, 1], torch.sigmoid(torch.tensor(4.0)) * x[0, 1])


def test_every_block_of_encoder_and_decoder_carries_squeeze_and_excitation():
    net = SEUNet(ModelConfig(base=4, depth=3))
    blocks = [m for m in net.modules() if isinstance(m, ConvBlock)]
    assert len(blocks) == len([m for m in net.modules() if isinstance(m, SqueezeExcite)]) == 4 + 3


def test_the_embedding_is_the_average_of_the_bottleneck():
    net = SEUNet(ModelConfig(base=4, depth=2)).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = net.embed(x)
        torch.testing.assert_close(embedding, net.encoder(x)[-1].mean(dim=(2, 3)))
    assert embedding.shape == (2, net.embedding_size)


def test_shared_and_decoupled_decoders_and_their_heads():
    heads = ("interior", "nuclei", "border", "background")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shared, decoupled = (
        SEUNet(ModelConfig(base=4, depth=2, heads=heads, decoders=kind)) for kind in ("shared", "decoupled")
    )
    assert shared.heads == decoupled.heads == heads
    assert shared(x).shape == decoupled(x).shape == (1, 4, 32, 32)
    assert (len(shared.decoders), len(decoupled.decoders)) == (1, 4)
    decoupled.zero_grad()
    decoupled(x)[:, 2].sum().backward()
    taught = [
        any(bool(p.grad.abs().sum() > 0) for p in d.parameters() if p.grad is not None) for d in decoupled.decoders
    ]
    assert taught == [False, False, True, False]


def test_the_plain_unet_is_the_same_without_squeeze_and_excitation():
    config = ModelConfig(base=4, depth=2)
    plain, excited = UNet(config), SEUNet(config)
    assert not [m for m in plain.modules() if isinstance(m, SqueezeExcite)]
    extra = set(excited.state_dict()) - set(plain.state_dict())
    assert extra
    assert all(".excite." in name for name in extra)
    assert set(plain.state_dict()) < set(excited.state_dict())


def test_a_head_named_twice_is_refused():
    with pytest.raises(ConfigError, match="names one twice"):
        load_config(None, {"model.heads": ["interior", "interior"]})


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_smallest_input_is_one_stride(depth):
    net = SEUNet(ModelConfig(base=4, depth=depth)).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, net.stride, net.stride)).shape == (1, 2, 2**depth, 2**depth)


def test_the_config_file_holds_the_defaults(request):
    path = request.config.rootpath / "configs" / "model" / "seu_net.yaml"
    assert load_config(path).model == ModelConfig()
