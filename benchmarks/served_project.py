"""The real services with a project of drawn pictures: its true cells as pre-labels, and trained models in service.

Shared by the benchmarks that need Label Studio, MLflow and the backend as they run for a person.
"""

import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from flows.context import LoopContext, open_context
from flows.folders import train_folder
from flows.local.launch import start_in_background, stop
from flows.local.site import UpOptions
from flows.local.workspace import Workspace
from flows.publish import publish
from flows.start import start_project
from loop.adapters.index import ImageRow
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import LoopConfig, load_config
from loop.data.predictions import StoredPrediction
from loop.data.store import write_label_image, write_png
from loop.data.synthetic import draw_cells
from loop.masks import to_label_image
from loop.types import Instances

QUICK = {
    "model.name": "unet",
    "model.base": 8,
    "model.depth": 3,
    "train.max_steps": 150,
    "train.crop": 128,
    "train.batch": 4,
    "train.learning_rate": 5e-3,
    "train.warmup_steps": 10,
    "train.ema": 0.9,
}
"""Some 15 s of training on two cores: enough for bright cells on a dark ground."""


@dataclass(frozen=True)
class Picture:
    """A drawn picture of a project: its row in the index and its true cells."""

    row: ImageRow
    cells: Instances


@contextmanager
def services() -> Iterator[Workspace]:
    """The stack as `celloop up` starts it, on free ports, in a workspace that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="celloop-bench-") as directory:
        workspace = Workspace(Path(directory) / "workspace")
        ports = {name: _free_port() for name in ("label_studio", "mlflow", "prefect", "backend")}
        start_in_background(workspace, UpOptions(ports=ports), lambda text: None)
        try:
            yield workspace
        finally:
            stop(workspace, lambda text: None)


def draw_project(
    workspace: Workspace, name: str, cells: list[int], side: int, *, label_config: str | None = None, **settings: Any
) -> tuple[LoopContext, list[Picture]]:
    """A project of one picture of `side` px for each number of cells; nothing is published yet."""
    folder = workspace.root.parent / name
    rng = np.random.default_rng(0)
    drawn = {}
    for i, n in enumerate(cells):
        pixels, found = draw_cells(rng, (side, side), n)
        drawn[f"drawn-{i:02d}"] = found
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        write_png(pixels, folder / "images" / f"drawn-{i:02d}.png")
        write_label_image(to_label_image(found, on_overlap="score"), folder / "labels" / f"drawn-{i:02d}.png")
    config: LoopConfig = load_config(None, {**QUICK, "tiles.max_px": 0, "tiles.max_cells": 0, **settings})
    start_project(workspace, folder / "images", name, config, label_config_xml=label_config)
    context = open_context(workspace, name)
    rows = sorted(context.index.images(name), key=lambda row: row.image_id)
    return context, [Picture(row, drawn[row.image_id]) for row in rows]


def train_model(workspace: Workspace, context: LoopContext, seed: int) -> ModelVersion:
    """A registered model that learnt from the project's drawn pictures."""
    folder, out = workspace.root.parent / context.project_name, workspace.root.parent / f"model-{seed}"
    config = context.config.model_copy(update={"train": context.config.train.model_copy(update={"seed": seed})})
    train_folder(folder, out, config, lambda step, values: None)
    tags = {"seed": seed}
    with context.registry.start_run(f"seed-{seed}", params={}, tags=tags) as run:
        return context.registry.register(run.run_id, out, tags=tags)


def publish_cells(context: LoopContext, cells: Mapping[str, Instances], version: ModelVersion | None) -> None:
    """These cells, by image id, as the pre-labels."""
    stored = {
        image_id: StoredPrediction(
            replace(found, image_id=image_id, source="model", model_version="given"), 0.1, np.zeros(1, np.float32)
        )
        for image_id, found in cells.items()
    }
    publish(context, 1, version, (), stored)


def wait_for_model(context: LoopContext, label: str, timeout_s: float = 60.0) -> None:
    """Returns when the backend answers and has this model in service.

    Raises:
        TimeoutError: it has not.
    """
    _wait_for(context, f'model="{label}"', timeout_s)


def wait_for_sam(context: LoopContext, timeout_s: float = 60.0) -> None:
    """Returns when the backend has loaded a SAM.

    Raises:
        TimeoutError: it has not.
    """
    _wait_for(context, "celloop_sam_info{", timeout_s)


def _wait_for(context: LoopContext, text: str, timeout_s: float) -> None:
    """Returns when the backend's metrics hold a text."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            metrics = httpx.get(f"{context.endpoints.backend_url}/metrics", timeout=10, trust_env=False).text
        except httpx.TransportError:
            metrics = ""
        if text in metrics:
            return
        time.sleep(0.3)
    raise TimeoutError(f"the backend does not say {text}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
