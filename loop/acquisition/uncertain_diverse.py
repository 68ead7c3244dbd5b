"""Images of which the model is unsure and that are unlike each other and unlike what it has learnt from."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, standardised
from loop.types import Candidate, FloatArray, Selection


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images, one after the other by uncertainty times distance; see `loop.acquisition.base.Acquisition`.

    Embeddings are standardised over the candidates. The first image is the most uncertain one. Each further one has
    the highest product of u, its uncertainty as a share of the highest of all, and d, its distance to the nearest
    image that is chosen already or labelled, as a share of the largest such distance among those left (k-centre).
    Equal products (all embeddings alike: d = 0 for all) go by uncertainty, then by image id. Nothing is random.
    Costs N x (k + len(labelled)) distances.

    Source: the greedy k-centre rule of Sener and Savarese 2018 (Core-Set), eq. 3. Differs: times uncertainty.
    """
    ordered = check_candidates(candidates, k)
    if not ordered or k == 0:
        return []
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    embeddings, centres = standardised(np.stack([c.embedding for c in ordered]), labelled)
    distance = np.full(len(ordered), np.inf)
    for centre in centres:
        distance = np.minimum(distance, _distances(embeddings, centre))
    share = uncertainty / max(float(uncertainty.max()), 1e-12)
    left = np.ones(len(ordered), np.bool_)
    chosen: list[Selection] = []
    while len(chosen) < min(k, len(ordered)):
        largest = float(distance[left].max()) if chosen else np.inf
        spread = distance / largest if 0 < largest < np.inf else np.zeros(len(ordered))
        value = np.where(left, share * spread, -np.inf)
        best = int(np.lexsort((np.where(left, -uncertainty, np.inf), -value))[0])
        chosen.append(_selection(ordered[best], uncertainty, float(spread[best]), len(chosen) + 1))
        left[best] = False
        distance = np.minimum(distance, _distances(embeddings, embeddings[best]))
    return chosen


def _distances(embeddings: npt.NDArray[np.float64], centre: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    distances: npt.NDArray[np.float64] = np.linalg.norm(embeddings - centre, axis=1)
    return distances


def _selection(candidate: Candidate, uncertainty: npt.NDArray[np.float64], spread: float, rank: int) -> Selection:
    n = len(uncertainty)
    if rank == 1:
        reason = (
            f"the model is least sure of its cells here among {n} open images (uncertainty {candidate.uncertainty:.3f})"
        )
    else:
        below = float(np.mean(uncertainty < candidate.uncertainty))
        likeness = "unlike" if spread > 0.5 else "somewhat unlike" if spread > 0 else "much like"
        reason = (
            f"more uncertain than {below:.0%} of {n} open images (uncertainty {candidate.uncertainty:.3f}) and "
            f"{likeness} what was chosen before it"
        )
    return Selection(candidate.image_id, rank, False, reason)
