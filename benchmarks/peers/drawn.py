"""What the peers share: the images that bench_models.py drew, a clock, and predictions for `celloop evaluate`.

Needs numpy and OpenCV only: each peer lives in an environment of its own, in which celloop is not installed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
BRIGHT = 127


class Item(NamedTuple):
    """One image of the draw and its label image."""

    stem: str
    image: Path
    labels: Path


class Draw(NamedTuple):
    """The images to learn from, to choose thresholds on, and to predict."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]
    seed: int


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a peer: --draw, --minutes, --clock, --seed, --max-steps, --out, --test-images."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, required=True, help="draw.json of bench_models.py --draw-only")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: minutes of this process's CPU time"
    )
    parser.add_argument("--seed", type=int, help="of the weights and the crops; that of the draw without it")
    parser.add_argument("--max-steps", type=int, help="a budget in steps instead of minutes, for a quick trial")
    parser.add_argument("--test-images", type=int, help="predict so many test images only, for a quick trial")
    parser.add_argument("--validation-images", type=int, help="choose on so many only, for a quick trial")
    parser.add_argument("--out", type=Path, required=True, help="gets VARIANT/labels and run.json")
    parser.add_argument("--invert-bright", action="store_true", help="images with a bright background are inverted")
    return parser.parse_args()


def read_draw(given: argparse.Namespace) -> Draw:
    """The images of --draw, cut to what a quick trial asks for."""
    document = json.loads(given.draw.read_text(encoding="utf-8"))
    parts = {
        part: [Item(item["stem"], Path(item["image"]), Path(item["labels"])) for item in document[part]]
        for part in ("train", "validation", "test")
    }
    seed = document["seed"] if given.seed is None else given.seed
    return Draw(
        parts["train"], parts["validation"][: given.validation_images], parts["test"][: given.test_images], seed
    )


def read_image(path: Path, *, invert_bright: bool = False) -> np.ndarray:
    """The image, (H, W, 3) RGB as it is stored; with `invert_bright` one whose median is bright is inverted."""
    stored = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if stored is None:
        raise SystemExit(f"cannot read {path}")
    pixels = cv2.cvtColor(stored, cv2.COLOR_BGR2RGB)
    highest = np.iinfo(pixels.dtype).max
    return highest - pixels if invert_bright and np.median(pixels) > BRIGHT * (highest / 255) else pixels


def read_labels(path: Path) -> np.ndarray:
    """The label image, (H, W) int32, 0 = background."""
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if labels is None or labels.ndim != 2:
        raise SystemExit(f"{path} is no label image of one channel")
    return labels.astype(np.int32)


def write_prediction(directory: Path, stem: str, labels: np.ndarray, scores: np.ndarray) -> None:
    """Writes directory/labels/STEM.png, 16-bit, and STEM.scores.json, label to score.

    Args:
        directory: of the variant.
        stem: the image's name without its ending.
        labels: (H, W) int, 0 = background, i + 1 = the cell of scores[i].
        scores: (N,) in [0, 1].
    """
    folder = directory / "labels"
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / f"{stem}.png"), labels.astype(np.uint16))
    by_label = {str(number): round(float(score), 4) for number, score in enumerate(scores, start=1)}
    (folder / f"{stem}.scores.json").write_text(json.dumps(by_label), encoding="utf-8")


def mean_quality(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over IoU .50:.95 of TP / (TP + FP + FN) pooled over images: what thresholds are chosen by.

    Args:
        pairs: (predicted, true) label images. Above an IoU of 0.5 a pair is one to one by itself.
    """
    thresholds = np.linspace(0.5, 0.95, 10)
    hits, cells = np.zeros(len(thresholds)), 0
    for predicted, true in pairs:
        columns = int(true.max()) + 1
        shape = (int(predicted.max()) + 1, columns)
        shared = np.bincount(predicted.ravel() * columns + true.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
        iou = (shared / np.maximum(union, 1))[1:, 1:]
        hits += (iou[None] > thresholds[:, None, None]).sum((1, 2))
        cells += np.count_nonzero(shared[1:].sum(1)) + np.count_nonzero(shared[:, 1:].sum(0))
    return float((hits / np.maximum(cells - hits, 1)).mean())


def say(text: str) -> None:
    """Progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def write_run(given: argparse.Namespace, draw: Draw, seconds: float, facts: dict[str, Any]) -> None:
    """Writes OUT/run.json: what was trained and for how long; bench_models.py --peers puts it beside the figures.

    Args:
        given: the command line.
        draw: the images.
        seconds: of training, on the clock that was asked for.
        facts: tool, version, steps, predict_s and variants (name to thresholds), and what else a reader should know.
    """
    document = {
        **facts,
        "train_images": len(draw.train),
        "train_minutes": round(seconds / 60, 2),
        "clock": given.clock,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "seed": draw.seed,
        "invert_bright": given.invert_bright,
    }
    (given.out / "run.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
