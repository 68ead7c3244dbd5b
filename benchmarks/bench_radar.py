"""Whether wrong labels are found: labels damaged in known places, and where the radar ranks them.

--images of the pool of a labelled folder are drawn; 5 % of all their cells are shifted, merged, deleted or invented, in
equal parts (corrupt_labels.py). The damaged labels are all that the cross-fitted models (--folds, --steps each) learn
from. Two protocols:

- concentrated: images are drawn at random and a share of the cells of each (--within) is damaged, until 5 % of all
  cells are; the images drawn are the positives. Goal: at least 80 % of them among the first 15 % of the ranking. That
  can be reached only while the positives are fewer than 15 % of the images, so --within says how hard it is.
- spread: 5 % of the cells, whichever image they lie in. Most images are positives then, so it is cells that are
  ranked: how many of the damaged ones are among the first n, 2n and 4n places, n being the number of damages.

A place that is found counts as right where its mask meets that of a damage by IoU 0.3, whatever its kind. Negative
control: the same scores shuffled. Other image scores are computed from the same predictions and reported beside it.
--keep stores the predictions, so that a killed run goes on and scores can be tried again. One JSON line a protocol.

    python benchmarks/bench_radar.py --data DIR --images 120 --steps 300 --seed 2 --set model.base=8
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from corrupt_labels import KINDS, Corrupted, concentrated, spread
from harness import report
from training_runs import rounded, settings

from loop.config import LoopConfig
from loop.data.folder import leaking_groups, open_folder, read_sample
from loop.masks import from_masks
from loop.metrics.matching import Float64Array, iou_matrix
from loop.metrics.suspicion import POWER, Finding, Suspicion, findings, image_score, judge, suspicion_of
from loop.training.crossfit import Unseen, UnseenStore, crossfit
from loop.types import BoolArray, Sample

TOP = 0.15
GOAL = 0.8
SHARE = 0.05
MEETS = 0.3
SHUFFLES = 1000

IMAGE_SCORES: dict[str, Callable[[Float64Array], float]] = {
    "mean": lambda cells: float(cells.mean()),
    "max": lambda cells: float(cells.max()),
    "sum": lambda cells: float(cells.sum()),
    "three worst": lambda cells: float(np.sort(cells)[-3:].sum() / 3),
    "share above 0.5": lambda cells: float((cells > 0.5).mean()),
    "power 4": lambda cells: float((cells**4).mean() ** 0.25),
    "power 8, less by size": lambda cells: float((cells**8).sum() ** (1 / 8) / len(cells) ** (1 / 16)),
}
"""What else was tried; each takes (N + M,) suspicions of an image's cells, not empty."""


def pool_of(data: Path, count: int, rng: np.random.Generator) -> list[Sample]:
    """`count` random labelled images of the splits that are learnt from."""
    images = [ref for ref in open_folder(data).images if ref.label_path is not None]
    leaking = leaking_groups(images)
    pool = [ref for ref in images if ref.split in ("pool", "train", "") and ref.group not in leaking]
    if len(pool) < count:
        raise SystemExit(f"{data}: {len(pool)} labelled images in its pool; give --images {len(pool)} or fewer")
    return [read_sample(pool[int(i)]) for i in rng.permutation(len(pool))[:count]]


def predicted(damaged: Sequence[Corrupted], config: LoopConfig, given: argparse.Namespace, name: str) -> list[Unseen]:
    """The cross-fitted predictions, from --keep where they are there."""
    samples = [one.sample for one in damaged]
    images = {sample.image.image_id: sample.image for sample in samples}
    store = UnseenStore(claimed(given, config, name)) if given.keep else None
    loaded = {image_id: store.load(image) for image_id, image in images.items()} if store else {}

    def keep(fold: int, found: Any) -> None:
        for image_id, unseen in found.items() if store else ():
            store.save(images[image_id], unseen)

    def told(fold: int, folds: int, step: int, values: dict[str, float]) -> None:
        if step % 100 == 0:
            print(f"{name}, fold {fold + 1} of {folds}, step {step}: loss {values['loss']:.3f}", file=sys.stderr)

    done = {image_id: unseen for image_id, unseen in loaded.items() if unseen is not None}
    return crossfit(
        samples, config.model, config.train, config.instances, folds=given.folds, log=told, done=done, fold_done=keep
    )


def claimed(given: argparse.Namespace, config: LoopConfig, name: str) -> Path:
    """KEEP/PROTOCOL, with a note of what its predictions depend on; ends where those of another run lie there."""
    parts = {part: getattr(config, part).model_dump(mode="json") for part in ("model", "train", "instances")}
    drawn = {"data": given.data.name} | {key: vars(given)[key] for key in ("images", "folds", "seed", "within")}
    if name != "concentrated":
        del drawn["within"]
    root: Path = given.keep / name
    note, text = root / "settings.json", json.dumps(drawn | parts, indent=1, sort_keys=True)
    if note.exists() and note.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{root} holds predictions of other labels or models ({note.name}); give another --keep")
    root.mkdir(parents=True, exist_ok=True)
    note.write_text(text, encoding="utf-8")
    return root


def recall_at(scores: Float64Array, positive: BoolArray, share: float = TOP) -> float:
    """Share of the positives among the first `share` of the ranking."""
    first = np.argsort(-scores, kind="stable")[: round(share * len(scores))]
    return float(positive[first].sum() / max(positive.sum(), 1))


def image_figures(
    raw: Sequence[Suspicion], judged: Sequence[Suspicion], positive: BoolArray, rng: np.random.Generator
) -> dict[str, Any]:
    """Recall of the damaged images at the top, shuffled, and by other scores."""
    scores = np.array([image_score(one) for one in judged])
    others = {
        name: recall_at(np.array([score(one.cells) if len(one.cells) else 0.0 for one in judged]), positive)
        for name, score in IMAGE_SCORES.items()
    }
    others[f"power {POWER}, habits not allowed for"] = recall_at(np.array([image_score(one) for one in raw]), positive)
    shuffled = [recall_at(rng.permutation(scores), positive) for _ in range(SHUFFLES)]
    return {
        "recall_at_15": recall_at(scores, positive),
        "best_possible": min(1.0, round(TOP * len(scores)) / max(int(positive.sum()), 1)),
        "recall_at_10": recall_at(scores, positive, 0.1),
        "recall_at_30": recall_at(scores, positive, 0.3),
        "shuffled_recall_at_15": float(np.mean(shuffled)),
        "other_scores_recall_at_15": others,
    }


class Places:
    """All findings of all images by falling suspicion, and which damage each of them meets."""

    def __init__(self, damaged: Sequence[Corrupted], seen: Sequence[Unseen], judged: Sequence[Suspicion]) -> None:
        rows: list[tuple[float, Finding, int]] = []
        self.kinds: list[str] = []
        for one, unseen, suspicion in zip(damaged, seen, judged, strict=True):
            labels, cells = one.sample.instances, unseen.instances
            places = from_masks([damage.place for damage in one.damages], labels.shape)
            of_labels, of_cells = iou_matrix(labels, places), iou_matrix(cells, places)
            for finding in findings(suspicion, labels, cells):
                iou = (of_cells if finding.kind == "deleted" else of_labels)[finding.cell]
                hit = len(self.kinds) + int(iou.argmax()) if len(iou) and iou.max() >= MEETS else -1
                rows.append((finding.suspicion, finding, hit))
            self.kinds += [damage.kind for damage in one.damages]
        rows.sort(key=lambda row: -row[0])
        self.suspicions = np.array([row[0] for row in rows])
        self.named = [row[1].kind for row in rows]
        self.hits = np.array([row[2] for row in rows], np.int64)

    def figures(self, rng: np.random.Generator) -> dict[str, Any]:
        """Precision and recall of the first n, 2n and 4n places, by kind at 2n, and with shuffled suspicions."""
        n = len(self.kinds)
        shuffled = [self._at(2 * n, rng.permutation(len(self.hits))) for _ in range(50)]
        names = {f"first_{k}n": self._at(k * n) for k in (1, 2, 4)}
        found = set(self.hits[: 2 * n].tolist())
        of_kind = {kind: [i for i, own in enumerate(self.kinds) if own == kind] for kind in KINDS}
        return {
            "damages": n,
            "places": len(self.hits),
            **names,
            "recall_first_2n_by_kind": {k: len(found & set(own)) / max(len(own), 1) for k, own in of_kind.items()},
            "kind_named_right": self._named_right(2 * n),
            "shuffled_first_2n": {key: float(np.mean([one[key] for one in shuffled])) for key in shuffled[0]},
        }

    def _at(self, k: int, order: Any = None) -> dict[str, float]:
        hits = (self.hits if order is None else self.hits[order])[:k]
        right = hits[hits >= 0]
        return {
            "precision": len(right) / max(len(hits), 1),
            "recall": len(np.unique(right)) / max(len(self.kinds), 1),
        }

    def _named_right(self, k: int) -> float:
        pairs = [(self.named[i], self.kinds[hit]) for i, hit in enumerate(self.hits[:k].tolist()) if hit >= 0]
        return sum(said == so for said, so in pairs) / max(len(pairs), 1)


def measure(damaged: Sequence[Corrupted], seen: Sequence[Unseen], seed: int) -> dict[str, Any]:
    """All figures of one protocol."""
    samples = [one.sample for one in damaged]
    raw = [
        suspicion_of(sample.instances, one.instances, one.interior) for sample, one in zip(samples, seen, strict=True)
    ]
    judged = judge(raw, [sample.image.modality for sample in samples])
    positive = np.array([bool(one.damages) for one in damaged])
    rng = np.random.default_rng(seed)
    kinds = [damage.kind for one in damaged for damage in one.damages]
    return {
        "images": len(samples),
        "labelled_cells": sum(len(sample.instances) for sample in samples),
        "positives": int(positive.sum()),
        "planted": {kind: kinds.count(kind) for kind in KINDS},
        "image": image_figures(raw, judged, positive, rng),
        "cell": Places(damaged, seen, judged).figures(rng),
        "cell_habits_not_allowed_for": Places(damaged, seen, raw).figures(rng)["first_2n"],
    }


def main() -> None:
    """Damages, cross-fits, ranks, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="labelled dataset folder")
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--steps", type=int, default=300, help="of each fold's training")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the draw, the damage and the training")
    parser.add_argument("--within", type=float, default=0.6, help="concentrated: share of an image's cells")
    parser.add_argument("--protocols", default="concentrated,spread")
    parser.add_argument("--model", default="unet", help="a file of configs/model")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings, as model.base=8")
    parser.add_argument("--keep", type=Path, help="store predictions in KEEP/PROTOCOL, or take those that are there")
    given = parser.parse_args()
    given.minutes, given.max_steps = 1.0, given.steps
    config = settings(given.model, given)
    for protocol in given.protocols.split(","):
        start = time.process_time()
        rng = np.random.default_rng(given.seed)
        samples = pool_of(given.data, given.images, rng)
        if protocol == "concentrated":
            damaged = concentrated(samples, rng, share=SHARE, within=given.within)
        else:
            damaged = spread(samples, rng, share=SHARE)
        seen = predicted(damaged, config, given, protocol)
        trained = time.process_time()
        figures = measure(damaged, seen, given.seed)
        report(
            "radar",
            protocol=protocol,
            within=given.within if protocol == "concentrated" else None,
            model=given.model,
            set=given.set,
            steps=given.steps,
            folds=given.folds,
            seed=given.seed,
            goal={"recall_at_15": GOAL},
            **rounded(figures),
            cpu_s={"crossfit": round(trained - start, 1), "ranking": round(time.process_time() - trained, 1)},
        )


if __name__ == "__main__":
    main()
