"""The loss of a network that gives a set of masks: matched one to one with the cells, then compared."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from loop.errors import ShapeError
from loop.losses.assignment import assign
from loop.losses.focal import focal_terms


class _Pairs(NamedTuple):
    """The P matched pairs of a batch: crop and query of each (P,), its target (P, h, w) and its weight (P,)."""

    crops: Tensor
    queries: Tensor
    targets: Tensor
    weights: Tensor


def sparse_loss(
    masks: Tensor,
    classes: Tensor,
    objectness: Tensor | None,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    pixel_weight: Tensor,
    *,
    class_weight: float = 2.0,
    mask_dice_weight: float = 2.0,
    mask_bce_weight: float = 5.0,
    objectness_weight: float = 1.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Class loss of all queries plus mask (and objectness) loss of those that are matched with a cell.

    Args:
        masks: (B, N, h, w) raw logits.
        classes: (B, N) raw logits.
        objectness: (B, N) raw logits, or None where the network has none.
        targets: B tensors (n_i, H, W) bool, n_i <= N, cells may overlap, n_i = 0 allowed; H / h = W / w is whole.
        weights: B tensors (n_i,) >= 0. A cell of weight 0 is matched but teaches nothing, and its query is not taken
            for background.
        pixel_weight: (B, 1, H, W) >= 0; where it is 0 the masks are not compared, and a query without a cell whose mask
            lies there is not taken for background: it counts by the mean weight, at most 1, of its mask's pixels (of
            the whole frame where its mask is empty).
        class_weight: of the focal loss of the classes (eq. 4.17).
        mask_dice_weight: of the Dice loss (eq. 4.14).
        mask_bce_weight: of the cross-entropy, its mean over the frame (eq. 4.15).
        objectness_weight: of the squared error between the sigmoid of `objectness` and the IoU of the mask, cut at
            0.5, with its cell (eq. 5.2).
        alpha: of the focal loss.
        gamma: of the focal loss.

    Returns:
        () float32, >= 0, finite, with a gradient for every output; without cells the class loss alone.

    Raises:
        InputError: a crop holds more cells than there are queries.
        NonFiniteError: an output is NaN or infinite.
        ShapeError: a target's size is no whole multiple of the masks'.

    Source: Prytula 2023, eq. 4.14 to 4.18, 5.2, 5.3. Differs: the class loss is summed over the queries and divided by
    the number of cells in the batch (as in SparseInst), because a mean over mostly empty queries hardly moves; cells
    are averaged over the pixels of a mask, so targets are soft; weights a cell and a pixel.
    """
    pairs = _match(masks, classes, targets, weights)
    n_cells = torch.clamp((pairs.weights > 0).sum(), min=1).float()
    truth = torch.zeros_like(classes, dtype=torch.float32)
    counts = _ground_known(masks, _shrink(pixel_weight, masks)[:, 0])
    truth[pairs.crops, pairs.queries] = 1.0
    counts[pairs.crops, pairs.queries] = pairs.weights
    loss = class_weight * (focal_terms(classes, truth, alpha=alpha, gamma=gamma) * counts).sum() / n_cells
    found = masks[pairs.crops, pairs.queries].float()
    visible = _shrink(pixel_weight, masks)[pairs.crops, 0]
    dice, bce = _mask_terms(found, pairs.targets, visible)
    terms = mask_dice_weight * dice + mask_bce_weight * bce
    if objectness is not None:
        said = objectness[pairs.crops, pairs.queries].float().sigmoid()
        terms = terms + objectness_weight * (said - _iou(found.detach(), pairs.targets, visible)) ** 2
    return loss + (terms * pairs.weights).sum() / n_cells


@torch.no_grad()
def _ground_known(masks: Tensor, visible: Tensor) -> Tensor:
    """How far each query's place is known, (B, N) in [0, 1], from masks (B, N, h, w) and pixel weights (B, h, w)."""
    if bool((visible == 1).all()):
        return torch.ones(masks.shape[:2], device=masks.device)
    inside = (masks > 0).float()
    areas = inside.sum(dim=(2, 3))
    under = torch.einsum("bnhw,bhw->bn", inside, visible) / torch.clamp(areas, min=1)
    everywhere = visible.mean(dim=(1, 2))[:, None].expand_as(under)
    return torch.where(areas > 0, under, everywhere).clamp(max=1)


def _match(masks: Tensor, classes: Tensor, targets: Sequence[Tensor], weights: Sequence[Tensor]) -> _Pairs:
    """Pairs by whole cells: pixels of weight 0 count here, or a cell inside them would be matched with any query."""
    crops, queries, cells, counts = [], [], [], []
    for i, (full, weight) in enumerate(zip(targets, weights, strict=True)):
        small = _shrink(full, masks)
        rows, columns = assign(masks[i], classes[i], small, crop=i)
        crops.append(torch.full_like(rows, i))
        queries.append(rows)
        cells.append(small[columns.to(small.device)])
        counts.append(weight.to(small.device, torch.float32)[columns.to(small.device)])
    device = masks.device
    return _Pairs(torch.cat(crops).to(device), torch.cat(queries).to(device), torch.cat(cells), torch.cat(counts))


def _shrink(full: Tensor, masks: Tensor) -> Tensor:
    """(..., H, W) averaged over the area of each mask pixel: (..., h, w) float32 on the masks' device."""
    factor, rest = divmod(full.shape[-1], masks.shape[-1])
    if rest or not factor or full.shape[-2] != factor * masks.shape[-2]:
        raise ShapeError(
            f"cells are drawn on {tuple(full.shape[-2:])} px, masks on {tuple(masks.shape[-2:])}; expected a whole "
            "multiple of the masks' height and width"
        )
    full = full.to(masks.device, torch.float32)
    if factor == 1 or not len(full):
        return full.reshape(*full.shape[:-2], *masks.shape[-2:])
    return functional.avg_pool2d(full, factor)


def _mask_terms(logits: Tensor, targets: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Dice loss and mean cross-entropy of each pair: (P,) each, of (P, h, w)."""
    probs = logits.sigmoid()
    both = (probs * targets * visible).sum(dim=(1, 2))
    sizes = ((probs**2 + targets**2) * visible).sum(dim=(1, 2))
    dice = 1 - (2 * both + 1e-3) / (sizes + 1e-3)
    cross = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    area = torch.clamp(visible.sum(dim=(1, 2)), min=1e-6)
    return dice, (cross * visible).sum(dim=(1, 2)) / area


def _iou(logits: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
    """IoU (P,) of the masks cut at 0.5 with their soft targets: sum of minima over sum of maxima."""
    probs = (logits > 0).float()
    both = (torch.minimum(probs, targets) * visible).sum(dim=(1, 2))
    either = (torch.maximum(probs, targets) * visible).sum(dim=(1, 2))
    return both / torch.clamp(either, min=1e-6)
