"""What a network is punished for: the summed loss of its heads and, for a sparse one, of its set of masks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from loop.config import TrainConfig
from loop.data.dataset import Batch, Lesson
from loop.losses.bce import weighted_bce
from loop.losses.dice import soft_dice
from loop.losses.overlap import overlap_loss
from loop.losses.sparse import sparse_loss
from loop.models.sparse_seu_net import SparseOutput

SPARE = 0.9
"""Share of a sparse network's queries that a training crop may fill with cells (Prytula 2023, section 5.7)."""


class Taught(NamedTuple):
    """A `Batch` without its images, as tensors on a device."""

    target: Tensor
    weight: Tensor
    overlap_map: Tensor | None
    masks: list[Tensor]
    mask_weights: list[Tensor]


def lesson_of(net: nn.Module) -> Lesson:
    """What crops must hold for a network: its dense heads, and single cells for a sparse one."""
    queries: int | None = getattr(net, "queries", None)
    most = None if queries is None else max(int(SPARE * queries), 1)
    heads: tuple[str, ...] = getattr(net, "heads", ())
    return Lesson(heads, most)


def taught(batch: Batch, device: torch.device) -> Taught:
    """The batch's tensors on `device`."""

    def there(array: object) -> Tensor:
        return torch.as_tensor(array).to(device, non_blocking=True)

    likely = None if batch.overlap_map is None else there(batch.overlap_map)
    masks, weights = ([there(a) for a in arrays] for arrays in (batch.masks, batch.mask_weights))
    return Taught(there(batch.target), there(batch.weight), likely, masks, weights)


def criterion(output: Tensor | SparseOutput, truth: Taught, heads: tuple[str, ...], config: TrainConfig) -> Tensor:
    """The loss of a forward pass, () with a gradient.

    Args:
        output: raw logits (B, K, H, W) of K heads, or what a sparse network gives.
        truth: of the same crops.
        heads: K names.
        config: weights of the parts.

    Source: Prytula 2023, eq. 4.2 (heads), 4.5 and 5.1 (overlap), 4.18 and 5.3 (masks). Differs: Dice is added to the
    cross-entropy of each head (`dice`), without which a short training splits worse.
    """
    if isinstance(output, SparseOutput):
        total = sparse_loss(
            output.masks,
            output.classes,
            output.objectness,
            truth.masks,
            truth.mask_weights,
            truth.weight,
            class_weight=config.class_weight,
            mask_dice_weight=config.mask_dice_weight,
            mask_bce_weight=config.mask_bce_weight,
            objectness_weight=config.objectness_weight,
            alpha=config.focal_alpha,
            gamma=config.focal_gamma,
        )
        return total if output.dense is None else total + head_loss(output.dense, truth, heads, config)
    return head_loss(output, truth, heads, config)


def head_loss(logits: Tensor, truth: Taught, heads: tuple[str, ...], config: TrainConfig) -> Tensor:
    """The weighted sum of the losses of dense heads, () with a gradient; arguments as for `criterion`."""
    weights = head_weights(config)
    total = torch.zeros((), device=logits.device)
    for channel, name in enumerate(heads):
        head, target, counts = logits[:, channel], truth.target[:, channel], truth.weight[:, 0]
        if name == "overlap":
            loss = overlap_loss(
                head,
                target,
                None if truth.overlap_map is None else truth.overlap_map[:, 0],
                counts,
                use=config.overlap_use,
                alpha=config.focal_alpha,
                gamma=config.focal_gamma,
            )
        else:
            loss = weighted_bce(head, target, counts)
            if config.dice and name != "distance":  # Dice is smallest at 0 and 1, not at the distance in between
                loss = loss + soft_dice(head, target, counts)
        total = total + weights[name] * loss
    return total


def head_weights(config: TrainConfig) -> dict[str, float]:
    """How much each head counts in a summed loss."""
    return {
        "interior": config.interior_weight,
        "nuclei": config.nuclei_weight,
        "border": config.border_weight,
        "background": config.background_weight,
        "overlap": config.overlap_weight,
        "distance": config.distance_weight,
    }
