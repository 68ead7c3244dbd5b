"""Training steps a second and predicted megapixels a second of each model, on one core, on two, or on a GPU.

Synthetic brightfield images, crops and batches as each configuration of configs/model has them; the crops are made
beside the training, as they always are. The first ten steps are left out. Prediction is the whole of it, from pixels
to cells, after these few steps, so that the time for finding cells is that of a poor model. Each measurement runs in
a process of its own that may use so many cores and no more. One JSON line a model and number of cores.

    python benchmarks/bench_training_speed.py --models unet,seu_net,sparse_seu_net --cores 1 2
    python benchmarks/bench_training_speed.py --device cuda
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import report
from training_runs import CONFIGS, settings, write_synthetic

from loop.data.folder import open_folder, read_sample
from loop.data.store import read_image
from loop.models.segmenter import Segmenter
from loop.training.trainer import train

IMAGES = 8
LEFT_OUT = 10


def measure(name: str, cores: int, data: Path, given: argparse.Namespace) -> None:
    """One JSON line of a model; meant for a process of its own, whose cores and threads it sets. 0 cores: all."""
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        torch.set_num_threads(cores)
    config = settings(name, given)
    refs = open_folder(data).images
    seconds: dict[int, float] = {}

    def log(step: int, values: dict[str, float]) -> None:
        seconds[step] = values["seconds"]

    trained = train([read_sample(ref) for ref in refs], config.model, config.train, instances=config.instances, log=log)
    counted = trained.steps - LEFT_OUT
    steps_per_s = counted / (seconds[trained.steps] - seconds[LEFT_OUT])
    report(
        "training_speed",
        row=name,
        model=config.model.name,
        cores=cores or len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        compute="GPU" if given.device == "cuda" else "CPU",
        steps=counted,
        steps_per_s=round(steps_per_s, 3),
        crop=config.train.crop,
        batch=config.train.batch * config.train.accumulate,
        crop_megapixels_per_s=round(
            steps_per_s * config.train.batch * config.train.accumulate * config.train.crop**2 / 1e6, 3
        ),
        parameters=sum(parameter.numel() for parameter in trained.net.parameters()),
        **predict(Segmenter(trained.net, config.model, trained.instances, device=config.train.device), data),
        minutes=round(trained.seconds / 60, 3),
        seed=given.seed,
        load_before=given.load,
    )


def predict(segmenter: Segmenter, data: Path) -> dict[str, Any]:
    """Megapixels a second over all images, the best of three passes after one unmeasured image."""
    images = [read_image(ref.path).pixels for ref in open_folder(data).images]
    segmenter.predict(images[0])
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        cells = sum(len(segmenter.predict(image).instances) for image in images)
        passes.append(time.perf_counter() - start)
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    return {"predict_megapixels_per_s": round(pixels / 1e6 / min(passes), 3), "cells_found": cells}


def main() -> None:
    """Prints one JSON line for each model and number of cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names of configs/model, comma between; all without it")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="of the CPU; not for a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--max-steps", type=int, default=60, help="steps to train, of which the first ten do not count")
    parser.add_argument("--side", type=int, default=512, help="of an image, px")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings, as train.crop=192")
    given = parser.parse_args()
    if given.max_steps <= LEFT_OUT:
        parser.error(f"--max-steps {given.max_steps}: more than {LEFT_OUT} are needed")
    given.minutes = None
    given.set = [f"train.device={given.device}", *given.set]
    given.load = round(os.getloadavg()[0], 2)
    names = given.models.split(",") if given.models else sorted(path.stem for path in CONFIGS.iterdir())
    spawn = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as temporary:
        data = Path(temporary)
        write_synthetic(data, IMAGES, given.side, given.seed)
        for name in names:
            for cores in given.cores if given.device == "cpu" else [0]:
                process = spawn.Process(target=measure, args=(name, cores, data, given))
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
