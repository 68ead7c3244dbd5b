"""A large image as tiles and back: an 8,000 x 8,000 16-bit tiled TIFF cut, shown, drawn in without a fault, stitched.

Memory is what the process that cuts holds at most (resident) beyond what it held with everything imported.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import tifffile
from bench_stitch import cut as part_of
from bench_stitch import ellipses
from harness import report

from loop.config import TilesConfig
from loop.data.display import write_display
from loop.data.store import describe
from loop.data.tiles import cut, tile_id, write_tiles
from loop.data.windows import intensities, open_windows
from loop.metrics.matching import iou_matrix
from loop.models.stitch import merge_windows
from loop.types import Instances


def draw(path: Path, cells: Instances) -> None:
    """Writes the picture of the cells: noise, brighter where a cell is."""
    rng = np.random.default_rng(1)
    noise = rng.integers(200, 400, (1000, 1000), dtype=np.uint16)
    height, width = cells.shape
    picture = np.tile(noise, (-(-height // 1000), -(-width // 1000)))[:height, :width].copy()
    for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True):
        picture[y0:y1, x0:x1][mask] += rng.integers(500, 3000, dtype=np.uint16)
    tifffile.imwrite(path, picture, photometric="minisblack", tile=(256, 256), compression="zlib")


def offer(path: Path, directory: Path, settings: TilesConfig) -> dict[str, float]:
    """Seconds and memory of what `celloop init` does with the file before it speaks to Label Studio."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    ref = describe(path)
    described = time.perf_counter()
    with open_windows(path) as image:
        light = intensities(image)
    tiles = cut((ref.height, ref.width), settings.side, settings.halo)
    made = write_tiles(path, directory / "tiles", {tile_id(path.stem, tile): tile.window for tile in tiles})
    written = time.perf_counter()
    for stem, tile in made.items():
        write_display(
            tile.path, directory / "display" / f"{stem}.png", sha256=tile.sha256, between=(light.low, light.shown)
        )
    shown = time.perf_counter()
    return {
        "tiles": len(tiles),
        "describe_s": round(described - start, 2),
        "cut_s": round(written - described, 2),
        "display_s": round(shown - written, 2),
        "peak_mb": round((most_held() - before) / 1e6, 1),
    }


def most_held() -> int:
    """The most memory that this process has had resident, bytes.

    Not by getrusage, which knows what the process that started this one held.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=8000, help="of the image, px")
    parser.add_argument("--cells", type=int, default=10000)
    arguments = parser.parse_args()
    settings, side = TilesConfig(), arguments.side
    truth = ellipses(np.random.default_rng(0), side, arguments.cells)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slide.tif"
        draw(path, truth)
        file_mb = round(path.stat().st_size / 1e6, 1)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures = pool.apply(offer, (path, Path(scratch), settings))
    parts = [(tile.window, part_of(truth, tile.window)) for tile in cut(truth.shape, settings.side, settings.halo)]
    start = time.perf_counter()
    whole = merge_windows(truth.shape, parts)
    stitch_s = round(time.perf_counter() - start, 2)
    report(
        f"a {side} x {side} 16-bit tiled TIFF as tiles of {settings.side} with a halo of {settings.halo}, and back",
        **figures,
        file_mb=file_mb,
        stitch_s=stitch_s,
        cells=len(truth),
        pieces=sum(len(part) for _, part in parts),
        cells_back=len(whole),
        cells_as_the_true_ones=int(np.count_nonzero(iou_matrix(whole, truth).max(axis=1) == 1)),
    )


if __name__ == "__main__":
    main()
