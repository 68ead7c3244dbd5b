"""Step 3: challengers from snapshots, once: the same snapshot, settings and seed find the model that is there.

A round trains a challenger on people's labels alone and, where there are pseudo-labels, a mixed one on both. A further
kind of network that only proposes pseudo-labels is trained the same way, into a registered model of its own.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefect import flow

from flows.audit import figures
from flows.context import LoopContext, open_context, registry_name
from flows.local.workspace import Workspace
from flows.overlay import overlay
from flows.training_pool import run_on_pool
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

OVERTIME_S = 3600.0
"""How long a training may take beyond its budget: loading, storing, and an optimiser step that is under way."""

PIX2PIX_HEADS, PIX2PIX_RATE = ("interior", "border", "distance"), 2e-4
"""As in configs/model/pix2pix.yaml."""


@dataclass(frozen=True)
class Lesson:
    """Which of a round's models is trained.

    Attributes:
        teaching: "labelled": from people's labels alone; "mixed": from the pseudo-labels of the snapshot too.
        share: of the project's training budget, in (0, 1].
        kind: a further network that only proposes pseudo-labels, a key of SEGMENTERS; "" = the project's own.
    """

    teaching: Literal["labelled", "mixed"] = "labelled"
    share: float = 1.0
    kind: str = ""


PLAIN = Lesson()


def recipe_id(config: LoopConfig, lesson: Lesson = PLAIN) -> str:
    """Hash of everything besides the data that decides what a training gives (16 hex digits)."""
    parts: dict[str, Any] = {
        "model": config.model.model_dump(mode="json"),
        "train": shortened(config, lesson.share).train.model_dump(mode="json"),
        "instances": config.instances.model_dump(mode="json"),
        "validation": config.retrain.validation,
    }
    if lesson.teaching == "mixed":
        parts["pseudo"] = config.pseudo.model_dump(mode="json")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def shortened(config: LoopConfig, share: float) -> LoopConfig:
    """The settings with `share` of the training budget: of the minutes, and of the steps where they are the budget."""
    if share == 1:
        return config
    steps = config.train.max_steps
    budget = {
        "minutes": config.train.minutes * share,
        "max_steps": None if steps is None else max(1, round(steps * share)),
    }
    return config.model_copy(update={"train": config.train.model_copy(update=budget)})


def context_of_kind(context: LoopContext, kind: str) -> LoopContext:
    """The project with another network: its own registered model, and `pseudo.labeller_minutes` of training.

    Its model is celloop-PROJECT.KIND; the dot keeps it apart from a project that is called PROJECT-KIND. Runs stand in
    the project's experiment.
    """
    config = context.config
    minutes, steps = config.pseudo.labeller_minutes, config.train.max_steps
    budget: dict[str, float | None] = {
        "minutes": minutes,
        "max_steps": None if steps is None else max(1, round(steps * minutes / config.train.minutes)),
    }
    model = config.model.model_copy(update={"name": kind})
    if kind == "pix2pix":
        model = model.model_copy(update={"heads": PIX2PIX_HEADS})
        budget["learning_rate"] = PIX2PIX_RATE
    return replace(
        context,
        config=config.model_copy(update={"model": model, "train": config.train.model_copy(update=budget)}),
        registry=context.registry.of_model(f"{registry_name(context.project_name)}.{kind}"),
    )


def challenger(context: LoopContext, snapshot_id: str, log: Log | None = None, lesson: Lesson = PLAIN) -> ModelVersion:
    """The registered model for a snapshot: the one that exists, or one trained now, here or by a pool's worker."""
    place = context_of_kind(context, lesson.kind) if lesson.kind else context
    tags = {"snapshot_id": snapshot_id, "recipe_id": recipe_id(place.config, lesson)}
    found = place.registry.find_version(tags)
    if found is not None:
        logger.info("model %s was trained from snapshot %s already", found.label, snapshot_id)
        return found
    if place.config.retrain.pool is None:
        return train_and_register(context, snapshot_id, log, lesson)
    return _train_on_pool(place, snapshot_id, tags, lesson)


def train_and_register(
    context: LoopContext, snapshot_id: str, log: Log | None = None, lesson: Lesson = PLAIN
) -> ModelVersion:
    """Trains on a snapshot's teaching images, keeps curves and pictures in MLflow and registers the weights.

    An image that changed or vanished since the snapshot was made is named in the log and left out. The run also holds
    the audits of the labellers, and where their pseudo-labels teach, how many do and how far their confidence is true.

    Raises:
        StateError: the snapshot has no image to learn from.
        ImageError: every image to learn from changed or vanished.
    """
    if lesson.kind:
        context = context_of_kind(context, lesson.kind)
    config = shortened(context.config, lesson.share)
    material = _material(context, snapshot_id, lesson)
    tags = {
        "snapshot_id": snapshot_id,
        "recipe_id": recipe_id(context.config, lesson),
        "project": context.project_name,
        "teaching": lesson.teaching,
        "validation": str(config.retrain.validation),
        "network": config.model.name,
    }
    lineage = _lineage(lesson)
    state = _state_dir(context, f"{lineage}{snapshot_id}-{tags['recipe_id']}", lineage)
    more: dict[str, Any] = {"pseudo": material.pseudo} if material.pseudo else {}
    params = _params(config, material)
    with context.registry.start_run(f"train-{lineage}{snapshot_id[:8]}", params=params, tags=tags) as run:
        if not lesson.kind:
            run.log(0, _audited(context, lesson))

        def trained_from(state: Path) -> Trained:
            return train(
                material.taught,
                config.model,
                config.train,
                instances=config.instances,
                validation=material.kept_back,
                state_dir=state,
                log=_both(run.log, log),
                **more,
            )

        trained = _resumed(state, trained_from)
        version = _register(context, run, trained, tags)
        if state.exists():
            shutil.rmtree(state)
        _examples(run, trained, config, material.holdout or (*material.taught, *material.kept_back))
    logger.info("trained %s: %d steps in %.0f s", version.label, trained.steps, trained.seconds)
    return version


def _audited(context: LoopContext, lesson: Lesson) -> dict[str, float]:
    """What a run says of the pseudo-labels; one on people's labels alone says how they were audited."""
    return {k: v for k, v in figures(context).items() if lesson.teaching == "mixed" or k.startswith("audit.")}


class _Material(NamedTuple):
    """What a training works with; `n_left_out` images to learn from have changed or vanished."""

    taught: list[Sample]
    kept_back: list[Sample]
    pseudo: list[Sample]
    holdout: tuple[Sample, ...]
    n_left_out: int


def _material(context: LoopContext, snapshot_id: str, lesson: Lesson) -> _Material:
    snapshot = load_snapshot(context.workspace.snapshots_dir, snapshot_id)
    teaching = snapshot.split("train")
    if not teaching:
        raise StateError(f"snapshot {snapshot_id} has no image to learn from; label some that are not hold-out first")
    parts = keep_back(teaching, context.config.retrain.validation)  # of all, so that others know who was kept back
    taught, kept_back = ([sample for sample in part if _is_intact(sample, snapshot_id)] for part in parts)
    if not taught:
        raise ImageError(
            f"all {len(parts[0])} images to learn from in snapshot {snapshot_id} have changed or vanished, first "
            f"{parts[0][0].image.path}; restore the files, or run `celloop init` with the folder where they are now"
        )
    guessed = snapshot.split("pseudo") if lesson.teaching == "mixed" else ()
    pseudo = [sample for sample in guessed if _is_intact(sample, snapshot_id)]
    return _Material(taught, kept_back, pseudo, snapshot.split("holdout"), len(teaching) - len(taught) - len(kept_back))


def _params(config: LoopConfig, material: _Material) -> dict[str, Any]:
    return {
        **{f"model.{k}": v for k, v in config.model.model_dump(mode="json").items()},
        **{f"train.{k}": v for k, v in config.train.model_dump(mode="json").items()},
        "images_train": len(material.taught),
        "images_validation": len(material.kept_back),
        "images_left_out": material.n_left_out,
        "images_pseudo": len(material.pseudo),
        "cells_train": sum(len(s.instances) for s in material.taught),
        "cells_pseudo": sum(int((s.instances.weights > 0).sum()) for s in material.pseudo),
        "images_holdout": len(material.holdout),
        "device": str(resolve_device(config.train.device)),
    }


def _lineage(lesson: Lesson) -> str:
    """What the names of a lesson's trainings start with: those of people's labels alone with nothing."""
    if lesson.kind:
        return f"{lesson.kind}."
    return "" if lesson.teaching == "labelled" else f"{lesson.teaching}."


def _state_dir(context: LoopContext, name: str, lineage: str) -> Path:
    """Where this training's state lies; those of its lineage's earlier trainings, which nobody resumes, are deleted."""
    state = context.workspace.training_dir / context.project_name / name
    for other in state.parent.glob(f"{lineage}*"):
        if other != state and "." not in other.name.removeprefix(lineage):
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
def train_flow(
    workspace: str,
    project: str,
    snapshot_id: str,
    *,
    teaching: Literal["labelled", "mixed"] = "labelled",
    share: float = 1.0,
    kind: str = "",
) -> str:
    """Trains on a snapshot and returns the model version's label; what a worker of the training pool runs."""
    context = open_context(Workspace(Path(workspace)), project)
    return train_and_register(context, snapshot_id, None, Lesson(teaching, share, kind)).label


def _train_on_pool(
    context: LoopContext, snapshot_id: str, tags: dict[str, str], lesson: Lesson = PLAIN
) -> ModelVersion:
    """The model that a worker of the training pool makes; a run that waits or works already is joined.

    Raises:
        StateError: the project has no deployment for training.
        ServiceError: no worker took the run, or it ended without a model.
    """
    name = f"train/{context.project_name}"
    parameters = {
        "workspace": str(context.workspace.root),
        "project": context.project_name,
        "snapshot_id": snapshot_id,
        **{key: value for key, value in asdict(lesson).items() if value != getattr(PLAIN, key)},
    }
    pool, minutes = str(context.config.retrain.pool), context.config.train.minutes
    key = f"train-{snapshot_id}-{tags['recipe_id']}"
    ended = run_on_pool(name, parameters, key, pool=pool, longest_s=minutes * 60 + OVERTIME_S)
    found = context.registry.find_version(tags)
    if found is None:
        state = f"{ended.state.name} ({ended.state.message or 'no message'})" if ended.state else "unknown"
        raise ServiceError(
            f"training run {ended.name} of {name} ended as {state} and registered no model; its log in Prefect says "
            "why. The next round tries again"
        )
    return found
