"""Step 3: a challenger from a snapshot, once: the same snapshot, settings and seed find the model that is there."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from flows.context import LoopContext, open_context
from flows.local.workspace import Workspace
from flows.overlay import overlay
from loop.adapters.mlflow_registry import ModelVersion, Run
from loop.config import LoopConfig
from loop.data.snapshot import load_snapshot
from loop.data.store import read_image
from loop.errors import ServiceError, StateError
from loop.models.segmenter import Segmenter, resolve_device
from loop.training.checkpoint import save_checkpoint
from loop.training.trainer import Trained, train
from loop.types import Sample

logger = logging.getLogger(__name__)

Log = Callable[[int, dict[str, float]], None]


def recipe_id(config: LoopConfig) -> str:
    """Hash of everything besides the data that decides what a training gives (16 hex digits)."""
    parts = {
        "model": config.model.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "instances": config.instances.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def challenger(context: LoopContext, snapshot_id: str, log: Log | None = None) -> ModelVersion:
    """The registered model for a snapshot: the one that exists, or one trained now, here or by a pool's worker."""
    tags = {"snapshot_id": snapshot_id, "recipe_id": recipe_id(context.config)}
    found = context.registry.find_version(tags)
    if found is not None:
        logger.info("model %s was trained from snapshot %s already", found.label, snapshot_id)
        return found
    if context.config.retrain.pool is None:
        return train_and_register(context, snapshot_id, log)
    return _train_on_pool(context, snapshot_id, tags)


def train_and_register(context: LoopContext, snapshot_id: str, log: Log | None = None) -> ModelVersion:
    """Trains on a snapshot's teaching images, keeps curves and pictures in MLflow and registers the weights.

    Raises:
        StateError: the snapshot has no image to learn from.
        ImageError: an image changed or vanished since the snapshot was made.
    """
    config = context.config
    snapshot = load_snapshot(context.workspace.snapshots_dir, snapshot_id)
    teaching = [s for s in snapshot.samples if s.image.split == "train"]
    holdout = [s for s in snapshot.samples if s.image.split == "holdout"]
    if not teaching:
        raise StateError(f"snapshot {snapshot_id} has no image to learn from; label some that are not hold-out first")
    tags = {"snapshot_id": snapshot_id, "recipe_id": recipe_id(config), "project": context.project_name}
    device = resolve_device(config.train.device)
    params = {
        **{f"model.{k}": v for k, v in config.model.model_dump(mode="json").items()},
        **{f"train.{k}": v for k, v in config.train.model_dump(mode="json").items()},
        "images_train": len(teaching),
        "cells_train": sum(len(s.instances) for s in teaching),
        "images_holdout": len(holdout),
        "device": str(device),
    }
    with context.registry.start_run(f"train-{snapshot_id[:8]}", params=params, tags=tags) as run:
        trained = train(teaching, config.model, config.train, log=_both(run.log, log))
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "checkpoint"
            save_checkpoint(
                directory,
                trained.net,
                config.model,
                config.instances,
                snapshot_id=snapshot_id,
                minutes=trained.seconds / 60,
                steps=trained.steps,
            )
            _examples(run, trained, config, holdout or teaching)
            version = context.registry.register(run.run_id, directory, tags=tags)
    logger.info("trained %s: %d steps in %.0f s on %s", version.label, trained.steps, trained.seconds, device)
    return version


def _both(first: Log, second: Log | None) -> Log:
    def log(step: int, values: dict[str, float]) -> None:
        first(step, values)
        if second is not None:
            second(step, values)

    return log


def _examples(run: Run, trained: Trained, config: LoopConfig, samples: Sequence[Sample], most: int = 4) -> None:
    segmenter = Segmenter(trained.net, config.model, config.instances, device=config.train.device)
    for sample in samples[:most]:
        pixels = read_image(sample.image.path).pixels
        prediction = segmenter.predict(pixels, image_id=sample.image.image_id)
        run.picture(f"examples/{sample.image.image_id}.png", overlay(pixels, prediction.instances, sample.instances))


@flow(name="train", log_prints=False)
def train_flow(workspace: str, project: str, snapshot_id: str) -> str:
    """Trains on a snapshot and returns the model version's label; what a worker of the training pool runs."""
    context = open_context(Workspace(Path(workspace)), project)
    return train_and_register(context, snapshot_id).label


def _train_on_pool(context: LoopContext, snapshot_id: str, tags: dict[str, str]) -> ModelVersion:
    parameters = {
        "workspace": str(context.workspace.root),
        "project": context.project_name,
        "snapshot_id": snapshot_id,
    }
    name = f"train/{context.project_name}"
    logger.info("training waits for a worker of pool %s", context.config.retrain.pool)
    key = f"train-{snapshot_id}-{tags['recipe_id']}"
    run = cast(FlowRun, run_deployment(name, parameters=parameters, idempotency_key=key))
    found = context.registry.find_version(tags)
    if found is None:
        state = run.state.name if run.state else "unknown"
        raise ServiceError(
            f"training run {run.name} of {name} ended as {state} and registered no model; its log in Prefect says why"
        )
    return found
