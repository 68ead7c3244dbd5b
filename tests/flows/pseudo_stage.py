"""A project of drawn images on a real index, with labellers that know the true cells and err in a chosen way."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from flows import labellers
from flows.context import LoopContext, image_ref
from flows.freeze import Frozen
from flows.local.workspace import Workspace
from loop.adapters.index import ImageRow, Index
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import load_config
from loop.data.snapshot import write_snapshot
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.types import Instances, Sample, UInt8Array

NAME = "cells"
SIDE = 96
Err = Callable[["Stage", str], Instances]


class Versions:
    """Model versions as the registry keeps them, one registry a model."""

    def __init__(self, model: str = f"celloop-{NAME}") -> None:
        self.model = model
        self.current: ModelVersion | None = None
        self.known: list[ModelVersion] = []
        self.others: dict[str, Versions] = {}

    def add(self, **tags: str) -> ModelVersion:
        number = len(self.known) + 1
        version = ModelVersion(self.model, number, f"run{number}", f"{self.model}-v{number}", tags)
        self.known.append(version)
        return version

    def champion(self) -> ModelVersion | None:
        return self.current

    def of_model(self, model: str) -> "Versions":
        return self.others.setdefault(model, Versions(model))

    def find_version(self, tags: dict[str, str]) -> ModelVersion | None:
        fits = [v for v in self.known if tags.items() <= v.tags.items()]
        return fits[-1] if fits else None

    def set_challenger(self, version: ModelVersion) -> None:
        """Nothing waits here."""

    def promote(self, version: ModelVersion, reason: str, metrics: dict[str, float]) -> None:
        self.current = version

    def refuse(self, version: ModelVersion, reason: str, metrics: dict[str, float]) -> None:
        """The champion stays."""


@dataclass
class Stage:
    """The project: its context, the true cells of each image, and how often each labeller was asked."""

    context: LoopContext
    truth: dict[str, Instances]
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def registry(self) -> Versions:
        return cast(Versions, self.context.registry)

    def label(self, *image_ids: str, role: str = "train") -> None:
        """A person draws the true cells of these images."""
        self.context.index.set_images(NAME, {i: {"state": "labelled", "role": role} for i in image_ids})

    def frozen(self) -> Frozen:
        """What people have labelled so far, as `freeze` would give it."""
        samples = []
        for row in self.context.index.images(NAME, state="labelled"):
            split = "holdout" if row.role == "control" else "train"
            samples.append(Sample(replace(image_ref(row), split=split), self.truth[row.image_id]))
        snapshot = write_snapshot(self.context.workspace.snapshots_dir, samples, {}, NAME)
        return Frozen(snapshot, (), (), frozenset())

    def learn(self) -> ModelVersion:
        """A champion that has learnt from what is labelled now."""
        version = self.registry.add(snapshot_id=self.frozen().snapshot.id)
        self.registry.current = version
        return version


def make_stage(tmp_path: Path, n: int = 24, cells: int = 6, **settings: object) -> Stage:
    """`n` images of `cells` cells each, all open; no model yet."""
    rng = np.random.default_rng(0)
    workspace = Workspace(tmp_path / "ws")
    workspace.root.mkdir(parents=True)
    index = Index(f"sqlite:///{workspace.root / 'index.sqlite3'}")
    project = index.add_project(NAME, ls_project_id=1, root=tmp_path, label_config="")
    truth, rows = {}, []
    for i in range(n):
        image_id = f"i{i:02d}"
        pixels, drawn = draw_cells(rng, (SIDE, SIDE), cells, image_id=image_id)
        path = tmp_path / f"{image_id}.png"
        write_png(pixels, path)
        where = {"path": str(path), "display": "", "height": SIDE, "width": SIDE, "task_id": i + 1}
        rows.append(ImageRow(project.id, image_id, describe(path).sha256, **where))
        truth[image_id] = drawn
    index.add_images(NAME, rows)
    context = LoopContext(
        workspace=workspace,
        endpoints=cast(Any, None),
        config=load_config(None, {"pseudo.reserve": 0.0, "train.max_steps": 4, **settings}),
        index=index,
        label_studio=cast(Any, None),
        registry=cast(Any, Versions()),
        project_name=NAME,
    )
    return Stage(context, truth)


@dataclass
class Guesser:
    """A labeller that proposes what `err` makes of the true cells."""

    name: str
    stage: Stage
    err: Err
    version: str = ""
    needs_hint: bool = False
    confident: bool = False

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        self.stage.asked.append((self.name, image_id))
        cells = self.err(self.stage, image_id)
        rng = np.random.default_rng(int(image_id[1:]))
        truth = self.stage.truth[image_id]
        true = np.array([any(np.array_equal(b, t) for t in truth.boxes_xyxy) for b in cells.boxes_xyxy], bool)
        sure = true | self.confident
        scores = np.where(sure, rng.uniform(0.9, 1.0, len(cells)), rng.uniform(0.1, 0.4, len(cells)))
        made = Instances.build(
            cells.shape,
            cells.boxes_xyxy,
            cells.masks,
            scores=scores,
            image_id=image_id,
            source="pseudo",
            model_version=self.version or f"{self.name}-v1",
        )
        return Proposal(made, np.where(sure, 0.95, 0.3).astype(np.float32))

    def __post_init__(self) -> None:
        self.version = self.version or f"{self.name}-v1"


def blocks(image_id: str, n: int = 3) -> Instances:
    """Squares at random places: cells that nobody would draw."""
    rng = np.random.default_rng(1000 + int(image_id[1:]))
    corners = rng.integers(0, SIDE - 10, (n, 2))
    boxes = [(int(x), int(y), int(x) + 10, int(y) + 10) for x, y in corners]
    return Instances.build((SIDE, SIDE), boxes, [np.ones((10, 10), bool)] * n)


def joined(one: Instances, other: Instances) -> Instances:
    return Instances.build(one.shape, np.concatenate([one.boxes_xyxy, other.boxes_xyxy]), (*one.masks, *other.masks))


def honest(stage: Stage, image_id: str) -> Instances:
    """The true cells, and a few that are none, of low score."""
    return joined(stage.truth[image_id], blocks(image_id))


def shifted(cells: Instances, by: int = 10) -> Instances:
    """All masks `by` px to the right and down, those that leave the image on that side moved the other way."""
    boxes = cells.boxes_xyxy.astype(int)
    step = np.where(boxes[:, 2:] + by <= SIDE, by, -by)
    return Instances.build(cells.shape, boxes + np.concatenate([step, step], axis=1), cells.masks)


def of_next_image(stage: Stage, image_id: str) -> Instances:
    """The cells of another image."""
    return stage.truth[f"i{(int(image_id[1:]) + 1) % len(stage.truth):02d}"]


def hire(monkeypatch: pytest.MonkeyPatch, **guessers: Labeller | Exception) -> None:
    """Lets the flows build these labellers by these names; an exception is raised in place of a labeller."""

    def build(name: str, tools: Tools) -> Labeller:
        if name not in guessers:
            raise ConfigError(f"unknown labeller {name}")
        found = guessers[name]
        if isinstance(found, Exception):
            raise found
        if name == "champion":
            tools.segmenter(name)
        return found

    monkeypatch.setattr(labellers, "build_labeller", build)
    monkeypatch.setattr(labellers, "predict_images", lambda context, version, images, **_: {})
    monkeypatch.setattr(labellers, "load_segmenter", lambda context, version: SimpleNamespace(version=version))
