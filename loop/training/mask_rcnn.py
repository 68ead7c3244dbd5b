"""Trains the labeller mask_rcnn from scratch on labelled images, where torchvision can be imported."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import Batch, CropStream, Lesson
from loop.errors import InputError, NonFiniteError
from loop.models.runtime import resolve_device
from loop.pseudo.mask_rcnn import new_mask_rcnn
from loop.types import Sample

CLIP = 5.0  # norm of the gradient
CELLS = 200  # a crop with more cells is taken larger, so that its masks fit into memory


def train_mask_rcnn(
    samples: Sequence[Sample],
    path: Path,
    config: TrainConfig,
    *,
    steps: int,
    rate: float = 3e-4,
    v2: bool = False,
    log: Callable[[int, dict[str, float]], None] = lambda _step, _values: None,
) -> Path:
    """The file that it writes: {"for_cells": True, "state": the state dict}, for pseudo.weights.mask_rcnn.

    AdamW over augmented crops, the rate rising over the first tenth of the steps and falling to 0 along a cosine; the
    losses are torchvision's own, summed. A cell of weight 0, and one outside the known ground that is not drawn, count
    as background: Mask R-CNN knows no ignored pixels.

    Args:
        samples: at least one labelled image.
        path: the file to write; whole or not at all.
        config: crop, batch, weight_decay, the crops' changes, seed and device are used; the same seed gives the same
            crops and, on a CPU, the same network.
        steps: optimiser steps, at least 1.
        rate: the highest learning rate.
        v2: the larger network.
        log: called with the step, from 1, and its losses.

    Raises:
        ConfigError: torchvision cannot be imported.
        InputError: no samples, or no steps.
        NonFiniteError: the loss is NaN or infinite; nothing is written.
    """
    if steps < 1:
        raise InputError(f"steps={steps}; training needs at least one")
    device = resolve_device(config.device)
    stream = CropStream(samples, ModelConfig(), config, Lesson(heads=("interior",), most_cells=CELLS))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        net = new_mask_rcnn(v2=v2).to(device).train()
        optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=config.weight_decay)
        for step in range(1, steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = rate * _share(step, steps)
            images, targets = _lesson(stream.batch(step), device)
            losses: dict[str, Tensor] = net(images, targets)
            total = torch.stack(list(losses.values())).sum()
            if not bool(torch.isfinite(total)):
                raise NonFiniteError(f"the loss of mask_rcnn is {float(total)} at step {step}; lower the rate")
            optimiser.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimiser.step()
            log(step, {name: float(loss.detach()) for name, loss in losses.items()})
    part = path.with_name(f"{path.name}.part")
    torch.save({"for_cells": True, "state": net.state_dict()}, part)
    return part.replace(path)


def _share(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    return min(step / warm, 0.5 * (1 + float(np.cos(np.pi * (step - 1) / steps))))


def _lesson(batch: Batch, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets as torchvision takes them: boxes (n, 4) float32 x0 y0 x1 y1, labels (n,), masks (n, S, S)."""
    images = [torch.from_numpy(image).to(device) for image in batch.image]
    targets = []
    for masks, weights in zip(batch.masks, batch.mask_weights, strict=True):
        taught = masks[weights > 0]
        boxes = np.zeros((len(taught), 4), np.float32)
        for box, mask in zip(boxes, taught, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        targets.append(
            {
                "boxes": torch.from_numpy(boxes).to(device),
                "labels": torch.ones(len(taught), dtype=torch.int64, device=device),
                "masks": torch.from_numpy(taught.astype(np.uint8)).to(device),
            }
        )
    return images, targets
