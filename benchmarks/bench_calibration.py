"""How true the confidence of proposed cells is: calibration error, and how it ranks cells by their true IoU.

Each labeller (a model of configs/model) is trained on --images of the pool, and again for each of --folds parts of them
without that part. The cells that the fold models propose in images they have not seen fit the calibrator; the whole
model's cells in the test images, of which nothing was used, measure it. Goal: ECE <= 0.05, Spearman >= 0.7. Beside it
the same of the raw score and of score x stability. With several labellers their cells are fused. One JSON line.

    python benchmarks/bench_calibration.py --data DIR --images 40 --max-steps 350 --folds 4 --models MODELS
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import report
from training_runs import Draw, add_arguments, draw_images, rounded, settings, train_row

from loop.config import PseudoConfig
from loop.data.folder import read_sample
from loop.data.store import read_image
from loop.metrics.calibration import Bin, brier_error, expected_calibration_error, reliability, spearman
from loop.models.segmenter import Segmenter
from loop.pseudo.calibration import calibrate, true_iou, uncalibrated
from loop.pseudo.evidence import evidence
from loop.pseudo.fusion import fuse_proposals
from loop.pseudo.own import OwnLabeller
from loop.training.checkpoint import load_checkpoint
from loop.types import BoolArray, FloatArray, ImageRef

GOALS = {"ece": 0.05, "spearman": 0.7}


@dataclass(frozen=True)
class Table:
    """Proposed cells of many images, one row each, with two raw scores and the true IoU; `ms` of CPU a cell."""

    features: FloatArray
    score: FloatArray
    steady: FloatArray
    iou: FloatArray
    groups: list[str]
    modalities: list[str]
    people: int
    ms: dict[str, float]


def group_of(ref: ImageRef) -> str:
    """What must not be on both sides."""
    return ref.group or ref.image_id


def labeller_of(name: str, part: str, draw: Draw, given: argparse.Namespace) -> OwnLabeller:
    """The model trained on a draw, or the one that already lies in --models."""
    row = f"{name}-{given.images}-{given.max_steps or f'{given.minutes}min'}-seed{given.seed}-of{given.folds}-{part}"
    if given.out is not None and (given.out / row).exists():
        stored = load_checkpoint(given.out / row)
        segmenter = Segmenter(stored.net, stored.model_config, stored.instance_config, model_version=part)
    else:
        segmenter = train_row(row, settings(name, given), draw, given, choose=False).segmenter
    return OwnLabeller(name, segmenter, views=given.views)


def table_of(labellers: Mapping[str, OwnLabeller], refs: Sequence[ImageRef], config: PseudoConfig) -> Table:
    """The fused cells of the images with their evidence and how they agree with a person's."""
    rows: list[tuple[FloatArray, FloatArray, FloatArray, FloatArray]] = []
    groups: list[str] = []
    modalities: list[str] = []
    people, spent = 0, {"propose": 0.0, "fuse": 0.0, "evidence": 0.0}
    for ref in refs:
        image, truth = read_image(ref.path).pixels, read_sample(ref).instances
        marks = [time.process_time()]
        proposals = {name: labeller.propose(image, image_id=ref.image_id) for name, labeller in labellers.items()}
        marks.append(time.process_time())
        fused = fuse_proposals(proposals, {}, config)
        marks.append(time.process_time())
        features = evidence(fused, image, {})
        marks.append(time.process_time())
        for stage, seconds in zip(spent, np.diff(marks).tolist(), strict=True):
            spent[stage] += seconds
        rows.append((features, fused.instances.scores, uncalibrated(fused), true_iou(fused.instances, truth)))
        groups += [group_of(ref)] * len(features)
        modalities += [ref.modality] * len(features)
        people += len(truth)
    features, score, steady, iou = (np.concatenate(column) for column in zip(*rows, strict=True))
    ms = {stage: 1000 * seconds / max(len(groups), 1) for stage, seconds in spent.items()}
    return Table(features, score, steady, iou, groups, modalities, people, ms)


def joined(tables: Sequence[Table]) -> Table:
    """All rows of several tables."""
    return Table(
        np.concatenate([t.features for t in tables]),
        np.concatenate([t.score for t in tables]),
        np.concatenate([t.steady for t in tables]),
        np.concatenate([t.iou for t in tables]),
        [group for t in tables for group in t.groups],
        [modality for t in tables for modality in t.modalities],
        sum(t.people for t in tables),
        {},
    )


def figures_of(confidence: FloatArray, table: Table, agreed: BoolArray) -> dict[str, float]:
    """The calibration errors and the rank correlation of one way to say how sure one is."""
    return {
        "ece": expected_calibration_error(confidence, agreed),
        "ece_mass": expected_calibration_error(confidence, agreed, binning="mass"),
        "brier_error": brier_error(confidence, agreed),
        "spearman": spearman(confidence, table.iou),
    }


def by_modality(confidence: FloatArray, table: Table, agreed: BoolArray) -> dict[str, dict[str, float]]:
    """Cells, mean confidence and share that agreed, of each modality."""
    kinds = np.array(table.modalities)
    return {
        str(kind): {
            "cells": int((kinds == kind).sum()),
            "confidence": float(confidence[kinds == kind].mean()),
            "agreed": float(agreed[kinds == kind].mean()),
        }
        for kind in np.unique(kinds)
    }


def plot(path: Path, confidence: FloatArray, table: Table, agreed: BoolArray) -> None:
    """Writes the reliability of raw score and confidence, and the true IoU of the cells by their confidence."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for said, name, colour in ((table.score, "raw score", "C1"), (confidence, "confidence", "C0")):
        bins: list[Bin] = reliability(said, agreed)
        ece = expected_calibration_error(said, agreed)
        label = f"{name}, ECE {ece:.3f}"
        left.plot([b.confidence for b in bins], [b.correct for b in bins], "o-", color=colour, label=label)
    left.set(xlabel="said", ylabel="share with IoU >= 0.75", xlim=(0, 1), ylim=(0, 1))
    left.legend(loc="upper left", frameon=False)
    right.scatter(confidence, table.iou, s=3, alpha=0.25, linewidths=0)
    rho = spearman(confidence, table.iou)
    right.set(xlabel="confidence", ylabel="true IoU", xlim=(0, 1), ylim=(0, 1), title=f"Spearman {rho:.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def measure(draw: Draw, names: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    """Trains what is not there, fits the calibrator and measures it."""
    config = PseudoConfig(views=given.views)
    groups = list(dict.fromkeys(group_of(ref) for ref in draw.train))
    fold = {group: i % given.folds for i, group in enumerate(groups)}
    parts = []
    for k in range(given.folds):
        own = [ref for ref in draw.train if fold[group_of(ref)] == k]
        rest = Draw([ref for ref in draw.train if fold[group_of(ref)] != k], [], draw.test)
        parts.append(table_of({name: labeller_of(name, f"fold{k}", rest, given) for name in names}, own, config))
    fitted = joined(parts)
    calibration = calibrate(fitted.features, fitted.iou, fitted.groups, config)
    whole = {name: labeller_of(name, "all", draw, given) for name in names}
    test = table_of(whole, draw.test, config)
    agreed = np.asarray(test.iou >= config.keep_iou)
    confidence = calibration.calibrator.confidence(test.features)
    if given.plot is not None:
        plot(given.plot, confidence, test, agreed)
    sure = confidence >= config.keep
    return {
        "fitted_on": calibration.figures,
        "weights": dict(zip(calibration.calibrator.names, calibration.calibrator.weights, strict=True)),
        "test_cells": len(confidence),
        "test_people": test.people,
        "test_agreed": float(agreed.mean()),
        "confidence": figures_of(confidence, test, agreed),
        "raw_score": figures_of(test.score, test, agreed),
        "score_x_stability": figures_of(test.steady, test, agreed),
        "kept": {"cells": int(sure.sum()), "precision": float(agreed[sure].mean()) if sure.any() else 0.0},
        "by_modality": by_modality(confidence, test, agreed),
        "bins": [rounded(row._asdict()) for row in reliability(confidence, agreed)],
        "cpu_ms_a_cell": test.ms,
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a dataset folder with splits pool and test")
    parser.add_argument("--images", type=int, default=40, help="labelled images of the pool")
    parser.add_argument("--folds", type=int, default=4, help="parts of the images, each unseen by one model")
    parser.add_argument("--labellers", default="seu_net", help="files of configs/model, comma between")
    parser.add_argument("--views", type=int, choices=(1, 2, 4, 7, 8), default=4, help="flips and turns an image")
    parser.add_argument("--models", type=Path, help="keep the models here, or take those that are here")
    parser.add_argument("--plot", type=Path, help="write the reliability plot here, as docs/images/reliability.png")
    add_arguments(parser, minutes=2.0)
    given = parser.parse_args()
    given.out = given.models or given.out
    names = given.labellers.split(",")
    figures = measure(draw_images(given.data, given.images, given), names, given)
    asked = {"labellers": names, "images": given.images, "folds": given.folds, "views": given.views, "seed": given.seed}
    report("calibration", **asked, max_steps=given.max_steps, goals=GOALS, **rounded(figures))


if __name__ == "__main__":
    main()
