import numpy as np
import pytest
import torch
from torch import nn

from loop.config import InstanceConfig, ModelConfig
from loop.data.intensity import stretch
from loop.errors import ConfigError, NonFiniteError, ShapeError
from loop.models.blocks import initialise
from loop.models.runtime import resolve_device, to_input, uses_bf16
from loop.models.segmenter import Segmenter
from loop.models.seu_net import SEUNet
from loop.uncertainty.measures import FROM_ONE_LOOK, measures_of

CPU = torch.device("cpu")


class Local(nn.Module):
    """A net that looks at single pixels only, so that windows and padding must not show."""

    stride = 8
    heads = ("interior", "border")

    def forward(self, x):
        return torch.cat([8 * x[:, :1] - 4, -8 * x[:, 1:2]], dim=1)

    def embed(self, x):
        return x.mean(dim=(2, 3))


def random_pixels(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def segmenter(net=None, **instances):
    return Segmenter(net or Local(), ModelConfig(), InstanceConfig(**instances), device="cpu", precision="fp32")


def random_net(depth=3):
    model = ModelConfig(base=8, depth=depth)
    net = SEUNet(model)
    initialise(net, torch.Generator().manual_seed(0))
    return net, model


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 3), (64, 64), (65, 130), (200, 90)])
@pytest.mark.parametrize("channels", [1, 3])
def test_windows_padding_and_blending_do_not_show(shape, channels):
    pixels = random_pixels(*shape, channels)
    got = segmenter(tile=64, overlap=16).maps(pixels)
    x = torch.from_numpy(to_input(stretch(pixels)))[None]
    expected = torch.sigmoid(Local()(x))[0].numpy()
    assert (got.shape, got.dtype) == ((2, *shape), np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_overlap_larger_than_the_window_allows_is_cut():
    assert segmenter(tile=64, overlap=100).maps(random_pixels(100, 80)).shape == (2, 100, 80)


def test_a_real_net_gives_nearly_the_same_in_windows_and_at_once():
    net, model = random_net(depth=2)
    smooth = np.repeat(np.repeat(random_pixels(12, 12), 16, axis=0), 16, axis=1)
    whole = Segmenter(net, model, InstanceConfig(tile=512), device="cpu", precision="fp32").maps(smooth)
    parts = Segmenter(net, model, InstanceConfig(tile=128, overlap=64), device="cpu", precision="fp32").maps(smooth)
    assert np.abs(whole - parts).mean() < 0.05


def test_predict_finds_a_bright_disc_and_says_so():
    pixels = np.full((60, 50, 1), 20, np.uint8)
    rows, columns = np.ogrid[:60, :50]
    cell = (rows - 30) ** 2 + (columns - 25) ** 2 <= 64
    pixels[cell] = 220
    got = Segmenter(
        Local(), ModelConfig(), InstanceConfig(), device="cpu", precision="fp32", model_version="m-v3"
    ).predict(pixels, image_id="disc")
    cells = got.instances
    assert (len(cells), cells.image_id, cells.model_version, cells.source) == (1, "disc", "m-v3", "model")
    assert int(cells.masks[0].sum()) == int(cell.sum())
    p = 1 / (1 + np.exp(-4.0))
    assert cells.scores[0] == pytest.approx(p, abs=1e-4)
    assert got.uncertainty == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p), abs=1e-4)
    assert (got.embedding.shape, got.embedding.dtype) == ((3,), np.float32)


def test_a_prediction_carries_all_measures_of_one_look():
    pixels = random_pixels(40, 50)
    got = segmenter(min_score=0.0, min_area=1).predict(pixels, image_id="a")
    seen = segmenter().look(pixels)
    assert tuple(got.measures) == FROM_ONE_LOOK
    assert got.measures == measures_of(seen.interior, got.instances)
    assert got.uncertainty == got.measures["entropy_cells"]


def test_another_network_takes_the_same_settings_and_looks_once():
    first = Segmenter(Local(), ModelConfig(), InstanceConfig(tta=8, tile=64), device="cpu", precision="fp32")
    other = first.with_net(lambda net: nn.Sequential(net))
    assert (other.instance_config.tta, other.instance_config.tile, first.instance_config.tta) == (1, 64, 8)
    assert (other.device, other.model_config) == (first.device, first.model_config)


def test_without_cells_uncertainty_is_that_of_the_frame():
    got = segmenter().predict(np.zeros((30, 30, 3), np.uint8))
    p = 1 / (1 + np.exp(4.0))
    assert len(got.instances) == 0
    assert got.uncertainty == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p), abs=1e-4)


def test_the_embedding_of_a_large_image_costs_no_more_than_a_small_one():
    seen = []

    class Spy(Local):
        def embed(self, x):
            seen.append(tuple(x.shape[2:]))
            return super().embed(x)

    segmenter(Spy()).predict(random_pixels(700, 350))
    segmenter(Spy()).predict(random_pixels(20, 30))
    assert seen == [(256, 128), (24, 32)]


def test_bfloat16_agrees_with_float32():
    net, model = random_net()
    pixels = random_pixels(96, 96)
    full = Segmenter(net, model, InstanceConfig(), device="cpu", precision="fp32").maps(pixels)
    half = Segmenter(net, model, InstanceConfig(), device="cpu", precision="bf16").maps(pixels)
    assert np.abs(full - half).max() < 0.06
    assert np.abs(full - half).mean() < 0.01
    assert not np.array_equal(full, half)


def test_precision_is_chosen_by_what_the_processor_can_do(monkeypatch):
    for capabilities, expected in [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert uses_bf16(CPU, "auto") is expected
        assert uses_bf16(CPU, "bf16")
        assert not uses_bf16(CPU, "fp32")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert uses_bf16(torch.device("cuda"), "auto")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match="no GPU"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="tpu"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == CPU


def test_a_net_that_gives_nan_is_refused_with_the_image_named():
    class Broken(Local):
        def forward(self, x):
            return super().forward(x) * float("nan")

    class BrokenEmbedding(Local):
        def embed(self, x):
            return super().embed(x) * float("inf")

    for net in (Broken(), BrokenEmbedding()):
        with pytest.raises(NonFiniteError, match="plate-2"):
            segmenter(net).predict(random_pixels(20, 20), image_id="plate-2")


def test_wrong_pixels_are_refused():
    with pytest.raises(ShapeError, match=r"\(20, 20\)"):
        segmenter().predict(np.zeros((20, 20), np.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_agrees_with_cpu():
    net, model = random_net()
    pixels = random_pixels(150, 150)
    config = InstanceConfig(tile=64, overlap=16)
    here = Segmenter(net, model, config, device="cpu", precision="fp32").maps(pixels)
    there = Segmenter(net, model, config, device="cuda", precision="fp32").maps(pixels)
    np.testing.assert_allclose(here, there, atol=5e-3)
