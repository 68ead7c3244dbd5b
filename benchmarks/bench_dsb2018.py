"""AP on a labelled dataset after N labelled images: trained from scratch on images of the pool, measured on the test.

--data is a dataset folder whose manifest.csv has the splits pool and test. For each N of --images, N images of the pool
are drawn at random (the smaller draws are part of the larger), none of a group that stands in another split too; a
model is trained on them for --minutes and predicts every image of the test split. One JSON line for each N, with the
keys of `celloop evaluate --json`. The test split is only measured on.

    python benchmarks/bench_dsb2018.py --data DIR --images 12 40 --minutes 10 --seed 0
"""

import argparse
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import report

from loop.config import LoopConfig, load_config
from loop.data.folder import leaking_groups, open_folder, read_labels
from loop.data.store import read_image
from loop.metrics.instance import evaluate
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import save_checkpoint
from loop.training.trainer import Trained, train
from loop.types import ImageRef, Sample

DIGITS = 4


def say(step: int, values: dict[str, float]) -> None:
    """Progress on standard error, a line every hundred steps."""
    if step % 100 == 0:
        print(f"step {step}: loss {values['loss']:.3f}, {values['seconds']:.0f} s", file=sys.stderr)


def draw(images: Sequence[ImageRef], count: int, rng: np.random.Generator) -> list[ImageRef]:
    """`count` of the images in random order."""
    return [images[int(i)] for i in rng.permutation(len(images))[:count]]


def splits(data: Path) -> tuple[list[ImageRef], list[ImageRef]]:
    """The labelled images of the pool that may be learnt from, and those of the test split."""
    images = [ref for ref in open_folder(data).images if ref.label_path is not None]
    leaking = leaking_groups(images)
    pool = [ref for ref in images if ref.split == "pool" and ref.group not in leaking]
    test = [ref for ref in images if ref.split == "test"]
    if not pool or not test:
        raise SystemExit(f"{data}: {len(pool)} labelled images in pool, {len(test)} in test; both are needed")
    return pool, test


def predict_and_evaluate(segmenter: Segmenter, test: Sequence[ImageRef]) -> tuple[dict[str, Any], float]:
    """The evaluation of the test images, and the seconds that predicting them took."""
    pairs, seconds = [], 0.0
    for ref in test:
        pixels = read_image(ref.path).pixels
        start = time.perf_counter()
        cells = segmenter.predict(pixels, image_id=ref.image_id).instances
        seconds += time.perf_counter() - start
        pairs.append((cells, read_labels(ref)))
    return evaluate(pairs, modalities=[ref.modality for ref in test]), seconds


def rounded(figures: Any) -> Any:
    """The same document with its fractions cut to a few digits."""
    if isinstance(figures, dict):
        return {key: rounded(value) for key, value in figures.items()}
    return round(figures, DIGITS) if isinstance(figures, float) else figures


def measure(
    teachers: Sequence[Sample], test: Sequence[ImageRef], config: LoopConfig, *, out: Path | None, load: float
) -> None:
    """Trains, predicts, prints one JSON line; `load` is that of the machine before the first training."""
    trained: Trained = train(teachers, config.model, config.train, log=say)
    if out is not None:
        minutes = trained.seconds / 60
        save_checkpoint(out, trained.net, config.model, config.instances, minutes=minutes, steps=trained.steps)
    segmenter = Segmenter(trained.net, config.model, config.instances, device=config.train.device)
    figures, predict_s = predict_and_evaluate(segmenter, test)
    report(
        "dsb2018",
        train_images=len(teachers),
        train_cells=sum(len(sample.instances) for sample in teachers),
        train_modalities=dict(sorted(Counter(sample.image.modality for sample in teachers).items())),
        train_minutes=round(trained.seconds / 60, 2),
        train_steps=trained.steps,
        **rounded(figures),
        predict_s=round(predict_s, 1),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        seed=config.train.seed,
        load_before=round(load, 2),
    )


def main() -> None:
    """Prints one JSON line for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with splits in manifest.csv")
    parser.add_argument("--images", type=int, nargs="+", default=[12, 40], help="images to learn from")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each number of images")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the training")
    parser.add_argument("--config", type=Path, help="settings, as configs/loop.yaml")
    parser.add_argument("--out", type=Path, help="keep each model in OUT/nN-seedS")
    parser.add_argument("--max-steps", type=int, help="a budget in steps instead of minutes")
    parser.add_argument("--test-images", type=int, help="measure on so many test images only, for a quick trial")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    overrides = {"train.minutes": given.minutes, "train.max_steps": given.max_steps, "train.seed": given.seed}
    config = load_config(given.config, overrides)
    pool, test = splits(given.data)
    if max(given.images) > len(pool):
        parser.error(f"--images {max(given.images)}: the pool has {len(pool)} images to learn from")
    rng = np.random.default_rng(given.seed)
    drawn = [Sample(ref, read_labels(ref)) for ref in draw(pool, max(given.images), rng)]
    if given.test_images is not None:
        test = draw(test, given.test_images, rng)
    for count in given.images:
        out = given.out / f"n{count}-seed{given.seed}" if given.out is not None else None
        measure(drawn[:count], test, config, out=out, load=load)


if __name__ == "__main__":
    main()
