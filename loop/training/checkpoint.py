"""A trained model on disk: weights as safetensors, everything else as JSON. No pickles."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loop.config import InstanceConfig, ModelConfig
from loop.data.intensity import LOWER, MIN_RANGE, UPPER
from loop.errors import CheckpointError
from loop.models import SEGMENTERS
from loop.models.runtime import resolve_device

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
FORMAT = 2
MAKE_IT = "copy the whole directory again, or train with `celloop train`"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as it was stored, on a device and in evaluation mode.

    `meta` holds what else was known: snapshot_id, minutes, steps, normalisation, extra.
    """

    net: nn.Module
    model_config: ModelConfig
    instance_config: InstanceConfig
    meta: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    directory: Path,
    net: nn.Module,
    model_config: ModelConfig,
    instance_config: InstanceConfig,
    *,
    snapshot_id: str = "",
    minutes: float = 0.0,
    steps: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes DIRECTORY/model.safetensors and, last, DIRECTORY/model.json; each file appears whole or not at all.

    Args:
        directory: made if missing; a checkpoint that is there is overwritten.
        net: built from `model_config`.
        model_config: the architecture and how it sees intensities.
        instance_config: the thresholds that go with the weights.
        snapshot_id: the dataset that it learnt from.
        minutes: how long the training took.
        steps: how many optimiser steps it took.
        extra: anything else that JSON can hold.

    Raises:
        CheckpointError: the files cannot be written, e.g. because the disk is full.
    """
    description = {
        "format": FORMAT,
        "architecture": model_config.name,
        "model": model_config.model_dump(mode="json"),
        "instances": instance_config.model_dump(mode="json"),
        "normalisation": {"lower_pct": LOWER, "upper_pct": UPPER, "min_range": MIN_RANGE},
        "snapshot_id": snapshot_id,
        "minutes": minutes,
        "steps": steps,
        "extra": dict(extra or {}),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    scratch = [directory / f"{name}.part" for name in (WEIGHTS, DESCRIPTION)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, scratch[0])
        scratch[1].write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        scratch[0].replace(directory / WEIGHTS)
        scratch[1].replace(directory / DESCRIPTION)
    except (OSError, SafetensorError) as error:
        for path in scratch:
            if path.exists():
                path.unlink()
        raise CheckpointError(
            f"cannot write a checkpoint to {directory}: {error}; check the disk's space and rights"
        ) from error


def load_checkpoint(directory: Path, *, device: str = "auto") -> Checkpoint:
    """The model of a checkpoint directory.

    Args:
        directory: holds model.safetensors and model.json.
        device: "auto", "cpu" or "cuda".

    Raises:
        CheckpointError: a file is missing, truncated or no such file, the architecture is unknown, or the weights do
            not fit it; the text says what was found and what was expected.
        ConfigError: the device is not there.
    """
    target = resolve_device(device)
    description = _description(directory / DESCRIPTION)
    name = description.get("architecture")
    if name not in SEGMENTERS:
        raise CheckpointError(
            f"{directory / DESCRIPTION} holds architecture {name!r}; this version knows {', '.join(sorted(SEGMENTERS))}"
        )
    try:
        model_config = ModelConfig.model_validate(description.get("model"))
        instance_config = InstanceConfig.model_validate(description.get("instances"))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(
            f"the settings in {directory / DESCRIPTION} are not valid: {faults}; {MAKE_IT}"
        ) from error
    net = SEGMENTERS[name](model_config)
    tensors = _tensors(directory / WEIGHTS)
    _check_fit(tensors, net.state_dict(), directory)
    net.load_state_dict(tensors)
    meta = {key: value for key, value in description.items() if key not in ("format", "model", "instances")}
    return Checkpoint(net.to(target).eval(), model_config, instance_config, meta)


def _description(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {MAKE_IT}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}), perhaps truncated; {MAKE_IT}") from error
    found = loaded.get("format") if isinstance(loaded, dict) else type(loaded).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}; this version reads format {FORMAT}; {MAKE_IT}")
    return dict(loaded)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {MAKE_IT}") from error
    except (OSError, SafetensorError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or no safetensors file ({error}); {MAKE_IT}"
        ) from error


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], directory: Path) -> None:
    faults = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    faults += [f"{name} is unknown" for name in sorted(set(found) - set(expected))]
    faults += [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(set(found) & set(expected))
        if found[name].shape != expected[name].shape
    ]
    faults += [
        f"{name} holds NaN or infinity"
        for name in sorted(set(found) & set(expected))
        if not bool(torch.isfinite(found[name]).all())
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"the weights in {directory / WEIGHTS} do not fit the model in {directory / DESCRIPTION}: "
            f"{'; '.join(faults[:3])}{more}; both files must come from one training"
        )
