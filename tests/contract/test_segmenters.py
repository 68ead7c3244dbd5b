"""What every network in SEGMENTERS must hold."""

import numpy as np
import pytest
import torch

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.dataset import Batch
from loop.errors import ShapeError
from loop.models import SEGMENTERS, new_net
from loop.models.segmenter import Segmenter
from loop.models.sparse_seu_net import SparseOutput
from loop.training.checkpoint import load_checkpoint, save_checkpoint
from loop.training.criterion import criterion, lesson_of, taught

BUILDS = {
    "unet": {},
    "unet distance": {"heads": ("interior", "border", "distance")},
    "pix2pix": {"heads": ("interior", "border", "distance")},
    "seu_net": {},
    "seu_net decoupled": {"heads": ("interior", "border", "background"), "decoders": "decoupled"},
    "sparse_seu_net": {"levels": "multi"},
    "sparse_seu_net single": {"levels": "single"},
    "sparse_seu_net aware": {"overlap": True, "objectness": True},
}
ALL = pytest.mark.parametrize("name", BUILDS)
TILES = InstanceConfig(tile=64, min_area=4)


def build(name, in_channels=3, seed=0):
    config = ModelConfig(
        name=name.split()[0], in_channels=in_channels, base=4, depth=2, width=8, queries=12, **BUILDS[name]
    )
    return new_net(config, seed), config


def tensors(output):
    parts = output if isinstance(output, SparseOutput) else [output]
    return [part for part in parts if part is not None]


def test_every_network_is_tried():
    assert {name.split()[0] for name in BUILDS} == set(SEGMENTERS)


@ALL
@pytest.mark.parametrize("in_channels", [1, 3])
def test_forward_gives_finite_logits_for_each_head_and_embed_one_vector(name, in_channels):
    net, config = build(name, in_channels)
    x = torch.rand(2, in_channels, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, embedding = net(x), net.embed(x)
    if isinstance(output, SparseOutput):
        assert output.masks.shape == (2, 12, 64 // config.mask_stride, 64 // config.mask_stride)
        assert output.classes.shape == (2, 12)
    else:
        assert output.shape == (2, len(net.heads), 64, 64)
        assert net.heads == config.heads
    assert all(bool(torch.isfinite(part).all()) for part in tensors(output))
    assert embedding.shape == (2, net.embedding_size)


@ALL
def test_train_and_eval_give_the_same_type(name):
    net, _ = build(name)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert type(net.train()(x)) is type(net.eval()(x))


@ALL
@pytest.mark.parametrize("cells", [True, False])
def test_the_loss_is_finite_and_its_gradient_too_also_without_cells(name, cells):
    net, _ = build(name)
    lesson = lesson_of(net)
    x = np.random.default_rng(1).random((1, 3, 64, 64), dtype=np.float32)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    batch = Batch(
        x,
        np.repeat(mask[None, None] * np.float32(cells), len(lesson.heads), axis=1),
        np.ones((1, 1, 64, 64), np.float32),
        masks=() if lesson.most_cells is None else (mask[None][:cells],),
        mask_weights=() if lesson.most_cells is None else (np.ones(int(cells), np.float32),),
    )
    loss = criterion(net(torch.from_numpy(x)), taught(batch, torch.device("cpu")), lesson.heads, TrainConfig())
    loss.backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)
    if cells:
        assert len(gradients) == len(list(net.parameters()))


@ALL
def test_one_image_gives_the_same_alone_and_in_a_batch(name):
    net, _ = build(name)
    net.eval()
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for together, alone in zip(tensors(net(x)), tensors(net(x[1:2])), strict=True):
            torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


@ALL
def test_save_and_load_give_equal_output(name, tmp_path):
    net, config = build(name)
    save_checkpoint(tmp_path, net, config, TILES)
    loaded = load_checkpoint(tmp_path, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    before = Segmenter(net, config, TILES, device="cpu").maps(pixels)
    after = Segmenter(loaded.net, loaded.model_config, loaded.instance_config, device="cpu").maps(pixels)
    np.testing.assert_array_equal(before, after)


@ALL
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (64, 64), (130, 90)])
def test_any_size_is_predicted_with_maps_and_a_finite_uncertainty(name, shape):
    net, config = build(name)
    segmenter = Segmenter(net, config, TILES, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    prediction = segmenter.predict(pixels, image_id="a")
    assert prediction.instances.shape == shape
    assert prediction.instances.image_id == "a"
    assert np.isfinite(prediction.uncertainty)
    maps = segmenter.maps(pixels)
    assert maps.shape == (2, *shape)
    assert 0 <= maps.min() <= maps.max() <= 1
    assert {name: found.shape for name, found in segmenter.head_maps(pixels).items()} == dict.fromkeys(net.heads, shape)


@ALL
@pytest.mark.parametrize("tta", [2, 8])
def test_turns_and_flips_are_averaged(name, tta):
    net, config = build(name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    several = Segmenter(net, config, TILES.model_copy(update={"tta": tta}), device="cpu", precision="fp32")
    seen = several.look(pixels)
    assert seen.interior.shape == (40, 64)
    flipped = several.look(np.ascontiguousarray(pixels[:, ::-1]))
    np.testing.assert_allclose(flipped.interior[:, ::-1], seen.interior, atol=1e-4)


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
