"""Step 3: a challenger from a snapshot, once: the same snapshot, settings and seed find the model that is there."""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from flows.context import LoopContext, open_context
from flows.local.workspace import Workspace
from flows.overlay import overlay
from loop.adapters.mlflow_registry import ModelVersion, Run
from loop.config import LoopConfig
from loop.data.snapshot import load_snapshot
from loop.data.store import file_sha256, read_image
from loop.errors import CheckpointError, ImageError, ServiceError, StateError
from loop.models.runtime import resolve_device
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import save_checkpoint
from loop.training.trainer import Trained, train
from loop.types import Sample

logger = logging.getLogger(__name__)

Log = Callable[[int, dict[str, float]], None]

POLL_S = 2.0
REMIND_S = 30.0
NO_WORKER_S = 3600.0
OVERTIME_S = 3600.0
"""How long a training may take beyond its budget: loading, storing, and an optimiser step that is under way."""


def recipe_id(config: LoopConfig) -> str:
    """Hash of everything besides the data that decides what a training gives (16 hex digits)."""
    parts = {
        "model": config.model.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "instances": config.instances.model_dump(mode="json"),
        "validation": config.retrain.validation,
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

    An image that changed or vanished since the snapshot was made is named in the log and left out.

    Raises:
        StateError: the snapshot has no image to learn from.
        ImageError: every image to learn from changed or vanished.
    """
    config = context.config
    snapshot = load_snapshot(context.workspace.snapshots_dir, snapshot_id)
    teaching = snapshot.split("train")
    holdout = snapshot.split("holdout")
    if not teaching:
        raise StateError(f"snapshot {snapshot_id} has no image to learn from; label some that are not hold-out first")
    intact = [sample for sample in teaching if _is_intact(sample, snapshot_id)]
    if not intact:
        raise ImageError(
            f"all {len(teaching)} images to learn from in snapshot {snapshot_id} have changed or vanished, first "
            f"{teaching[0].image.path}; restore the files, or run `celloop init` with the folder where they are now"
        )
    tags = {"snapshot_id": snapshot_id, "recipe_id": recipe_id(config), "project": context.project_name}
    taught, kept_back = keep_back(intact, config.retrain.validation)
    params = {
        **{f"model.{k}": v for k, v in config.model.model_dump(mode="json").items()},
        **{f"train.{k}": v for k, v in config.train.model_dump(mode="json").items()},
        "images_train": len(taught),
        "images_validation": len(kept_back),
        "images_left_out": len(teaching) - len(intact),
        "cells_train": sum(len(s.instances) for s in taught),
        "images_holdout": len(holdout),
        "device": str(resolve_device(config.train.device)),
    }
    state = _state_dir(context, f"{snapshot_id}-{tags['recipe_id']}")
    with context.registry.start_run(f"train-{snapshot_id[:8]}", params=params, tags=tags) as run:

        def trained_from(state: Path) -> Trained:
            return train(
                taught,
                config.model,
                config.train,
                instances=config.instances,
                validation=kept_back,
                state_dir=state,
                log=_both(run.log, log),
            )

        trained = _resumed(state, trained_from)
        version = _register(context, run, trained, tags)
        if state.exists():
            shutil.rmtree(state)
        _examples(run, trained, config, holdout or intact)
    logger.info("trained %s: %d steps in %.0f s", version.label, trained.steps, trained.seconds)
    return version


def _state_dir(context: LoopContext, name: str) -> Path:
    """Where this training's state lies; those of the project's earlier trainings, which nobody resumes, are deleted."""
    state = context.workspace.training_dir / context.project_name / name
    for other in state.parent.glob("*"):
        if other != state:
            shutil.rmtree(other)
    return state


def _resumed(state: Path, trained_from: Callable[[Path], Trained]) -> Trained:
    """The training gone on with from its state; started anew where that is damaged or its images have changed."""
    existed = state.exists()
    try:
        return trained_from(state)
    except CheckpointError as error:
        if not existed:
            raise
        logger.warning("the training cannot be resumed and starts anew: %s", error)
        shutil.rmtree(state)
        return trained_from(state)


def _register(context: LoopContext, run: Run, trained: Trained, tags: dict[str, str]) -> ModelVersion:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "checkpoint"
        save_checkpoint(
            directory,
            trained.net,
            context.config.model,
            trained.instances,
            snapshot_id=tags["snapshot_id"],
            minutes=trained.seconds / 60,
            steps=trained.steps,
        )
        return context.registry.register(run.run_id, directory, tags=tags)


def keep_back(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """The images that are learnt from, and those kept back to fit thresholds on and to stop early by.

    Not the hold-out: that must stay unseen by every choice, or the gate's comparison means nothing. Whole groups are
    kept back, always the same ones (by the hash of their name), about `share` of them: one at least, and never all.
    """
    if share == 0:
        return list(samples), []
    names = {sample.image.group or sample.image.image_id for sample in samples}
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    kept = set(ordered[: min(max(round(share * len(ordered)), 1), len(ordered) - 1)])
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        parts[(sample.image.group or sample.image.image_id) in kept].append(sample)
    return parts


def _is_intact(sample: Sample, snapshot_id: str) -> bool:
    """Whether the image file is the one that the snapshot was made from; where not, the log says why."""
    image = sample.image
    try:
        found = file_sha256(image.path)
    except ImageError as error:
        logger.warning("%s is left out of the training on snapshot %s: %s", image.image_id, snapshot_id, error)
        return False
    if found != image.sha256:
        logger.warning(
            "%s is left out of the training on snapshot %s: %s has changed since; restore the file",
            *(image.image_id, snapshot_id, image.path),
        )
    return found == image.sha256


def _both(first: Log, second: Log | None) -> Log:
    def log(step: int, values: dict[str, float]) -> None:
        first(step, values)
        if second is not None:
            second(step, values)

    return log


def _examples(run: Run, trained: Trained, config: LoopConfig, samples: Sequence[Sample], most: int = 4) -> None:
    """Pictures for a person's eyes; the model is registered already, so one that fails costs nothing else."""
    segmenter = Segmenter(trained.net, config.model, trained.instances, device=config.train.device)
    for sample in samples[:most]:
        image_id = sample.image.image_id
        try:
            pixels = read_image(sample.image.path).pixels
            prediction = segmenter.predict(pixels, image_id=image_id)
            run.picture(f"examples/{image_id}", overlay(pixels, prediction.instances, sample.instances))
        except (ImageError, OSError, ServiceError) as error:
            logger.warning("no example picture of %s: %s", image_id, error)


@flow(name="train", log_prints=False)
def train_flow(workspace: str, project: str, snapshot_id: str) -> str:
    """Trains on a snapshot and returns the model version's label; what a worker of the training pool runs."""
    context = open_context(Workspace(Path(workspace)), project)
    return train_and_register(context, snapshot_id).label


def _train_on_pool(context: LoopContext, snapshot_id: str, tags: dict[str, str]) -> ModelVersion:
    """The model that a worker of the training pool makes; a run that waits or works already is joined.

    Raises:
        StateError: the project has no deployment for training.
        ServiceError: no worker took the run, or it ended without a model.
    """
    pool = str(context.config.retrain.pool)
    name = f"train/{context.project_name}"
    parameters = {
        "workspace": str(context.workspace.root),
        "project": context.project_name,
        "snapshot_id": snapshot_id,
    }
    with get_client(sync_client=True) as client:
        run = _open_run(client, name, parameters, f"train-{snapshot_id}-{tags['recipe_id']}")
        logger.info("training run %s waits for a worker of pool %s", run.name, pool)
        ended = _wait(client, run, pool, context.config.train.minutes * 60 + OVERTIME_S)
    found = context.registry.find_version(tags)
    if found is None:
        state = f"{ended.state.name} ({ended.state.message or 'no message'})" if ended.state else "unknown"
        raise ServiceError(
            f"training run {ended.name} of {name} ended as {state} and registered no model; its log in Prefect says "
            "why. The next round tries again"
        )
    return found


def _open_run(client: SyncPrefectClient, name: str, parameters: dict[str, str], key: str) -> FlowRun:
    """A run that has not ended: the one of a round that was interrupted, or a new one.

    Prefect gives the run of a key back for ever, also a failed one; so the attempt's number is part of the key.
    """
    try:
        deployment = client.read_deployment_by_name(name)
    except ObjectNotFound as error:
        raise StateError(
            f"Prefect has no deployment {name}; run `celloop init` again with the same images: it makes what is missing"
        ) from error
    attempt = 1
    while True:
        run = client.create_flow_run_from_deployment(
            deployment.id, parameters=parameters, state=Scheduled(), idempotency_key=f"{key}-{attempt}"
        )
        if run.state is None or not run.state.is_final():
            return run
        attempt += 1


def _wait(client: SyncPrefectClient, run: FlowRun, pool: str, longest_s: float) -> FlowRun:
    """The run once it has ended.

    Raises:
        ServiceError: no worker took it within NO_WORKER_S, or it runs for more than `longest_s`.
    """
    address = str(client.api_url).rstrip("/")
    start = f"PREFECT_API_URL={address} prefect worker start --pool {pool} --type process"
    waited_since = reminded = time.monotonic()
    running_since: float | None = None
    while True:
        run = client.read_flow_run(run.id)
        now = time.monotonic()
        if run.state is not None and run.state.is_final():
            return run
        if run.state is not None and run.state.is_running():
            running_since = running_since or now
            if now - running_since > longest_s:
                raise ServiceError(
                    f"training run {run.name} runs for more than {longest_s / 60:.0f} min; its worker may have died: "
                    "cancel it in Prefect, then the next round trains anew"
                )
        elif now - waited_since > NO_WORKER_S:
            raise ServiceError(
                f"no worker of pool {pool} took training run {run.name} in {NO_WORKER_S / 60:.0f} min; start one with "
                f"`{start}`, or take `retrain.pool` out of the project's settings. The next round joins the run"
            )
        elif now - reminded > REMIND_S:
            reminded = now
            logger.warning("no worker of pool %s has taken training run %s; start one: `%s`", pool, run.name, start)
        time.sleep(POLL_S)
