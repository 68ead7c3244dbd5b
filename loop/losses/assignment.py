"""Which query answers for which cell: the one-to-one assignment of the highest summed score."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from loop.errors import InputError, NonFiniteError


@torch.no_grad()
def assign(
    mask_logits: Tensor, class_logits: Tensor, targets: Tensor, lam: float = 0.8, *, crop: int = 0
) -> tuple[Tensor, Tensor]:
    """A query for each target, by the Hungarian algorithm on C = C_cls^(1 - lam) C_mask^lam.

    C_cls is the query's class probability, C_mask its `dice_matrix` with the target. Nothing here carries a gradient.

    Args:
        mask_logits: (N, h, w) float.
        class_logits: (N,) float.
        targets: (M, h, w) in [0, 1], M <= N, M = 0 allowed.
        lam: in [0, 1], weight of the masks against the classes.
        crop: the crop's index in its batch, for errors.

    Returns:
        Queries and targets, (M,) int64 each, on the CPU, ascending by query; every target appears once.

    Raises:
        InputError: more targets than queries; the text names the crop.
        NonFiniteError: a logit is NaN or infinite in a way that leaves no cost.

    Cost: one product (N, hw) x (hw, M) and O(N M^2) for the assignment.

    Source: Prytula 2023, eq. 4.10 to 4.13. Differs: C is a similarity, so its sum is maximised where the text says
    minimised (as in SparseInst, Cheng et al. 2022).
    """
    n_queries, n_targets = len(mask_logits), len(targets)
    if n_targets > n_queries:
        raise InputError(
            f"crop {crop} of the batch holds {n_targets} cells, the model has {n_queries} queries; "
            "use smaller crops (train.crop) or more queries (model.queries)"
        )
    if not n_targets:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    dice = dice_matrix(mask_logits.float().sigmoid(), targets)
    score = class_logits.float().sigmoid()[:, None] ** (1 - lam) * dice**lam
    if not bool(torch.isfinite(score).all()):
        raise NonFiniteError(
            f"the model's output for crop {crop} of the batch is NaN or infinite; lower train.learning_rate or set "
            "train.precision: fp32"
        )
    rows, columns = linear_sum_assignment(score.cpu().numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def dice_matrix(probs: Tensor, targets: Tensor) -> Tensor:
    """Dice of every mask with every target, 2 sum(p g) / (sum p^2 + sum g^2), by one matrix product.

    Args:
        probs: (N, h, w) in [0, 1].
        targets: (M, h, w) in [0, 1].

    Returns:
        (N, M) float32 in [0, 1]; 0 where both masks are empty.

    Source: Prytula 2023, eq. 4.13.
    """
    with torch.autocast(probs.device.type, enabled=False):
        first, second = probs.float().flatten(1), targets.float().flatten(1)
        sizes = (first**2).sum(1)[:, None] + (second**2).sum(1)[None, :]
        return 2 * (first @ second.T) / torch.clamp(sizes, min=1e-6)
