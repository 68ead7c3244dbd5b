"""100 cells at 1080 x 1080 to Label Studio's brush run lengths and back, beside label_studio_sdk, in the same run.

    python benchmarks/bench_rle.py

Each cell is a disc whose radius is 2 to 4 % of the image, a region of its own. The product writes from the crop and
reads into one: all regions in one call, as reading an annotation does (`decode`), and each in a call of its own
(`decode_single`). The SDK writes from a full uint8 frame, made beforehand and not timed; it is timed reading into its
RGBA values and no further (`sdk_decode`), and until the mask of alpha >= 128 is there (`sdk_decode_to_mask`), which is
what is used.
The ways take turns, so that a busy machine slows all of them. Prints one JSON line.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import peak_mb, report
from label_studio_sdk.converter import brush

from loop.labelstudio.rle import Decoded, decode_brush, decode_brushes, encode_brush
from loop.rings import Crop, crop_mask
from loop.types import UInt8Array

SIDE = 1080
SHAPE = (SIDE, SIDE)
CELLS = 100
REPEATS = 7


def draw(rng: np.random.Generator) -> list[Crop]:
    """100 discs anywhere in the image."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    cells = []
    for _ in range(CELLS):
        radius = rng.uniform(0.02, 0.04) * SIDE
        cy, cx = rng.uniform(radius, SIDE - radius, 2)
        crop = crop_mask((rows - cy) ** 2 + (columns - cx) ** 2 <= radius**2)
        if crop is not None:
            cells.append(crop)
    return cells


def frame(crop: Crop) -> UInt8Array:
    """The full frame of 0 and 255 that the SDK wants."""
    full = np.zeros(SHAPE, np.uint8)
    x0, y0, x1, y1 = crop.box_xyxy
    full[y0:y1, x0:x1] = 255 * crop.mask
    return full


def sdk_mask(rle: list[int]) -> Any:
    """The SDK's way until the mask is there."""
    return brush.decode_rle(rle).reshape(*SHAPE, 4)[..., 3] >= 128


def encode(cells: list[Crop]) -> list[list[int]]:
    """The product's way there."""
    return [encode_brush(crop.mask, SHAPE, crop.box_xyxy[:2]) for crop in cells]


def decode(streams: list[list[int]]) -> list[Decoded]:
    """The product's way back."""
    return decode_brushes(streams, SHAPE)


def decode_single(streams: list[list[int]]) -> list[Decoded]:
    """The product's way back where there is but one region."""
    return [decode_brush(rle, SHAPE) for rle in streams]


def by_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median time of each, ms, the first turn not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(float(np.median(spent[1:])), 3) for name, spent in times.items()}


def each(function: Callable[[Any], Any], items: list[Any]) -> None:
    """Calls without keeping what comes back, as 467 MB of RGBA values would be."""
    for item in items:
        function(item)


def main() -> None:
    """Measure and print one line."""
    cells = draw(np.random.default_rng(0))
    frames = [frame(crop) for crop in cells]
    streams = encode(cells)
    equal = streams == [brush.mask2rle(full) for full in frames] and all(
        isinstance(crop, Crop) and np.array_equal(frame(crop) > 0, sdk_mask(rle))
        for way in (decode, decode_single)
        for crop, rle in zip(way(streams), streams, strict=True)
    )
    timed = by_turns(
        {
            "encode": lambda: encode(cells),
            "sdk_encode": lambda: each(brush.mask2rle, frames),
            "decode": lambda: decode(streams),
            "decode_single": lambda: decode_single(streams),
            "sdk_decode": lambda: each(brush.decode_rle, streams),
            "sdk_decode_to_mask": lambda: each(sdk_mask, streams),
        },
        REPEATS,
    )
    report(
        "brush_rle",
        cells=len(cells),
        image=[SIDE, SIDE],
        repeats=REPEATS,
        bytes_mean=round(float(np.mean([len(rle) for rle in streams])), 1),
        equal_to_sdk=equal,
        ms_p50=timed,
        encode_times_faster=round(timed["sdk_encode"] / timed["encode"], 1),
        decode_times_faster=round(timed["sdk_decode"] / timed["decode"], 1),
        decode_single_times_faster=round(timed["sdk_decode"] / timed["decode_single"], 1),
        decode_to_mask_times_faster=round(timed["sdk_decode_to_mask"] / timed["decode"], 1),
        peak_mb={
            "encode": peak_mb(lambda: encode(cells)),
            "decode": peak_mb(lambda: decode(streams)),
            "decode_single": peak_mb(lambda: decode_single(streams)),
            "sdk_decode_to_mask": peak_mb(lambda: each(sdk_mask, streams[:2])),
        },
    )


if __name__ == "__main__":
    main()
