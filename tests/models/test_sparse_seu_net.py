import numpy as np
import pytest
import torch

from loop.config import InstanceConfig, ModelConfig
from loop.data.synthetic import Drawn, draw_cells
from loop.errors import ConfigError, ShapeError
from loop.losses.sparse import sparse_loss
from loop.masks import from_masks, to_dense
from loop.metrics.instance import evaluate
from loop.metrics.matching import intersections
from loop.models.blocks import ConvBlock, SqueezeExcite, initialise
from loop.models.queries import instances_from_queries
from loop.models.sparse_seu_net import SparseSEUNet, lattice

SMALL = {"name": "sparse_seu_net", "base": 4, "depth": 3, "width": 8, "queries": 9}


def build(**settings):
    config = ModelConfig.model_validate({**SMALL, **settings})
    net = SparseSEUNet(config)
    initialise(net, torch.Generator().manual_seed(0))
    net.start()
    return net


def crops(n=2, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def loss_of(output, masks, size):
    weights = [torch.ones(len(m)) for m in masks]
    return sparse_loss(
        output.masks, output.classes, output.objectness, masks, weights, torch.ones(len(masks), 1, size, size)
    )


@pytest.mark.parametrize("levels", ["single", "multi"])
@pytest.mark.parametrize("mask_stride", [1, 2, 4])
@pytest.mark.parametrize("extras", [{}, {"overlap": True, "objectness": True}])
def test_shapes_and_gradients(levels, mask_stride, extras):
    net = build(levels=levels, mask_stride=mask_stride, **extras)
    output = net(crops())
    assert output.masks.shape == (2, 9, 32 // mask_stride, 32 // mask_stride)
    assert output.classes.shape == (2, 9)
    masks = [
        torch.from_numpy(to_dense(draw_cells(np.random.default_rng(0), (32, 32), 3).instances)),
        torch.zeros(0, 32, 32) > 0,
    ]
    loss = loss_of(output, masks, 32)
    if extras:
        assert net.heads == ("overlap",)
        assert output.objectness.shape == (2, 9)
        assert output.dense.shape == (2, 1, 32, 32)
        loss = loss + output.dense.square().mean()
    else:
        assert net.heads == ()
        assert output.objectness is None
        assert output.dense is None
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


def convolutions(branch):
    return [m.kernel_size for m in branch.modules() if isinstance(m, torch.nn.Conv2d)]


@pytest.mark.parametrize(("levels", "expected"), [("single", [4]), ("multi", [2, 2, 4])])
def test_branches_fork_where_the_levels_say(levels, expected):
    net = build(levels=levels, mask_stride=1)
    for kind in ("mask", "instance"):
        assert [convolutions(getattr(fork, kind)) for fork in net.forks] == [[(3, 3)] * n for n in expected]


def test_encoder_and_decoder_carry_squeeze_and_excitation():
    net = build(mask_stride=1)
    assert len([m for m in net.modules() if isinstance(m, SqueezeExcite)]) == 4 + 3
    assert len([m for m in net.modules() if isinstance(m, ConvBlock)]) == 4 + 3 + 2 * 3


def test_activation_maps_and_what_they_pool_by_a_loop():
    """Eq. 4.9 at 4 x 4 px for each query: the pooled features, the middle and the masks, in float64."""
    head = build().head
    generator = torch.Generator().manual_seed(3)
    mask, instance = (torch.rand(1, 8, 4, 4, generator=generator) for _ in range(2))
    with torch.no_grad():
        head.kernel.weight.copy_(torch.randn(head.kernel.weight.shape, generator=generator))
        head.sharpness.copy_(torch.rand(9, generator=generator))
        masks, classes, _ = head(mask, instance)
        content = head.activation(instance)[0].double()
    line = (torch.arange(4).double() + 0.5) * 3 / 4 - 1.5  # 4 pixels over a frame of sqrt(9) = 3
    v, u = torch.meshgrid(line, line, indexing="ij")
    features, shown = instance[0].double(), mask[0].double()
    for query in range(9):
        x, y = head.points[query].double().tolist()
        near = -head.sharpness[query].double().exp() * ((u - x) ** 2 + (v - y) ** 2)
        a = torch.sigmoid(content[query + 1] + content[0] + near + head.rarity[query].double())
        total, a = a.sum(), a / a.sum()
        cu, cv = (a * u).sum(), (a * v).sum()
        du, dv = u - cu, v - cv
        found = torch.stack([*(a * features).sum(dim=(1, 2)), *((a * d).sum() for d in (du * du, du * dv, dv * dv))])
        kernel = head.kernel.weight.double() @ found + head.kernel.bias.double()
        basis = torch.stack([*shown, du, dv, du * du, du * dv, dv * dv, torch.ones_like(du)])
        expected = (kernel[:, None, None] * basis).sum(dim=0)
        torch.testing.assert_close(masks[0, query].double(), expected, rtol=1e-3, atol=1e-3)
        known = torch.cat([found, total.log()[None]])
        logit = head.classify.weight[0].double() @ known + head.classify.bias[0].double()
        assert classes[0, query].item() == pytest.approx(logit.item(), rel=1e-3)


def test_at_the_start_queries_are_rare_and_look_at_places_of_their_own():
    net = build(queries=16, mask_stride=1).eval()
    with torch.no_grad():
        output = net(crops(1, 64))
    assert 0.0001 < float(output.classes.sigmoid().mean()) < 0.1
    peaks = output.masks[0].flatten(1).argmax(dim=1)
    at = torch.stack([peaks % 64, peaks // 64], dim=1) / 32 - 1
    nearest = torch.cdist(at.float(), lattice(16)).argmin(dim=1)
    assert len(set(nearest.tolist())) >= 12


@pytest.mark.parametrize("n", [1, 9, 100])
def test_the_lattice_covers_the_square_evenly(n):
    points = lattice(n)
    assert points.shape == (n, 2)
    assert points.abs().max() < 1
    if n > 1:
        gaps = torch.cdist(points, points) + 10 * torch.eye(n)
        assert gaps.min() > 0.5 * 2 / n**0.5
        anywhere = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert torch.cdist(anywhere, points).min(dim=1).values.max() < 1.5 * 2 / n**0.5


def test_the_same_in_channels_last():
    net = build(overlap=True, objectness=True).eval()
    x = crops()
    with torch.no_grad():
        plain = net(x)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    for one, other in zip(plain, last, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_bf16_autocast_gives_float32_near_the_exact_output():
    net = build(overlap=True, objectness=True).eval()
    with torch.no_grad():
        exact = net(crops())
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(crops())
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32
        assert float((one - other).abs().mean()) < 0.1 * float(one.abs().mean()) + 0.02


def test_images_do_not_mix_within_a_batch():
    net = build().eval()
    with torch.no_grad():
        both, alone = net(crops(2)), net(crops(2)[1:])
    torch.testing.assert_close(both.masks[1], alone.masks[0], rtol=1e-4, atol=1e-4)


def test_the_embedding_is_the_average_of_the_bottleneck():
    net = build().eval()
    with torch.no_grad():
        embedding = net.embed(crops())
        torch.testing.assert_close(embedding, net.encoder(crops())[-1].mean(dim=(2, 3)))
    assert embedding.shape == (2, net.embedding_size)


def test_images_that_do_not_fit():
    net = build()
    with pytest.raises(ShapeError, match="multiples of 8: pad to"):
        net(torch.rand(1, 3, 30, 32))
    with pytest.raises(ShapeError, match="expected \\(B, 3, H, W\\)"):
        net(torch.rand(1, 8, 32, 32))


def test_masks_as_coarse_as_the_bottleneck_are_refused():
    with pytest.raises(ConfigError, match="leaves no decoder; give a mask_stride below 4"):
        build(depth=2, mask_stride=4)


def test_an_image_of_one_colour_gives_numbers():
    with torch.no_grad():
        output = build().eval()(torch.zeros(1, 3, 32, 32))
    assert bool(torch.isfinite(output.masks).all())
    assert bool(torch.isfinite(output.classes).all())


def overlapping_pair(rng, size):
    """Two discs that share a bright lens."""
    y, x = np.mgrid[:size, :size]
    masks = [(x - cx) ** 2 + (y - 24) ** 2 <= 100 for cx in (18, 29)]
    light = 20 + 90.0 * masks[0] + 110.0 * masks[1] + rng.normal(0, 4, (size, size))
    pixels = np.repeat(np.clip(light, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    return Drawn(pixels, from_masks(masks, (size, size)))


def overfit(steps, **settings):
    """Found and true cells of eight drawn crops, the last with an overlap, after so many steps on all of them."""
    rng = np.random.default_rng(1)
    drawn = [draw_cells(rng, (48, 48), n, touching=n % 2 == 0) for n in range(7)] + [overlapping_pair(rng, 48)]
    x = torch.from_numpy(np.stack([d.pixels for d in drawn])).permute(0, 3, 1, 2).float().div(255)
    x = x.contiguous(memory_format=torch.channels_last)
    masks = [torch.from_numpy(to_dense(d.instances)) for d in drawn]
    net = build(base=8, depth=3, width=16, queries=16, **settings).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        loss = loss_of(net(x), masks, 48)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        rates.step()
    with torch.no_grad():
        output = net.eval()(x)
    pairs = []
    for probs, classes, d in zip(output.masks.sigmoid().numpy(), output.classes.sigmoid().numpy(), drawn, strict=True):
        found = instances_from_queries(probs, classes, (48, 48), InstanceConfig(min_area=4))
        pairs.append((found, d.instances))
    return pairs


@pytest.mark.parametrize("levels", ["single", "multi"])
def test_eight_crops_are_overfitted(levels):
    pairs = overfit(150, levels=levels)
    assert evaluate(pairs)["ap50"] > 0.95
    found, true = pairs[-1]
    shared = intersections(found, found)[0, 1]
    assert shared == pytest.approx(np.count_nonzero(to_dense(true).all(axis=0)), rel=0.3)
