"""Images far from everything labelled and from each other, whatever the model thinks of them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, embedded, squared_distances
from loop.types import Candidate, FloatArray, Selection

ROWS, COLUMNS = 8192, 512
"""Distances are computed in blocks of so many points and centres: 16 MiB each."""


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images, each the farthest from what is labelled or chosen; see `loop.acquisition.base.Acquisition`.

    Embeddings are standardised over the candidates. Nothing is random. Costs N x (k + len(labelled)) distances.

    Source: Sener and Savarese 2018 (arXiv 1708.00489), algorithm 1, k-centre greedy.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    points, centres = embedded(ordered, labelled)
    order = k_centre(points.astype(np.float32), centres.astype(np.float32), k)
    chosen = []
    for rank, i in enumerate(order, start=1):
        known = np.concatenate([centres, points[order[: rank - 1]]])
        reason = _reason(points[i], known, len(labelled), len(ordered))
        chosen.append(Selection(ordered[i].image_id, rank, False, reason))
    return chosen


def k_centre(points: npt.NDArray[np.float32], centres: npt.NDArray[np.float32], k: int) -> list[int]:
    """Places of min(k, N) points, each the farthest from the nearest centre or point taken before it.

    Greedy, and exact but for float32 rounding. Equal distances go by place. Without centres the first is the point
    nearest to the mean. Costs N x (M + k) distances, one matrix product a block, and N floats beside the points.

    Args:
        points: (N, D), N >= 1, around 0.
        centres: (M, D), M >= 0.
        k: >= 0.
    """
    lengths = np.einsum("ij,ij->i", points, points)
    order: list[int] = []
    if len(centres):
        nearest = nearest_squared(points, centres)
    else:
        nearest = np.full(len(points), np.inf, np.float32)
        first = int(np.argmin(squared_distances(points, points.mean(axis=0, keepdims=True))))
    while len(order) < min(k, len(points)):
        best = int(np.argmax(nearest)) if order or len(centres) else first
        order.append(best)
        squares = lengths - 2 * (points @ points[best]) + lengths[best]
        # a point that is taken keeps -1, which is below every distance
        np.minimum(nearest, np.maximum(squares, 0), out=nearest)
        nearest[best] = -1
    return order


def nearest_squared(points: npt.NDArray[np.float32], centres: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N,) squared distance of each of (N, D) points to the nearest of (M, D) centres; inf where M is 0."""
    nearest = np.full(len(points), np.inf, np.float32)
    for top in range(0, len(points), ROWS):
        block = nearest[top : top + ROWS]
        for left in range(0, len(centres), COLUMNS):
            squares = squared_distances(points[top : top + ROWS], centres[left : left + COLUMNS])
            np.minimum(block, squares.min(axis=1), out=block)
    return nearest


def _reason(point: npt.NDArray[np.float64], known: npt.NDArray[np.float64], n_labelled: int, n_open: int) -> str:
    if not len(known):
        return f"the most ordinary of {n_open} open images, to begin with"
    distance = float(np.sqrt(((known - point) ** 2).sum(axis=1).min()))
    n_before = len(known) - n_labelled
    others = " and ".join(
        [f"the {n_labelled} labelled"] * (n_labelled > 0) + [f"the {n_before} chosen before it"] * (n_before > 0)
    )
    if distance == 0:
        return f"looks the same as one of {others}; nothing more different is left"
    return f"unlike anything labelled or chosen so far: of {n_open} open images the farthest from {others}"
