"""What the benchmarks that train share: a draw of images, a training on a clock, and the figures of a test set.

A benchmark gives the same images and the same budget to every configuration, and the validation images serve each in
the same way (thresholds); the test images are only measured on.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from harness import ROOT

from loop.config import LoopConfig, load_config
from loop.data.folder import leaking_groups, open_folder, read_sample
from loop.data.microscope import write_dataset
from loop.data.store import read_image
from loop.metrics.instance import evaluate, image_ap
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import save_checkpoint
from loop.training.trainer import Trained, train
from loop.types import ImageRef, Sample

CONFIGS = ROOT / "configs" / "model"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
DIGITS = 4
SYNTHETIC = {"model.dark_background": False}
"""Settings for brightfield, whose background is neither dark nor bright."""


class Draw(NamedTuple):
    """The labelled images to learn from, to choose thresholds on, and to measure on."""

    train: list[ImageRef]
    validation: list[ImageRef]
    test: list[ImageRef]


class Run(NamedTuple):
    """A trained model and what a reader of its figures must know of the training."""

    segmenter: Segmenter
    trained: Trained
    facts: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, *, minutes: float) -> None:
    """Adds --minutes, --clock, --seed, --max-steps, --set, --out and the cuts for a quick trial."""
    parser.add_argument("--minutes", type=float, default=minutes, help="of training, for each row")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: minutes of this process's CPU time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the training")
    parser.add_argument("--max-steps", type=int, help="a budget in steps instead of minutes, for a quick trial")
    parser.add_argument("--test-images", type=int, help="measure on so many test images only, for a quick trial")
    parser.add_argument("--validation-images", type=int, help="choose thresholds on so many only, for a quick trial")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings for every row, as train.crop=192"
    )
    parser.add_argument("--out", type=Path, help="keep each model in OUT/ROW")


def settings(name: str, given: argparse.Namespace, row: dict[str, Any] | None = None) -> LoopConfig:
    """The settings of configs/model/NAME.yaml with those of the row and of the command line on top."""
    path = CONFIGS / f"{name}.yaml"
    if not path.exists():
        raise SystemExit(
            f"no {path.relative_to(ROOT)}; there are {', '.join(sorted(p.stem for p in CONFIGS.iterdir()))}"
        )
    asked = {"train.minutes": given.minutes, "train.max_steps": given.max_steps, "train.seed": given.seed}
    said = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in given.set)}
    return load_config(path, {**(row or {}), **asked, **said})


def draw_images(data: Path, count: int, given: argparse.Namespace) -> Draw:
    """`count` random images of the splits pool or train, and the whole splits val and test, of a dataset folder.

    A `count` of 0 takes all.

    Nothing is learnt from a group that stands in another split too. With one seed a smaller draw is part of a larger.
    """
    images = [ref for ref in open_folder(data).images if ref.label_path is not None]
    leaking = leaking_groups(images)
    pool = [ref for ref in images if ref.split in ("pool", "train") and ref.group not in leaking]
    validation = [ref for ref in images if ref.split == "val" and ref.group not in leaking]
    test = [ref for ref in images if ref.split == "test"]
    if len(pool) < count or not test:
        raise SystemExit(
            f"{data}: {len(pool)} images to learn from, {len(test)} to measure on; {count} and 1 are needed"
        )
    rng = np.random.default_rng(given.seed)
    teachers = _shuffled(pool, rng)[: count or None]
    if given.test_images is not None:
        test = _shuffled(test, rng)[: given.test_images]
    if given.validation_images is not None:
        validation = _shuffled(validation, rng)[: given.validation_images]
    return Draw(teachers, validation, test)


def write_synthetic(data: Path, images: int, side: int, seed: int) -> None:
    """Writes square brightfield images, with as many cells to the area as 15 to 35 of them in a frame of 512 px."""
    share = (side / 512) ** 2
    cells = (max(1, round(15 * share)), max(2, round(35 * share)))
    write_dataset(data, images=images, shape=(side, side), seed=seed, cells=cells)


@contextmanager
def synthetic_draw(given: argparse.Namespace) -> Iterator[Draw]:
    """The draw of a synthetic brightfield dataset: that of --data, written there first if it is not there yet."""
    with TemporaryDirectory() as temporary:
        data = given.data or Path(temporary)
        if not (data / "manifest.csv").exists():
            write_synthetic(data, given.images, given.side, given.seed)
        yield draw_images(data, 0, given)


def add_synthetic_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --images, --side and --data of `synthetic_draw`."""
    parser.add_argument("--images", type=int, default=120, help="to draw: 70 of 100 teach, 15 choose, 15 measure")
    parser.add_argument("--side", type=int, default=320, help="of an image, px")
    parser.add_argument("--data", type=Path, help="keep the images here, or take those that are here")


def chosen_rows(asked: str | None, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The rows of --rows, all of them without it."""
    rows = asked.split(",") if asked else list(known)
    unknown = [row for row in rows if row not in known]
    if unknown:
        parser.error(f"no row {unknown[0]}; there are {', '.join(known)}")
    return rows


def write_draw(path: Path, draw: Draw, seed: int) -> None:
    """Writes the draw for other environments: part -> [{"stem", "image", "labels"}], and the seed."""
    parts = {
        part: [{"stem": ref.image_id, "image": str(ref.path), "labels": str(ref.label_path)} for ref in refs]
        for part, refs in draw._asdict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**parts, "seed": seed}, indent=1), encoding="utf-8")


def train_row(
    row: str,
    config: LoopConfig,
    draw: Draw,
    given: argparse.Namespace,
    *,
    choose: bool = True,
    pseudo: Sequence[Sample] = (),
) -> Run:
    """Trains one configuration from scratch on the draw, and on pseudo-labelled images; keeps the checkpoint in --out.

    With `choose` its thresholds are fitted on the validation images, otherwise they are those of the configuration.
    """
    load = os.getloadavg()[0]
    teachers, validation = (
        [read_sample(ref) for ref in refs] for refs in (draw.train, draw.validation if choose else [])
    )
    print(f"{row}: {len(teachers)} images, {len(validation)} to choose thresholds on", file=sys.stderr, flush=True)
    trained = train(
        teachers,
        config.model,
        config.train,
        instances=config.instances,
        validation=validation,
        pseudo=pseudo,
        log=_say,
        clock=CLOCKS[given.clock],
    )
    minutes = trained.seconds / 60
    if given.out is not None:
        save_checkpoint(
            given.out / row, trained.net, config.model, trained.instances, minutes=minutes, steps=trained.steps
        )
    segmenter = Segmenter(trained.net, config.model, trained.instances, device=config.train.device)
    facts: dict[str, Any] = {
        "row": row,
        "model": config.model.name,
        "train_images": len(teachers),
        "train_cells": sum(len(sample.instances) for sample in teachers),
        "train_modalities": _modalities(teachers),
        "train_minutes": round(minutes, 2),
        "train_steps": trained.steps,
        "clock": given.clock,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in trained.net.parameters()),
        "instances": trained.instances.model_dump(),
        "validation": rounded(trained.validation),
        "seed": given.seed,
        "load_before": round(load, 2),
    }
    return Run(segmenter, trained, facts)


def measure_cells(segmenter: Segmenter, test: Sequence[ImageRef]) -> dict[str, Any]:
    """Every figure of `celloop evaluate` on the test images, and the time that predicting them took."""
    return measure_images(segmenter, test)[0]


def measure_images(segmenter: Segmenter, test: Sequence[ImageRef]) -> tuple[dict[str, Any], list[float]]:
    """What `measure_cells` gives, and the AP of each test image."""
    pairs, seconds, pixels = [], 0.0, 0
    for ref in test:
        image = read_image(ref.path).pixels
        start = time.perf_counter()
        cells = segmenter.predict(image, image_id=ref.image_id).instances
        seconds += time.perf_counter() - start
        pixels += ref.height * ref.width
        pairs.append((cells, read_sample(ref).instances))
    figures = {
        **rounded(evaluate(pairs, modalities=[ref.modality for ref in test])),
        "predict_s": round(seconds, 1),
        "predict_megapixels_per_s": round(pixels / 1e6 / seconds, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    return figures, [image_ap(*pair) for pair in pairs]


def rounded(figures: Any) -> Any:
    """The same document with its fractions cut to a few digits."""
    if isinstance(figures, dict):
        return {key: rounded(value) for key, value in figures.items()}
    return round(figures, DIGITS) if isinstance(figures, float) else figures


def _shuffled(images: Sequence[ImageRef], rng: np.random.Generator) -> list[ImageRef]:
    return [images[int(i)] for i in rng.permutation(len(images))]


def _modalities(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(sorted(Counter(sample.image.modality for sample in samples).items()))


def _say(step: int, values: dict[str, float]) -> None:
    if step % 100 == 0:
        print(f"step {step}: loss {values['loss']:.3f}, {values['seconds']:.0f} s", file=sys.stderr, flush=True)
