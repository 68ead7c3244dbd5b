"""Several looks at one image: turned, with dropout, or by several networks; what they disagree on is uncertain."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from loop.errors import ConfigError, InputError
from loop.models.dihedral import TRANSFORMS, apply, invert, invert_instances
from loop.models.segmenter import Segmenter
from loop.types import FloatArray, Instances, UInt8Array
from loop.uncertainty.measures import measures_of_looks

How = Literal["turns", "dropout"]


class Passes(NamedTuple):
    """M looks at one image, all in its own coordinates; memory grows by about 4 M bytes a pixel.

    Attributes:
        interiors: (M, H, W) float32 in [0, 1], how likely each pixel is inside a cell.
        looks: the cells of each look, M.
    """

    interiors: FloatArray
    looks: tuple[Instances, ...]


def turned_passes(segmenter: Segmenter, pixels: UInt8Array, n: int, *, image_id: str = "") -> Passes:
    """Looks at the image in the first `n` of its eight flips and quarter turns, turned back.

    Args:
        segmenter: is not changed; its own `tta` is not used.
        pixels: (H, W, C) uint8, C in {1, 3}.
        n: 1 to 8; the first look is the image as it is.
        image_id: goes into the instances and into errors.

    Raises:
        InputError: `n` is out of its range.
        ShapeError: `pixels` is not (H, W, 1) or (H, W, 3).
        NonFiniteError: the network gives NaN or infinity; the text names the image.
    """
    if not 1 <= n <= len(TRANSFORMS):
        raise InputError(f"n={n} turned looks; there are {len(TRANSFORMS)} flips and turns, give 1 to that many")
    once = segmenter.with_net(lambda net: net)

    def looks() -> Iterable[tuple[FloatArray, Instances]]:
        for view in TRANSFORMS[:n]:
            interior, cells = _look(once, _turned(view, pixels), image_id)
            yield invert(view, interior), invert_instances(view, cells)

    return _gathered(looks())


def dropout_passes(segmenter: Segmenter, pixels: UInt8Array, n: int, seed: int = 0, *, image_id: str = "") -> Passes:
    """Looks at the image with parts of the network blanked at random (MC dropout).

    Only dropout differs from an ordinary prediction: normalisation and all else stay in evaluation mode. Within a look
    the same feature maps are blanked in every window, so that a look is one network's; dropout of single values (of
    pix2pix) is drawn anew for each window. The same seed blanks the same maps in every image. The segmenter's network
    is copied, not changed, so several threads may look at once; the copy costs its size in memory.

    Args:
        segmenter: its network has dropout above 0.
        pixels: (H, W, C) uint8, C in {1, 3}.
        n: looks, 1 or more.
        seed: where random numbers start; no global generator is used.
        image_id: goes into the instances and into errors.

    Raises:
        ConfigError: the network has no dropout.
        InputError: `n` is below 1.
        ShapeError: `pixels` is not (H, W, 1) or (H, W, 3).
        NonFiniteError: the network gives NaN or infinity; the text names the image.

    Source: Gal and Ghahramani 2016.
    """
    if n < 1:
        raise InputError(f"n={n} looks with dropout; give at least 1")
    generator = torch.Generator().manual_seed(seed)
    drops: list[_Drawn] = []
    dropping = segmenter.with_net(lambda net: _with_drawn(net, generator, drops))
    if not drops:
        raise ConfigError(
            f"the network {segmenter.model_config.name} of {segmenter.model_version or 'the model'} has no dropout to "
            "look with; set model.dropout, e.g. 0.2, and train it, or set select.passes to turns"
        )

    def looks() -> Iterable[tuple[FloatArray, Instances]]:
        for _ in range(n):
            for drop in drops:
                drop.forget()
            yield _look(dropping, pixels, image_id)

    return _gathered(looks())


def ensemble_passes(segmenters: Sequence[Segmenter], pixels: UInt8Array, *, image_id: str = "") -> Passes:
    """One look at the image by each of several networks, as snapshots of a training or versions of the champion.

    Args:
        segmenters: M >= 1, of any kind; each looks with its own settings.
        pixels: (H, W, C) uint8, C in {1, 3}.
        image_id: goes into the instances and into errors.

    Raises:
        InputError: no segmenters.
        ShapeError: `pixels` is not (H, W, 1) or (H, W, 3).
        NonFiniteError: a network gives NaN or infinity; the text names the image.
    """
    if not segmenters:
        raise InputError("no segmenters to look with; give at least one")
    return _gathered(_look(segmenter, pixels, image_id) for segmenter in segmenters)


def look_again(segmenter: Segmenter, pixels: UInt8Array, how: How, n: int, image_id: str = "") -> dict[str, float]:
    """What several looks tell of an image's uncertainty: "bald" and "disagreement" (loop/uncertainty/measures.py).

    Args:
        segmenter: is not changed.
        pixels: (H, W, C) uint8, C in {1, 3}.
        how: as `turned_passes` or as `dropout_passes`, there from seed 0.
        n: looks.
        image_id: named in errors.

    Raises:
        As the two do.
    """
    look: Callable[..., Passes] = turned_passes if how == "turns" else dropout_passes
    passes = look(segmenter, pixels, n, image_id=image_id)
    return measures_of_looks(passes.interiors, passes.looks)


class _Drawn(nn.Module):
    """Dropout in evaluation mode: what is blanked is drawn once and stays until `forget`."""

    def __init__(self, share: float, generator: torch.Generator, *, maps: bool) -> None:
        super().__init__()
        self._share = share
        self._generator = generator
        self._maps = maps
        self._scale: Tensor | None = None

    def forget(self) -> None:
        self._scale = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; the mean is kept."""
        if self._scale is None or not self._maps:
            shape = (1, x.shape[1], 1, 1) if self._maps else (1, *x.shape[1:])
            kept = torch.rand(shape, generator=self._generator) >= self._share
            self._scale = kept.to(x.device, x.dtype) / (1 - self._share)
        return x * self._scale


def _with_drawn(net: nn.Module, generator: torch.Generator, drops: list[_Drawn]) -> nn.Module:
    """A copy of the network with its dropout above 0 replaced; what replaces it is added to `drops`."""
    copied = copy.deepcopy(net)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout | nn.Dropout2d) and 0 < child.p < 1:
                drops.append(_Drawn(child.p, generator, maps=isinstance(child, nn.Dropout2d)))
                setattr(parent, name, drops[-1])
    return copied


def _look(segmenter: Segmenter, pixels: UInt8Array, image_id: str) -> tuple[FloatArray, Instances]:
    sighting = segmenter.look(pixels, image_id=image_id)
    return sighting.interior, segmenter.cells(sighting, image_id=image_id)


def _gathered(looks: Iterable[tuple[FloatArray, Instances]]) -> Passes:
    interiors, cells = zip(*looks, strict=True)
    return Passes(np.stack(interiors), tuple(cells))


def _turned(view: int, pixels: UInt8Array) -> UInt8Array:
    if pixels.ndim != 3:
        return pixels  # the segmenter says what is wrong with it
    return np.ascontiguousarray(apply(view, pixels.transpose(2, 0, 1)).transpose(1, 2, 0))
