"""Table: pix2pix with and without what steadies it, on the same images, crops and number of steps.

--data is a dataset folder whose manifest.csv has the splits pool, val and test. N images of the pool are drawn at
random. Each row learns from them for --max-steps steps from scratch, fits its thresholds on the val images and predicts
the test images; one JSON line for each row and seed. A row that its watch ended says why in `ended` and is measured
with the last good weights.

The rows: `plain` is the recipe of Isola et al. 2017 (2e-4 for both networks, no spectral norm, no R1 penalty, no
smoothing; the watch only writes down what it would have said), `plain_fast` the same with 2e-3; `stabilised` is
configs/model/pix2pix.yaml, `l1` the same with an L1 weight so large that the discriminator has no say, and `bce` the
same network with cross-entropy and Dice.

    python benchmarks/bench_pix2pix.py --data DIR --images 40 --max-steps 700 --seeds 0 1 2 --curves curves.png
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import report
from training_runs import Draw, add_arguments, chosen_rows, draw_images, measure_cells, rounded, settings

from loop.config import LoopConfig
from loop.data.dataset import CropStream
from loop.data.folder import read_sample
from loop.models.runtime import resolve_device
from loop.models.segmenter import Segmenter
from loop.training.adversarial import AdversarialLearner
from loop.training.checkpoint import save_checkpoint
from loop.training.distributed import Group
from loop.training.learner import Learner
from loop.training.trainer import learning_rate
from loop.training.validation import Validation

EVERY = 10
PLAIN = {"train.gan_smooth": 0.0, "train.gan_penalty": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {**PLAIN, "train.learning_rate": 2e-4, "train.gan_rate": 2e-4},
    "plain_fast": {**PLAIN, "train.gan_rate": 2e-3},
    "stabilised": {},
    "l1": {"train.gan_l1_weight": 1e6},
    "bce": {},
}
DRAWN = {
    "loss_l1": "mean absolute error of the planes",
    "loss_adversarial": "adversarial loss of the generator",
    "loss_discriminator": "loss of the discriminator",
    "score_fake": "made patches held for real",
}
Curve = dict[str, list[float]]


class Unwatched(AdversarialLearner):
    """One that goes on whatever its watch says; `warned` keeps the first thing that it said, with the step."""

    warned = ""

    def _end(self) -> None:
        self.warned = self.warned or f"step {self.steps}: {self.ended}"
        if "nan" not in self.ended and "inf" not in self.ended:
            self.ended = ""


def build(row: str, config: LoopConfig) -> Learner:
    """The learner of a row."""
    group = Group(0, 1, resolve_device(config.train.device))
    if row == "bce":
        return Learner(config.model, config.train, group)
    if row in ("plain", "plain_fast"):
        return Unwatched(config.model, config.train, group, spectral=False)
    return AdversarialLearner(config.model, config.train, group)


def learn(learner: Learner, stream: CropStream, config: LoopConfig, steps: int) -> Curve:
    """Steps until the end; the means of each ten steps."""
    curve: Curve = {"step": []}
    loss = 0.0
    while learner.steps < steps and not learner.ended:
        done = learner.steps
        batches = [stream.batch(done * config.train.accumulate + k) for k in range(config.train.accumulate)]
        loss += float(learner.step(batches, learning_rate(done, done / steps, config.train)))
        if learner.steps % EVERY == 0:
            for name, value in {"step": float(learner.steps), "loss": loss / EVERY, **learner.figures()}.items():
                curve.setdefault(name, []).append(value)
            loss = 0.0
        if learner.steps % 100 == 0:
            print(f"step {learner.steps}: {rounded({k: v[-1] for k, v in curve.items()})}", file=sys.stderr, flush=True)
    return curve


def measure(row: str, draw: Draw, given: argparse.Namespace) -> Curve:
    """One JSON line of a row; its curves."""
    config = settings("pix2pix", given, ROWS[row])
    learner = build(row, config)
    stream = CropStream([read_sample(ref) for ref in draw.train], config.model, config.train, learner.lesson)
    start = time.process_time()
    curve = learn(learner, stream, config, given.max_steps)
    cpu_s = time.process_time() - start
    net = learner.finish()
    thresholds, validation = config.instances, None
    if draw.validation:
        judge = Validation([read_sample(ref) for ref in draw.validation], config.model, config.train, thresholds)
        thresholds, validation = judge.fit(net)
    if given.out is not None:
        save_checkpoint(given.out / f"{row}-seed{given.seed}", net, config.model, thresholds, steps=learner.steps)
    report(
        "pix2pix",
        row=row,
        seed=given.seed,
        train_images=len(draw.train),
        train_steps=learner.steps,
        train_cpu_s=round(cpu_s, 1),
        ended=learner.ended or getattr(learner, "warned", ""),
        last=rounded({name: values[-1] for name, values in curve.items() if values}),
        instances=thresholds.model_dump(),
        validation=rounded(validation),
        threads=torch.get_num_threads(),
        **measure_cells(Segmenter(net, config.model, thresholds, device=config.train.device), draw.test),
    )
    return curve


def draw_curves(curves: dict[str, list[Curve]], path: Path) -> None:
    """Writes the curves of all rows, one line a seed, as a PNG, and their figures beside it as JSON."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, DRAWN.items(), strict=True):
        for number, (row, found) in enumerate(curves.items()):
            for place, curve in enumerate(one for one in found if name in one):
                axes.plot(
                    curve["step"][: len(curve[name])],
                    curve[name],
                    color=f"C{number}",
                    label="" if place else row,
                    lw=1,
                    alpha=0.8,
                )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    path.with_suffix(".json").write_text(json.dumps(curves), encoding="utf-8")


def main() -> None:
    """Prints one JSON line for each row and seed, and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with splits in manifest.csv")
    parser.add_argument("--images", type=int, default=40, help="images to learn from")
    parser.add_argument("--rows", help=f"comma between; all without it: {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", help="several in place of --seed")
    parser.add_argument("--curves", type=Path, help="PNG to draw the curves into; their figures go beside it as JSON")
    add_arguments(parser, minutes=1.0)
    given = parser.parse_args()
    given.max_steps = given.max_steps or 700
    rows = chosen_rows(given.rows, list(ROWS), parser)
    curves: dict[str, list[Curve]] = {row: [] for row in rows}
    for seed in given.seeds or [given.seed]:
        given.seed = seed
        draw = draw_images(given.data, given.images, given)
        for row in rows:
            curves[row].append(measure(row, draw, given))
            if given.curves is not None:
                draw_curves(curves, given.curves)


if __name__ == "__main__":
    main()
