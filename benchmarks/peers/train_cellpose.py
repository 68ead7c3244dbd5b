"""Cellpose 3 (its U-Net without pretrained weights) on the images that bench_models.py drew, for the same minutes.

Cellpose's own `train_seg` with its defaults, on grey images; only the number of epochs is set: as many as the budget
holds, by the time of the epochs of a trial run that is thrown away. The network is built for the mean diameter of the
training masks (diam_mean). Every training image with a cell is used (Cellpose leaves out those with fewer than five).

OUT/default: the tool's thresholds, the mean diameter of the training masks for every image.
OUT/tuned: flow and cell probability thresholds chosen on the validation images, and the better of two diameters: that
mean, or Cellpose's size model for each image (trained on the same images after the budget is spent, on patches of the
224 px that the network sees, not 512).

A cell's score is its mean cell probability.

    python benchmarks/peers/train_cellpose.py --draw OUT/draw.json --minutes 10 --out OUT/cellpose
"""

import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import fastremap
import numpy as np
import torch
from cellpose import dynamics, models, train, utils
from drawn import (
    CLOCKS,
    Draw,
    arguments,
    mean_quality,
    read_draw,
    read_image,
    read_labels,
    say,
    write_prediction,
    write_run,
)
from scipy import ndimage

BATCH = 8
GREY = [0, 0]
FLOWS = (0.2, 0.4, 0.6, 1.0)
PROBABILITIES = (-2.0, -1.0, 0.0, 1.0, 2.0)
MIN_MASKS = 1
SIZE_EPOCHS = 10
SIDE = 224


class Raw(NamedTuple):
    """The network's answer for an image at a diameter: flows (2, H, W), cell logits (H, W), Euler steps."""

    flows: np.ndarray
    logits: np.ndarray
    steps: float


def learn(draw: Draw, given: Any) -> tuple[models.CellposeModel, models.SizeModel, float, dict[str, Any]]:
    """The trained network, its size model, the seconds of training, and the facts of it."""
    images = [read_image(item.image, invert_bright=given.invert_bright) for item in draw.train]
    labels = [read_labels(item.labels) for item in draw.train]
    flows = dynamics.labels_to_flows(labels, device=torch.device("cpu"))
    diameter = float(np.mean([max(5.0, utils.diameters(mask)[0]) for mask in labels if mask.any()]))
    clock = CLOCKS[given.clock]
    an_epoch = math.ceil(len(images) / BATCH)

    def run(epochs: int, name: str) -> tuple[models.CellposeModel, str, float]:
        torch.manual_seed(draw.seed)
        model = models.CellposeModel(gpu=False, pretrained_model=False, diam_mean=diameter)
        start = clock()
        path, losses, _ = train.train_seg(
            model.net,
            train_data=images,
            train_labels=flows,
            channels=GREY,
            batch_size=BATCH,
            n_epochs=epochs,
            min_train_masks=MIN_MASKS,
            save_path=given.out,
            model_name=name,
        )
        say(f"{name}: {epochs} epochs, loss {losses[0]:.3f} to {losses[-1]:.3f}, {clock() - start:.0f} s")
        return model, str(path), clock() - start

    if given.max_steps is None:
        one, four = run(1, "trial")[2], run(4, "trial")[2]
        each = (four - one) / 3
        epochs = max(1, round((60 * given.minutes - max(0.0, one - each)) / each))
    else:
        epochs = max(1, given.max_steps // an_epoch)
    model, path, seconds = run(epochs, "cellpose")
    start = time.perf_counter()
    size = learn_size(model, path, images, flows, passes=SIZE_EPOCHS if given.max_steps is None else 1)
    facts = {
        "steps": epochs * an_epoch,
        "size_model_minutes": round((time.perf_counter() - start) / 60, 2),
        "diam_mean": round(diameter, 2),
    }
    return model, size, seconds, facts


def learn_size(
    model: models.CellposeModel, path: str, images: list[np.ndarray], flows: list[np.ndarray], *, passes: int
) -> models.SizeModel:
    """Cellpose's model of the diameter of an image's cells, from the styles of the trained network."""
    train.train_size(
        model.net,
        path,
        train_data=images,
        train_labels=flows,
        channels=GREY,
        batch_size=BATCH,
        min_train_masks=MIN_MASKS,
        bsize=SIDE,
        n_epochs=passes,
    )
    return models.SizeModel(model, pretrained_size=f"{path}_size.npy")


def look(model: models.CellposeModel, image: np.ndarray, diameter: float) -> Raw:
    """What the network says of an image whose cells have that diameter, px."""
    _, (_, flows, logits), _ = model.eval(image, channels=GREY, diameter=diameter, compute_masks=False)
    return Raw(flows, logits, 200 * diameter / model.diam_mean)


def cut(raw: Raw, flow: float, probability: float) -> np.ndarray:
    """The label image (H, W) int32, numbered from 1, for the two thresholds; as CellposeModel.eval makes it."""
    masks = dynamics.resize_and_compute_masks(
        raw.flows,
        raw.logits,
        niter=raw.steps,
        flow_threshold=flow,
        cellprob_threshold=probability,
        device=torch.device("cpu"),
    )
    return np.asarray(fastremap.renumber(masks, in_place=False)[0], dtype=np.int32)


def scores_of(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Mean cell probability of each cell, (N,)."""
    numbers = np.arange(1, int(labels.max()) + 1)
    return np.asarray(ndimage.mean(1 / (1 + np.exp(-logits)), labels, numbers)) if len(numbers) else np.zeros(0)


def diameter_of(size: models.SizeModel, image: np.ndarray) -> float:
    """The size model's diameter of an image's cells, px."""
    return float(size.eval(image, channels=GREY)[0])


def choose(model: models.CellposeModel, size: models.SizeModel, draw: Draw, given: Any) -> dict[str, Any]:
    """Diameter and thresholds of the highest mean quality on the validation images, one after the other."""
    images = [read_image(item.image, invert_bright=given.invert_bright) for item in draw.validation]
    true = [read_labels(item.labels) for item in draw.validation]

    def quality(raws: list[Raw], flow: float, probability: float) -> float:
        return mean_quality([(cut(raw, flow, probability), gt) for raw, gt in zip(raws, true, strict=True)])

    raws = {
        "mean": [look(model, image, model.diam_mean) for image in images],
        "size model": [look(model, image, diameter_of(size, image)) for image in images],
    }
    diameter = max(raws, key=lambda name: quality(raws[name], 0.4, 0.0))
    probability = max(PROBABILITIES, key=lambda value: quality(raws[diameter], 0.4, value))
    flow = max(FLOWS, key=lambda value: quality(raws[diameter], value, probability))
    return {"diameter": diameter, "flow_threshold": flow, "cellprob_threshold": probability}


def predict(
    model: models.CellposeModel, size: models.SizeModel, draw: Draw, chosen: dict[str, Any], given: Any, directory: Path
) -> float:
    """Writes the label images of the test; the seconds that it took, reading and writing left out."""
    seconds = 0.0
    for item in draw.test:
        image = read_image(item.image, invert_bright=given.invert_bright)
        start = time.perf_counter()
        diameter = model.diam_mean if chosen["diameter"] == "mean" else diameter_of(size, image)
        raw = look(model, image, diameter)
        labels = cut(raw, chosen["flow_threshold"], chosen["cellprob_threshold"])
        seconds += time.perf_counter() - start
        write_prediction(directory, item.stem, labels, scores_of(labels, raw.logits))
    return seconds


def main() -> None:
    """Trains, chooses, predicts."""
    given = arguments(__doc__)
    draw = read_draw(given)
    given.out.mkdir(parents=True, exist_ok=True)
    model, size, trained_s, facts = learn(draw, given)
    variants = {"default": {"diameter": "mean", "flow_threshold": 0.4, "cellprob_threshold": 0.0}}
    variants["tuned"] = choose(model, size, draw, given)
    say(f"tuned: {variants['tuned']}")
    seconds = {name: predict(model, size, draw, v, given, given.out / name) for name, v in variants.items()}
    facts["predict_s"] = {name: round(value, 1) for name, value in seconds.items()}
    facts = {"tool": "cellpose", "version": version("cellpose"), **facts, "variants": variants}
    write_run(given, draw, trained_s, facts)


if __name__ == "__main__":
    main()
