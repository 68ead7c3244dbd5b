"""How many megapixels a second a segmenter turns into cells, on the real images of a folder, fp32 beside bf16.

Every image is predicted in both precisions one after the other, so that both meet the same load; files are read
before. Whole predictions: network, watershed, uncertainty and embedding. `network_` is the probability maps alone.

    python benchmarks/bench_predict.py --images examples/dsb2018-mini --model DIR

--model is a folder that `celloop train` or bench_models.py --out wrote. Without it the weights are random: the
network costs the same then, but the cells mean nothing, and neither does the time that they take.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import report

from loop.config import InstanceConfig, ModelConfig
from loop.data.folder import open_folder
from loop.data.store import read_image
from loop.models import SEGMENTERS
from loop.models.blocks import initialise
from loop.models.runtime import resolve_device, uses_bf16
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import load_checkpoint
from loop.types import UInt8Array

PRECISIONS = ("fp32", "bf16")


def load_segmenters(model: Path | None, device: str, seed: int) -> dict[str, Segmenter]:
    """One network in both precisions."""
    if model is not None:
        checkpoint = load_checkpoint(model, device=device)
        net, model_config, instance_config = checkpoint.net, checkpoint.model_config, checkpoint.instance_config
    else:
        model_config, instance_config = ModelConfig(), InstanceConfig()
        net = SEGMENTERS[model_config.name](model_config)
        initialise(net, torch.Generator().manual_seed(seed))
    return {name: Segmenter(net, model_config, instance_config, device=device, precision=name) for name in PRECISIONS}


def read_images(folder: Path, most: int, seed: int) -> list[UInt8Array]:
    """At most `most` images of a folder, drawn at random."""
    refs = open_folder(folder, labels=False).images
    chosen = np.random.default_rng(seed).permutation(len(refs))[:most]
    return [read_image(refs[int(i)].path).pixels for i in np.sort(chosen)]


def seconds(work: Callable[[UInt8Array], Any], pixels: UInt8Array) -> float:
    """Wall-clock time of one call; its result lies in the CPU's memory, so a GPU is done by then."""
    start = time.perf_counter()
    work(pixels)
    return time.perf_counter() - start


def measure(segmenters: dict[str, Segmenter], images: Sequence[UInt8Array], repeats: int) -> dict[str, Any]:
    """Throughput of each precision and how much faster the second is."""
    whole: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    network: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for pixels in images[:2]:
        for segmenter in segmenters.values():
            segmenter.predict(pixels)
    for turn in range(repeats):
        for pixels in images:
            for name in PRECISIONS if turn % 2 == 0 else reversed(PRECISIONS):
                segmenter = segmenters[name]
                whole[name].append(seconds(segmenter.predict, pixels))
                network[name].append(seconds(segmenter.maps, pixels))
    megapixels = repeats * sum(pixels.shape[0] * pixels.shape[1] for pixels in images) / 1e6
    figures: dict[str, Any] = {}
    for name in PRECISIONS:
        p50, p95 = np.percentile(whole[name], [50, 95])
        figures |= {
            f"{name}_megapixels_per_s": round(megapixels / sum(whole[name]), 3),
            f"{name}_ms_p50": round(1000 * float(p50), 1),
            f"{name}_ms_p95": round(1000 * float(p95), 1),
            f"{name}_network_megapixels_per_s": round(megapixels / sum(network[name]), 3),
        }
    figures["bf16_times_faster"] = round(sum(whole["fp32"]) / sum(whole["bf16"]), 2)
    figures["bf16_network_times_faster"] = round(sum(network["fp32"]) / sum(network["bf16"]), 2)
    return figures


def agreement(segmenters: dict[str, Segmenter], images: Sequence[UInt8Array]) -> dict[str, Any]:
    """What bf16 changes: the mean and the largest difference in interior probability, and the number of cells."""
    differences, cells = [], dict.fromkeys(PRECISIONS, 0)
    for pixels in images:
        fine, coarse = (segmenters[name].maps(pixels)[0] for name in PRECISIONS)
        differences.append(np.abs(fine - coarse))
        for name in PRECISIONS:
            cells[name] += len(segmenters[name].predict(pixels).instances)
    return {
        "bf16_mean_difference": round(float(np.mean(np.concatenate([part.ravel() for part in differences]))), 5),
        "bf16_largest_difference": round(float(max(part.max() for part in differences)), 4),
        **{f"{name}_cells": count for name, count in cells.items()},
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--model", type=Path, help="folder of a model; default: random weights")
    parser.add_argument("--most", type=int, default=60, help="images to take of the folder, drawn at random")
    parser.add_argument("--repeats", type=int, default=3, help="how often each image is predicted")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    segmenters = load_segmenters(given.model, given.device, given.seed)
    images = read_images(given.images, given.most, given.seed)
    figures = measure(segmenters, images, given.repeats)
    first = next(iter(segmenters.values()))
    report(
        "predict",
        images=len(images),
        megapixels=round(sum(pixels.shape[0] * pixels.shape[1] for pixels in images) / 1e6, 2),
        repeats=given.repeats,
        weights="random" if given.model is None else given.model.name,
        model=first.model_config.model_dump(mode="json"),
        parameters=sum(value.numel() for value in SEGMENTERS[first.model_config.name](first.model_config).parameters()),
        **figures,
        **agreement(segmenters, images),
        auto_is="bf16" if uses_bf16(resolve_device(given.device), "auto") else "fp32",
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        threads=torch.get_num_threads(),
        seed=given.seed,
        load_before=round(load, 2),
    )


if __name__ == "__main__":
    main()
