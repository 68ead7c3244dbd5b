"""Whether pseudo-labels help: labelled-only against mixed training, the same number of optimiser steps for both.

For each number of labelled images and each seed a model learns from these images alone; then labellers propose cells
on other images of the pool, whose labels nobody sees, a calibrator (fitted on the val images, from which nothing is
learnt) says how far each cell is believed, and a second model learns from both. Thresholds of every model are fitted on
the val images; all are measured on the test images, and the paired bootstrap over these gives the gain's interval.

    python benchmarks/bench_pseudo.py --data DIR --images 10 20 --seeds 0 1 2 --max-steps 1500 --arms champion,ensemble

Arms: the name of one labeller (champion: the labelled-only model itself; unet, seu_net, sparse_seu_net, pix2pix: one of
that kind, trained on the same images for the same steps), `ensemble` (--ensemble names its members), and two
references: `oracle` (the true labels of the same images: what perfect pseudo-labels would give) and `consistency` (no
pseudo-label, only agreement with the averaged weights on the same images). One JSON line a row; `prelabels` are the
figures of the labellers' own fused cells with calibrated confidence on the test images: what people are shown.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import report
from training_runs import Draw, Run, add_arguments, draw_images, measure_images, rounded, settings, train_row

from loop.config import LoopConfig, PseudoConfig
from loop.data.folder import read_sample
from loop.data.store import read_image
from loop.metrics.instance import evaluate, image_ap
from loop.metrics.paired import paired_bootstrap
from loop.models.segmenter import Segmenter
from loop.pseudo.base import Proposal
from loop.pseudo.calibration import Calibrator, calibrate, true_iou
from loop.pseudo.evidence import evidence
from loop.pseudo.fusion import Fused, fuse_proposals
from loop.pseudo.lesson import known_ground, shown, teach
from loop.pseudo.own import OwnLabeller
from loop.types import FloatArray, ImageRef, Sample, UInt8Array

REFERENCES = ("oracle", "consistency")
CONFIDENCE, RESAMPLES = 0.9, 2000


class Panel(NamedTuple):
    """Labellers that speak with one voice."""

    labellers: dict[str, OwnLabeller]
    config: PseudoConfig

    def fused(self, pixels: UInt8Array, image_id: str) -> Fused:
        """What they propose for an image, as one set of cells."""
        said: dict[str, Proposal] = {n: of.propose(pixels, image_id=image_id) for n, of in self.labellers.items()}
        return fuse_proposals(said, {}, self.config, shape=pixels.shape[:2], image_id=image_id)


class Study(NamedTuple):
    """One number of labelled images with one seed."""

    given: argparse.Namespace
    draw: Draw
    unlabelled: list[ImageRef]
    config: LoopConfig
    base: Run

    def row(self, arm: str) -> str:
        """The name of a row."""
        return f"{arm}-n{len(self.draw.train)}-seed{self.given.seed}"


def studies(given: argparse.Namespace) -> Sequence[tuple[argparse.Namespace, int]]:
    """Every pair of seed and number of images."""
    every = []
    for seed in given.seeds:
        for count in given.images:
            every.append((argparse.Namespace(**{**vars(given), "seed": seed}), count))
    return every


def open_study(given: argparse.Namespace, count: int) -> Study:
    """Draws the images and trains the labelled-only model."""
    everything = draw_images(given.data, 0, given)
    draw = everything._replace(train=everything.train[:count])
    rest = everything.train[count : count + given.unlabelled]
    config = settings(given.model, given)
    return Study(given, draw, rest, config, train_row(f"labelled-n{count}", config, draw, given))


def panel_of(study: Study, names: Sequence[str], trained: dict[str, Segmenter]) -> Panel:
    """The labellers of these names; a kind that is not trained yet is trained on the same labelled images."""
    for name in names:
        if name not in trained:
            trained[name] = train_row(name, settings(name, study.given), study.draw, study.given).segmenter
    views = study.config.pseudo.views
    return Panel({name: OwnLabeller(name, trained[name], views=views) for name in names}, study.config.pseudo)


def calibrated(panel: Panel, images: Sequence[ImageRef]) -> tuple[Calibrator, dict[str, float]]:
    """A calibrator from images that no labeller has learnt from, and its figures across folds of them."""
    features: list[FloatArray] = []
    agreement: list[FloatArray] = []
    groups: list[str] = []
    for ref in images:
        pixels = read_image(ref.path).pixels
        fused = panel.fused(pixels, ref.image_id)
        features.append(evidence(fused, pixels, {}))
        agreement.append(true_iou(fused.instances, read_sample(ref).instances))
        groups += [ref.image_id] * len(fused.instances)
    found = calibrate(np.concatenate(features), np.concatenate(agreement), groups, panel.config)
    return found.calibrator, found.figures


def lessons(panel: Panel, judge: Calibrator, images: Sequence[ImageRef]) -> tuple[list[Sample], dict[str, Any]]:
    """The pseudo-labelled images, and how true their cells are."""
    config = panel.config
    samples, right, taught, true_cells = [], 0, 0, 0
    for ref in images:
        pixels = read_image(ref.path).pixels
        fused = panel.fused(pixels, ref.image_id)
        confidence = judge.confidence(evidence(fused, pixels, {}))
        cells = teach(fused.instances, confidence, config)
        samples.append(Sample(ref, cells, known=known_ground(fused.instances, confidence, config)))
        kept = cells.take(np.flatnonzero(cells.weights > 0))
        person = read_sample(ref).instances
        right += int((true_iou(kept, person) >= 0.5).sum())
        taught += len(kept)
        true_cells += len(person)
    facts = {"images": len(samples), "taught": taught, "doubtful": sum(int((s[1].weights == 0).sum()) for s in samples)}
    return samples, {**facts, "precision": right / max(taught, 1), "recall": right / max(true_cells, 1)}


def prelabels(panel: Panel, judge: Calibrator, study: Study, before: Sequence[float]) -> dict[str, Any]:
    """How good the cells are that people are shown, on the test images: fused, with their confidence as the score."""
    pairs = []
    for ref in study.draw.test:
        pixels = read_image(ref.path).pixels
        fused = panel.fused(pixels, ref.image_id)
        confidence = judge.confidence(evidence(fused, pixels, {}))
        pairs.append((shown(fused.instances, confidence, panel.config), read_sample(ref).instances))
    figures = evaluate(pairs, modalities=[ref.modality for ref in study.draw.test])
    gain = gain_of([image_ap(*pair) for pair in pairs], before)
    return {**rounded({key: figures[key] for key in ("ap", "ap50", "ap75", "f1", "macro_ap")}), "gain": gain}


def gain_of(after: Sequence[float], before: Sequence[float]) -> dict[str, float]:
    """The mean difference in AP per image with its interval."""
    rng = np.random.default_rng(0)
    gain = paired_bootstrap(after, before, confidence=CONFIDENCE, resamples=RESAMPLES, rng=rng)
    return dict(rounded(gain._asdict()))


def train_mixed(study: Study, arm: str, pseudo: Sequence[Sample], changes: dict[str, Any] | None = None) -> Run:
    """The same model and steps on the labelled and the pseudo-labelled images."""
    config = study.config.model_copy(update={"train": study.config.train.model_copy(update=changes or {})})
    return train_row(arm, config, study.draw, study.given, pseudo=pseudo)


def references(study: Study) -> dict[str, Callable[[], Run]]:
    """How the two references are trained."""

    def oracle() -> Run:
        return train_mixed(study, "oracle", [read_sample(r) for r in study.unlabelled], {"pseudo_ramp": 0.0})

    def consistency() -> Run:
        blank = [read_sample(ref) for ref in study.unlabelled]
        nothing = [s._replace(instances=s.instances.take([]), known=np.zeros(s.instances.shape, bool)) for s in blank]
        return train_mixed(study, "consistency", nothing)

    return {"oracle": oracle, "consistency": consistency}


def measure(study: Study, arms: Sequence[str]) -> None:
    """One JSON line for the labelled-only model and one for each arm."""
    test, trained = study.draw.test, {"champion": study.base.segmenter}
    figures, before = measure_images(study.base.segmenter, test)
    report("pseudo", **{**study.base.facts, "row": study.row("labelled")}, **figures)
    sys.stdout.flush()
    for arm in arms:
        extra: dict[str, Any] = {}
        if arm in REFERENCES:
            run = references(study)[arm]()
        else:
            names = study.given.ensemble.split(",") if arm == "ensemble" else [arm]
            panel = panel_of(study, names, trained)
            judge, fit = calibrated(panel, study.draw.validation)
            pseudo, quality = lessons(panel, judge, study.unlabelled)
            print(f"{arm}: {quality}, {fit}", file=sys.stderr, flush=True)
            extra = {"labellers": names, "pseudo": rounded(quality), "calibration": rounded(fit)}
            extra["prelabels"] = prelabels(panel, judge, study, before)
            run = train_mixed(study, arm, pseudo)
        figures, after = measure_images(run.segmenter, test)
        facts = {**run.facts, "row": study.row(arm), "gain": gain_of(after, before), **extra}
        report("pseudo", **facts, **figures)
        sys.stdout.flush()


def main() -> None:
    """Prints the rows of every number of images and every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with splits in manifest.csv")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 20], help="labelled images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the draw and of the training")
    parser.add_argument("--unlabelled", type=int, default=150, help="images of the pool that pseudo-labels are for")
    parser.add_argument("--model", default="seu_net", help="a name of configs/model: what is trained")
    parser.add_argument("--arms", default="champion,ensemble", help="comma between")
    parser.add_argument("--ensemble", default="champion,unet", help="labellers of the arm ensemble")
    add_arguments(parser, minutes=4.0)
    given = parser.parse_args()
    for study_of, count in studies(given):
        measure(open_study(study_of, count), given.arms.split(","))


if __name__ == "__main__":
    main()
