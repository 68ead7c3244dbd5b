"""What tests of a replay share: pools without pixels, and a learner that is a known function of what it is taught."""

from pathlib import Path

import numpy as np

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import write_label_image, write_png
from loop.data.synthetic import draw_cells
from loop.effort.cost import CostModel
from loop.masks import to_label_image
from loop.replay.engine import Bench, Model, ReplayPlan
from loop.replay.pool import ReplayData
from loop.types import Candidate, ImageRef, Instances, Sample
from loop.uncertainty.measures import MEASURES

SHAPE = (64, 64)
COST = CostModel(image_s=10, keep_s=1, edit_s=2, delete_s=3, add_s=5)
HALF = 20
"""So many taught cells of a kind and half of that kind's cells are found."""


def squares(n, shape=SHAPE):
    """`n` cells of 5 x 5 px in a grid, up to 64 of them."""
    corners = [(8 * (i % 8), 8 * (i // 8)) for i in range(n)]
    boxes = [(x, y, x + 5, y + 5) for x, y in corners]
    return Instances.build(shape, boxes, [np.ones((5, 5), bool)] * n)


def sample(name, n, kind="", group=""):
    return Sample(ImageRef(name, Path(f"{name}.png"), "", *SHAPE, 1, group=group, modality=kind), squares(n))


def pool_of(cells):
    """A pool of the given numbers of cells by name, measured on one image of 4 cells."""
    return ReplayData(tuple(sample(name, n) for name, n in cells.items()), (sample("test", 4),))


def plan(**changes):
    given = {
        "model": ModelConfig(name="unet", base=4, depth=2),
        "train": TrainConfig(crop=32, batch=2, max_steps=15, validations=0, compile="off", device="cpu"),
        "instances": InstanceConfig(tile=64, overlap=16, min_score=0.5),
        "start": 2,
        "batch": 2,
        "rounds": 3,
        "cost": COST,
    }
    return ReplayPlan(**(given | changes))


class Learner:
    """Stands for `loop.replay.engine.fit`: the share n / (n + HALF) of a kind's cells is found, n of it being taught.

    `calls` counts trainings; the one after `until` of them fails, by default as a killed process does.
    """

    def __init__(self, until=10**9, error=None):
        self.calls = 0
        self.until = until
        self.error = error or Killed()

    def __call__(self, bench: Bench, taught, seed, *, times=1.0, look=True) -> Model:
        if self.calls == self.until:
            raise self.error
        self.calls += 1
        known: dict[str, int] = {}
        for name in taught:
            kind = bench.pool[name].image.modality
            known[kind] = known.get(kind, 0) + len(bench.pool[name].instances)
        share = {kind: n / (n + HALF) for kind, n in known.items()}
        test = [(share.get(s.image.modality, 0.0), len(s.instances)) for s in bench.data.test]
        ap = sum(found * n for found, n in test) / sum(n for _, n in test)
        figures = {"ap": ap, "macro_ap": float(np.mean([found for found, _ in test]))}
        offered, candidates = {}, {}
        for number, (name, s) in enumerate(bench.pool.items() if look else ()):
            found = share.get(s.image.modality, 0.0)
            offered[name] = s.instances.take(np.arange(round(found * len(s.instances))))
            doubt = 1 - found + 1e-3 * (number * 37 % 101)
            candidates[name] = Candidate(
                name,
                s.image.group,
                doubt,
                np.array([found, number * 17 % 13, number * 29 % 7], np.float32),
                n_cells=len(offered[name]),
                foreground=len(offered[name]) * 25 / 4096,
                seconds=10.0 + len(s.instances),
                measures=dict.fromkeys(MEASURES, doubt),
            )
        return Model(figures, offered, candidates)


class Killed(BaseException):
    """Stands for a process that dies."""


def drawn_folder(root, splits, shape=SHAPE, n=4):
    """A dataset folder of drawn cells: the split of each image by name."""
    rows = ["image,split"]
    for number, (stem, split) in enumerate(splits.items()):
        pixels, cells = draw_cells(np.random.default_rng(number), shape, n)
        write_png(pixels[:, :, 0], root / "images" / f"{stem}.png")
        write_label_image(to_label_image(cells), root / "labels" / f"{stem}.png")
        rows.append(f"{stem}.png,{split}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root
