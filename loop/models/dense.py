"""From a dense network's windows to maps of a whole image, and from its maps to cells."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from loop.config import InstanceConfig
from loop.data.preprocess import Window, blend, pad_to_multiple, tiles, unpad
from loop.errors import ShapeError
from loop.models.dihedral import TRANSFORMS, apply, invert
from loop.models.runtime import to_input
from loop.models.watershed import instances_from_maps
from loop.types import FloatArray, Instances, UInt8Array

Forward = Callable[[FloatArray], FloatArray]
"""(B, C, H, W) float32 images to (B, K, H, W) float32 probabilities; H and W are multiples of the network's stride."""


def head_maps(
    forward: Forward, stretched: UInt8Array, config: InstanceConfig, *, stride: int, at_once: int = 1
) -> FloatArray:
    """The probabilities of all heads for an image of any size: (K, H, W) float32.

    Large images are cut into overlapping windows whose maps are blended. With `tta` above 1 the image is looked at in
    as many of the eight flips and quarter turns, and the maps, turned back, are averaged.

    Args:
        forward: the network.
        stretched: (H, W, C) uint8 as `stretch` gives it.
        config: `tile`, `overlap` and `tta`.
        stride: of the network, px.
        at_once: windows a pass.

    Source: Prytula 2023, section 5.3 (windows of 512 that overlap by 256, averaged). Differs: each window counts less
    towards its own edges.
    """
    seen: list[FloatArray] = []
    for view in TRANSFORMS[: config.tta]:
        turned = np.ascontiguousarray(apply(view, stretched.transpose(2, 0, 1)).transpose(1, 2, 0))
        seen.append(invert(view, _blended(forward, turned, config, stride, at_once)))
    return np.asarray(sum(seen[1:], seen[0]) / np.float32(len(seen)))


def _blended(forward: Forward, stretched: UInt8Array, config: InstanceConfig, stride: int, at_once: int) -> FloatArray:
    shape = (stretched.shape[0], stretched.shape[1])
    overlap = min(config.overlap, config.tile // 2)
    windows = tiles(shape, config.tile, overlap)
    return blend(shape, _window_maps(forward, stretched, windows, stride, at_once), overlap)


def _window_maps(
    forward: Forward, stretched: UInt8Array, windows: Sequence[Window], stride: int, at_once: int
) -> Iterator[tuple[Window, FloatArray]]:
    for start in range(0, len(windows), at_once):
        together = windows[start : start + at_once]
        for window, part in zip(together, forward(padded_windows(stretched, together, stride)), strict=True):
            yield window, unpad(part, (window.y1 - window.y0, window.x1 - window.x0))


def padded_windows(
    stretched: UInt8Array, windows: Sequence[Window], multiple: int, *, mirror: bool = True
) -> FloatArray:
    """Windows of one size as a network takes them, (B, C, H, W) float32; padded as `pad_to_multiple` does."""
    crops = [to_input(stretched[w.y0 : w.y1, w.x0 : w.x1]) for w in windows]
    return np.stack([pad_to_multiple(crop, multiple, mirror=mirror) for crop in crops])


def interior_and_border(maps: FloatArray, heads: Sequence[str]) -> FloatArray:
    """The two maps that cells are found from: (2, H, W) float32.

    Without an interior head the interior is what is not background; without a border head the border is 0 everywhere.

    Args:
        maps: (K, H, W) float32.
        heads: K names.

    Raises:
        ShapeError: neither interior nor background is among the heads.
    """
    named = dict(zip(heads, maps, strict=True))
    if "interior" in named:
        interior = named["interior"]
    elif "background" in named:
        interior = 1 - named["background"]
    else:
        raise ShapeError(f"heads {', '.join(heads)}: cells need the head interior, or background, to be found")
    border = named.get("border")
    return np.stack([interior, np.zeros_like(interior) if border is None else border])


def instances_from_heads(
    maps: FloatArray, heads: Sequence[str], config: InstanceConfig, *, image_id: str = "", model_version: str = ""
) -> Instances:
    """The cells of an image from a dense network's maps, by the watershed; `maps` and `heads` as above."""
    named = dict(zip(heads, maps, strict=True))
    return instances_from_maps(
        interior_and_border(maps, heads),
        config,
        nuclei=named.get("nuclei"),
        distance=named.get("distance"),
        image_id=image_id,
        model_version=model_version,
    )
