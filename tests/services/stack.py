"""Projects for the tests that run the whole stack: drawn images, a person simulated through Label Studio's API."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows.context import LoopContext, open_context
from flows.deploy import deploy
from flows.local.workspace import Workspace
from flows.start import start_project
from loop.config import LoopConfig, load_config
from loop.data.store import write_label_image, write_png
from loop.data.synthetic import draw_cells
from loop.masks import to_label_image

QUICK = {
    "model.base": 4,
    "model.depth": 2,
    "train.max_steps": 25,
    "train.crop": 64,
    "train.batch": 4,
    "select.first_batch": 6,
    "select.batch": 4,
    "select.control": 0.25,
    "gate.min_images": 2,
}


@dataclass(frozen=True)
class DrawnProject:
    """A project of drawn images and the folder of their true labels, which the loop never sees."""

    context: LoopContext
    images: Path
    labels: Path


def draw_dataset(folder: Path, n: int, seed: int = 0) -> tuple[Path, Path]:
    """`n` images of 96 x 96 with a few cells below folder/images, their labels below folder/labels."""
    rng = np.random.default_rng(seed)
    images, labels = folder / "images", folder / "labels"
    images.mkdir(parents=True)
    labels.mkdir()
    for i in range(n):
        pixels, cells = draw_cells(rng, shape=(96, 96), n=3 + i % 3)
        write_png(pixels, images / f"drawn-{i:02d}.png")
        write_label_image(to_label_image(cells, on_overlap="score"), labels / f"drawn-{i:02d}.png")
    return folder, labels


def make_project(workspace: Workspace, folder: Path, name: str, n: int = 14, **overrides: object) -> DrawnProject:
    """A project of `n` drawn images with quick settings, deployed, no round made yet."""
    images, labels = draw_dataset(folder, n)
    config: LoopConfig = load_config(None, {**QUICK, **overrides})
    start_project(workspace, images, name, config)
    context = open_context(workspace, name)
    deploy(context)
    return DrawnProject(context, images, labels)
