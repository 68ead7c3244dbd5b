"""A hundred cells of an image by Segment Anything: prompted at detections, beside the package's grid of points.

    python benchmarks/bench_sam_cells.py [--cells 100] [--repeats 3] [--grid-batches 2]

The image is drawn, SIDE x SIDE px, and its cells stand for what the champion detected. `prompted`: all of
`SamLabeller.propose` in the mode "prompted" (stretching, encoder, a point and a box for each cell, choice and cleaning
of masks), s; `encoder` is the encoder's share, measured apart; `cpu_s` is CPU time, which says more on a busy machine.
`grid_s_extrapolated`: the package's SamAutomaticMaskGenerator as it comes (32 x 32 points, 64 a batch), its encoder
under the same precision as ours, its 16 batches extrapolated from the few that were run (`grid_batches_run`), its last
step (boxes that overlap) left out.

The weights are random. The network costs the same as trained; masks that fill the whole image make `prompted` slower
than cells would, and since the grid's filter keeps none of them, its encoding of masks costs nothing here: both count
against us. Prints one JSON line.
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from bench_sam import random_net
from harness import report

from loop.config import SamConfig
from loop.data.synthetic import draw_cells
from loop.models.runtime import autocast, resolve_device, uses_bf16
from loop.models.sam import PROMPTS_A_BATCH, Sam, segment_anything
from loop.pseudo.sam import SamLabeller
from loop.types import UInt8Array

SIDE = 512


def grid_s(net: torch.nn.Module, device: torch.device, image: UInt8Array, batches: int) -> dict[str, Any]:
    """The package's generator: its encoder, and so many of its batches, s."""
    generator = segment_anything().SamAutomaticMaskGenerator(net)
    predictor, shape = generator.predictor, image.shape[:2]
    start = time.perf_counter()
    with autocast(device, "auto"):
        predictor.set_image(image)
    predictor.features = predictor.features.float()
    encoder = time.perf_counter() - start
    points = generator.point_grids[0] * np.array(shape[::-1])
    per = generator.points_per_batch
    times = []
    for i in range(0, per * batches, per):
        start = time.perf_counter()
        generator._process_batch(points[i : i + per], shape, [0, 0, shape[1], shape[0]], shape)
        times.append(time.perf_counter() - start)
    total = encoder + len(points) / per * float(np.median(times))
    return {
        "grid_s_extrapolated": round(total, 1),
        "grid_batches_run": batches,
        "grid_batches": len(points) // per,
        "grid_batch_s": [round(t, 2) for t in times],
    }


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grid-batches", type=int, default=2)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    device = resolve_device("auto")
    net = random_net("vit_b")
    image, cells = draw_cells(np.random.default_rng(0), (SIDE, SIDE), arguments.cells)
    sam = Sam(net, version="random", device=device.type)
    labeller = SamLabeller("sam", sam, SamConfig(mode="prompted"))
    parts = {"encoder": lambda: sam.encode(image), "prompted": lambda: labeller.propose(image, hint=cells)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}  # by the clock and in CPU time
    for _ in range(arguments.repeats):
        for name, call in parts.items():
            start, before = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - start, time.process_time() - before))
    ours = {
        f"{name}_{unit}": round(float(np.median([t[i] for t in times[name]])), 2)
        for name in parts
        for i, unit in enumerate(("s", "cpu_s"))
    }
    grid = grid_s(net, device, image, arguments.grid_batches)
    report(
        "sam_cells",
        cells=len(cells),
        image=[SIDE, SIDE],
        native_bf16=uses_bf16(device, "auto"),
        prompts_a_batch=PROMPTS_A_BATCH[device.type],
        threads=torch.get_num_threads(),
        load_1min=[round(load, 1), round(os.getloadavg()[0], 1)],
        **ours,
        repeats=arguments.repeats,
        **grid,
        grid_to_prompted=round(grid["grid_s_extrapolated"] / ours["prompted_s"], 1),
    )


if __name__ == "__main__":
    main()
