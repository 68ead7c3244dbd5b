"""Whether the cost model finds what an action costs, and whether images come out in the order of their true cost.

The cells of a labelled folder are the truth. Predictions are made from them: some cells missed, some cut, some
invented, each with a score that tells a part of it, worse in some images than in others. A simulated person corrects
them and needs known seconds an action, times log-normal noise (30 %), with a lunch break of 10 to 60 minutes in 5 % of
the images. What was done is counted from the geometry, as in the loop. Measured after 0, 10, 30 and 100 images, medians
over people and seeds: relative error of each cost, expected over true seconds in all, and Spearman's correlation of
the two in 200 further images. Beside it the same of plain least squares, which lunch breaks spoil, of the learnt costs
with the prior's rates, and of the number of predicted cells; known_edits: of the learnt costs where it is known what
will be done, which is what the costs alone lose. One JSON line.

    python benchmarks/bench_cost.py [--data DIR] [--seeds 10]
"""

import argparse
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness import ROOT, report, time_ms
from scipy.optimize import nnls
from scipy.stats import spearmanr

from flows.effort import KEPT_IOU
from loop.config import EffortConfig
from loop.data.folder import open_folder, read_labels
from loop.effort.cost import CostModel, Observation, fit_cost
from loop.effort.edits import Edits, Outcome, compare
from loop.effort.expected import Rates, expected_seconds, learn_rates
from loop.metrics.matching import iou_matrix
from loop.types import BoolArray, Instances

PRIOR = EffortConfig()
PEOPLE = {
    "fast": CostModel(5.0, 0.3, 3.5, 1.0, 5.0),
    "slow": CostModel(16.0, 1.2, 13.0, 3.0, 20.0),
    "thorough": CostModel(25.0, 1.5, 5.0, 1.0, 9.0),
}
IMAGES = (0, 10, 30, 100)
UNSEEN = 200
NOISE, LUNCH = 0.3, 0.05
NAMES = ("image_s", "keep_s", "edit_s", "delete_s", "add_s")


class Corrected(NamedTuple):
    """A prediction with what a person did to it, in truth and as counted."""

    prediction: Instances
    done: Edits
    outcome: Outcome


def correct(truth: Instances, rng: np.random.Generator) -> Corrected:
    """A prediction of one image, and its correction."""
    fault = rng.beta(1.5, 4)
    fates = rng.choice(["kept", "cut", "missed"], len(truth), p=[1 - fault, 0.6 * fault, 0.4 * fault])
    boxes, masks, scores = [], [], []
    for i in np.flatnonzero(fates != "missed").tolist():
        boxes.append(truth.boxes_xyxy[i].tolist())
        masks.append(truth.masks[i] if fates[i] == "kept" else cut(truth.masks[i], rng))
        scores.append(rng.normal(0.92 if fates[i] == "kept" else 0.8, 0.08))
    for box, mask in invented(truth, rng.poisson(0.2 + 0.4 * fault * len(truth)), rng):
        boxes.append(box)
        masks.append(mask)
        scores.append(rng.normal(0.7, 0.12))
    prediction = Instances.build(truth.shape, boxes, masks, scores=np.clip(scores, 0.05, 1), image_id=truth.image_id)
    counts = [int((fates == name).sum()) for name in ("kept", "cut", "missed")]
    done = Edits(counts[0], counts[1], len(masks) - counts[0] - counts[1], counts[2])
    return Corrected(prediction, done, compare(prediction, truth, kept_iou=KEPT_IOU))


def cut(mask: BoolArray, rng: np.random.Generator) -> BoolArray:
    """The cell without its last rows: 55 to 95 % of its pixels, at least one row of them."""
    rows = np.cumsum(mask.sum(axis=1)) / mask.sum()
    kept = mask.copy()
    kept[max(1, int(np.searchsorted(rows, rng.uniform(0.55, 0.95), side="right"))) :] = False
    return kept


def invented(truth: Instances, count: int, rng: np.random.Generator) -> list[tuple[list[int], BoolArray]]:
    """Up to `count` cells of the image at places where hardly any cell lies."""
    found = []
    for _ in range(3 * count if len(truth) else 0):
        mask = truth.masks[int(rng.integers(len(truth)))]
        height, width = mask.shape
        x, y = rng.integers(truth.shape[1] - width + 1), rng.integers(truth.shape[0] - height + 1)
        box = [int(x), int(y), int(x) + width, int(y) + height]
        if iou_matrix(Instances.build(truth.shape, [box], [mask]), truth).max() < 0.1:
            found.append((box, mask))
    return found[:count]


def measured(work: Sequence[Corrected], person: CostModel, rng: np.random.Generator) -> list[Observation]:
    """What Label Studio would say: the counted edits and the seconds on the clock."""
    noise = rng.lognormal(-(NOISE**2) / 2, NOISE, len(work))
    lunch = np.where(rng.random(len(work)) < LUNCH, rng.uniform(600, 3600, len(work)), 0)
    return [
        Observation(one.outcome.edits, person.seconds(one.done) * float(noise[i]) + float(lunch[i]))
        for i, one in enumerate(work)
    ]


def least_squares(observations: Sequence[Observation]) -> CostModel:
    """The plain way: non-negative least squares on the seconds, no prior, nothing robust."""
    if not observations:
        return CostModel.prior(PRIOR)
    counts = np.array([(1.0, *observation.edits) for observation in observations])
    found, _ = nnls(counts, np.array([observation.seconds for observation in observations]))
    return CostModel(*found.tolist())


def errors(fitted: CostModel, person: CostModel) -> list[float]:
    """Relative error of each cost."""
    return [abs(ours / true - 1) for ours, true in zip(astuple(fitted)[:5], astuple(person)[:5], strict=True)]


def ranks(values: Sequence[float], true: Sequence[float]) -> float:
    """Spearman's correlation; 0 where all values are equal, which rank nothing."""
    return float(spearmanr(values, true).statistic) if max(values) > min(values) else 0.0


def measure(images: Sequence[Instances], seeds: int) -> dict[int, dict[str, list[list[float]]]]:
    """Per number of images: rows of errors and of correlations, one for each person and seed."""
    rows: dict[int, dict[str, list[list[float]]]] = {
        n: {"error": [], "plain_error": [], "level": [], "spearman": []} for n in IMAGES
    }
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        work = [correct(images[i], rng) for i in rng.integers(len(images), size=IMAGES[-1] + UNSEEN)]
        unseen = work[IMAGES[-1] :]
        for person in PEOPLE.values():
            observations = measured(work[: IMAGES[-1]], person, rng)
            true = [person.seconds(one.done) for one in unseen]
            for n in IMAGES:
                fitted, plain = fit_cost(observations[:n], PRIOR), least_squares(observations[:n])
                rates = learn_rates(one.outcome for one in work[:n])
                expected = [expected_seconds(one.prediction, fitted, rates) for one in unseen]
                simple = [expected_seconds(one.prediction, plain, rates) for one in unseen]
                first = [expected_seconds(one.prediction, fitted, Rates.prior()) for one in unseen]
                known = [fitted.seconds(one.outcome.edits) for one in unseen]
                cells = [len(one.prediction) for one in unseen]
                rows[n]["error"].append(errors(fitted, person))
                rows[n]["plain_error"].append(errors(plain, person))
                rows[n]["level"].append([sum(expected) / sum(true), sum(simple) / sum(true)])
                rows[n]["spearman"].append([ranks(values, true) for values in (expected, simple, first, cells, known)])
    return rows


def median(rows: list[list[float]], names: Sequence[str]) -> dict[str, float]:
    """Median of each column."""
    return {name: round(float(value), 3) for name, value in zip(names, np.median(rows, axis=0), strict=True)}


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "dsb2018-mini")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    images = [read_labels(ref) for ref in open_folder(given.data).images]
    rows = measure(images, given.seeds)
    rng = np.random.default_rng(0)
    work = [correct(images[i % len(images)], rng) for i in range(1000)]
    observations = measured(work, PEOPLE["slow"], rng)
    counted = np.array([one.outcome.edits for one in work]).sum(axis=0)
    report(
        "cost_model",
        data=given.data.name,
        cells=sum(len(cells) for cells in images),
        seeds=given.seeds,
        people=list(PEOPLE),
        actions={"done": np.array([one.done for one in work]).sum(axis=0).tolist(), "counted": counted.tolist()},
        by_images={
            n: {
                "error": median(row["error"], NAMES),
                "plain_error": median(row["plain_error"], NAMES),
                "expected_over_true": median(row["level"], ("ours", "plain")),
                "spearman": median(row["spearman"], ("ours", "plain", "prior_rates", "cells", "known_edits")),
            }
            for n, row in rows.items()
        },
        fit_1000=time_ms(lambda: fit_cost(observations, PRIOR), 5),
    )


if __name__ == "__main__":
    main()
