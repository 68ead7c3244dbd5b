"""Who finds the cells of a plain folder's images: a model, one labeller, or several fused."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loop.config import LoopConfig
from loop.errors import ConfigError, ImageError, InputError, StateError
from loop.models import SEGMENTERS
from loop.models.segmenter import Segmenter
from loop.pseudo import PSEUDO_LABELLERS, build_labeller
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.pseudo.calibration import uncalibrated
from loop.pseudo.fusion import fuse_proposals
from loop.training.checkpoint import load_checkpoint
from loop.types import Instances, UInt8Array

logger = logging.getLogger(__name__)

Finder = Callable[[UInt8Array, str], Instances]
"""Pixels (H, W, C) uint8 and an image id to cells; raises ImageError where an image cannot be used."""

ENSEMBLE = "ensemble"


def load_model(model: Path, *, device: str, tta: int | None = None) -> Segmenter:
    """The segmenter of a checkpoint directory; `tta` flips and turns are looked at, None = as the model was stored."""
    checkpoint = load_checkpoint(model, device=device)
    instances = checkpoint.instance_config.model_copy(update={} if tta is None else {"tta": tta})
    return Segmenter(checkpoint.net, checkpoint.model_config, instances, device=device, model_version=model.name)


def model_finder(model: Path, *, device: str, tta: int | None = None) -> Finder:
    """The cells that a model finds."""
    segmenter = load_model(model, device=device, tta=tta)
    return lambda pixels, image_id: segmenter.predict(pixels, image_id=image_id).instances


def labeller_finder(names: Sequence[str], config: LoopConfig, *, model: Path | None, device: str) -> Finder:
    """The cells that labellers propose; those of several are fused, and a cell's score says how far they agree on it.

    A labeller that fails on an image, or proposes more than `pseudo.max_cells` cells, is named in the log and left out
    for this image.

    Args:
        names: keys of PSEUDO_LABELLERS; "ensemble" = all of the others, or of the settings where there are no others.
        config: its part `pseudo` counts; `pseudo.weights` may name the folder of a model for each of the loop's kinds.
        model: the champion: for `champion`, for its own kind, and for labellers that are prompted by its cells.
        device: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: a name is unknown.
        InputError: a labeller needs a model and there is none of its kind.
    """
    wanted = _wanted(names, config)
    champion = None if model is None else load_model(model, device=device)
    tools = Tools(config.pseudo, device, lambda kind: _segmenter(kind, champion, config.pseudo.weights, device))
    try:
        labellers = [build_labeller(name, tools) for name in wanted]
    except StateError as error:
        raise InputError(str(error)) from error
    blind = [labeller.name for labeller in labellers if labeller.needs_hint]
    if blind and champion is None:
        raise InputError(f"{', '.join(blind)} is prompted by a model's cells; give its folder with --model")
    fused = ENSEMBLE in names or len(labellers) > 1
    prompter = champion if set(wanted) - {"champion", *SEGMENTERS} else None

    def find(pixels: UInt8Array, image_id: str) -> Instances:
        hint = prompter.predict(pixels, image_id=image_id).instances if prompter is not None else None
        found: dict[str, Proposal] = {}
        for labeller in labellers:
            try:
                found[labeller.name] = _ask(labeller, pixels, image_id, hint, most=config.pseudo.max_cells)
            except Exception as error:  # whatever a labeller's package raises costs this image only
                logger.warning("labeller %s is left out for %s: %s", labeller.name, image_id, error)
                if len(labellers) == 1:
                    raise ImageError(f"labeller {labeller.name} failed: {error}") from error
        if not found:
            raise ImageError("every labeller failed; the log says why")
        if not fused:
            return found[labellers[0].name].instances
        together = fuse_proposals(found, {}, config.pseudo, min_area=config.instances.min_area)
        share = (together.support > 0).mean(axis=1)
        return replace(together.instances, scores=(uncalibrated(together) * share).astype(np.float32))

    return find


def _wanted(names: Sequence[str], config: LoopConfig) -> list[str]:
    """The labellers that are asked, each once."""
    wanted = [name for name in dict.fromkeys(names) if name != ENSEMBLE]
    if ENSEMBLE in names and not wanted:
        wanted = list(dict.fromkeys(config.pseudo.labellers))
    unknown = [name for name in wanted if name not in PSEUDO_LABELLERS]
    if unknown:
        known = ", ".join([*sorted(PSEUDO_LABELLERS), ENSEMBLE])
        raise ConfigError(f"unknown labeller {', '.join(unknown)}; choose from {known}")
    return wanted


def _ask(labeller: Labeller, pixels: UInt8Array, image_id: str, hint: Instances | None, *, most: int) -> Proposal:
    proposal = labeller.propose(pixels, image_id=image_id, hint=hint)
    if len(proposal.instances) > most:
        raise InputError(f"it proposes {len(proposal.instances)} cells, more than pseudo.max_cells={most}")
    return proposal


def _segmenter(kind: str, champion: Segmenter | None, weights: dict[str, str], device: str) -> Segmenter:
    """The model of a kind: the folder that the settings name for it, or the one given where it is of that kind.

    Raises:
        StateError: there is none.
    """
    if kind in weights and kind in SEGMENTERS:
        return load_model(Path(weights[kind]), device=device)
    if champion is not None and kind in ("champion", champion.model_config.name):
        return champion
    given = f"--model holds a {champion.model_config.name}" if champion is not None else "there is no --model"
    raise StateError(f"labeller {kind} needs a trained model and {given}; give the folder of a model of that kind")
