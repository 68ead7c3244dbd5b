import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from loop.models.sam import segment_anything
from loop.models.upscaling import axis, windows

CPU = torch.device("cpu")


def seen_at(shape, side):
    transforms = importlib.import_module(f"{segment_anything().__name__}.utils.transforms")
    return tuple(max(1, n) for n in transforms.ResizeLongestSide.get_preprocess_shape(*shape, side))


def packages(coarse, side, shape):
    """The two bilinear steps as the package does them."""
    net = SimpleNamespace(image_encoder=SimpleNamespace(img_size=side))
    postprocess = importlib.import_module(f"{segment_anything().__name__}.modeling").Sam.postprocess_masks
    return postprocess(net, coarse[:, None], seen_at(shape, side), shape)[:, 0]


def ours(coarse, side, shape, above=-np.inf):
    seen = seen_at(shape, side)
    rows, columns = (axis(coarse.shape[i + 1], side, seen[i], shape[i], CPU) for i in (0, 1))
    return list(windows(coarse, rows, columns, above))


def drawn(count, size, seed, sigma):
    noise = np.random.default_rng(seed).normal(size=(count, size, size))
    return torch.from_numpy(30 * ndimage.gaussian_filter(noise, (0, sigma, sigma))).float()


@pytest.mark.parametrize("shape", [(256, 320), (520, 696), (1024, 1024), (1200, 1600), (360, 360), (37, 1500), (1, 9)])
def test_one_step_gives_the_packages_logits(shape):
    coarse = drawn(2, 256, 0, 4)
    expected = packages(coarse, 1024, shape)
    for (top, left, fine), full in zip(ours(coarse, 1024, shape), expected, strict=True):
        assert (top, left, fine.shape) == (0, 0, shape)
        assert float((fine - full).abs().max()) < 1e-4
        sure = full.abs() > 1e-3
        assert torch.equal((fine > 0)[sure], (full > 0)[sure])


@settings(max_examples=60, deadline=None)
@given(
    grid=st.integers(1, 12),
    factor=st.integers(1, 5),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    above=st.sampled_from([-1.0, 0.0, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_nothing_above_the_level_lies_outside_the_window(grid, factor, height, width, above, seed):
    coarse = drawn(3, grid, seed, 1)
    expected = packages(coarse, grid * factor, (height, width))
    for (top, left, fine), full in zip(ours(coarse, grid * factor, (height, width), above), expected, strict=True):
        inside = torch.zeros_like(full, dtype=torch.bool)
        inside[top : top + fine.shape[0], left : left + fine.shape[1]] = True
        assert int(inside.sum()) == fine.numel()
        torch.testing.assert_close(fine.flatten(), full[inside], atol=1e-4, rtol=1e-5)
        assert not bool((full[~inside] > above + 1e-4).any())


def test_a_small_cell_in_a_large_image_costs_a_small_window():
    coarse = torch.full((1, 256, 256), -9.0)
    coarse[0, 100:104, 30:33] = 9.0  # 4 x 3 coarse places, 8 px each in an image of 2048 px
    ((top, left, fine),) = ours(coarse, 1024, (2048, 2048), -1.0)
    assert (32 + 2 * 8) >= fine.shape[0] >= 32
    assert (24 + 2 * 8) >= fine.shape[1] >= 24
    assert 100 * 8 - 8 <= top <= 100 * 8
    assert 30 * 8 - 8 <= left <= 30 * 8


def test_nothing_above_the_level_is_no_window():
    assert [fine.shape for _, _, fine in ours(torch.full((2, 8, 8), -2.0), 32, (20, 30), -1.0)] == [(0, 0)] * 2


def test_no_masks_no_windows():
    assert ours(torch.zeros((0, 8, 8)), 32, (20, 30)) == []


def test_weights_are_means_of_at_most_three():
    along = axis(256, 1024, 768, 333, CPU)
    assert along.weights.shape[0] <= 3
    assert bool((along.weights >= 0).all())
    torch.testing.assert_close(along.weights.sum(dim=0), torch.ones(333))
    assert (np.diff(along.first) >= 0).all()
    assert (np.diff(along.last) >= 0).all()
    assert int(along.places.max()) == along.last.max() <= 192  # padding beyond 768 px is hardly looked at
