"""One image from the middle of each group of uncertain images."""

from collections.abc import Sequence

import numpy as np

from loop.acquisition.base import check_candidates, embedded, standing
from loop.acquisition.clusters import k_means
from loop.types import Candidate, FloatArray, Selection

LEAST = 1e-6
"""Share of the highest uncertainty that every image weighs at least, so that weights are never all 0."""


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images, the middles of uncertain clusters; see `loop.acquisition.base.Acquisition`.

    k-means with k clusters of the standardised embeddings, each image weighing its uncertainty; of each cluster the
    image nearest to its centre, clusters with the most uncertainty in sum first. Where fewer than k places differ, the
    most uncertain of the images left follow. `labelled` is checked, no more.

    Source: CLUE (Prabhu et al. 2021, arXiv 2010.08666). Differs: whole images, and the uncertainty that is set
    instead of the entropy of a class.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    k = min(k, len(ordered))
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    highest = float(uncertainty.max())
    weights = np.maximum(uncertainty / highest, LEAST) if highest > 0 else np.ones(len(ordered))
    points, _ = embedded(ordered)
    clusters, centres = k_means(points, k, rng, weights)
    away = np.einsum("ij,ij->i", points - centres[clusters], points - centres[clusters])
    heaviest = np.argsort(-np.bincount(clusters, weights), kind="stable")
    middles = [int(own[np.argmin(away[own])]) for own in (np.flatnonzero(clusters == c) for c in heaviest)]
    rest = np.setdiff1d(np.arange(len(ordered)), middles)
    rest = rest[np.argsort(-uncertainty[rest], kind="stable")]
    chosen = []
    for rank, i in enumerate([*middles, *rest.tolist()][:k], start=1):
        reason = f"{standing(uncertainty, i, 'more uncertain')} (uncertainty {uncertainty[i]:.3g})"
        if rank <= len(middles):
            size = int(np.sum(clusters == clusters[i]))
            reason += f", in the middle of {size} that look alike" if size > 1 else ", and looks like no other of them"
        chosen.append(Selection(ordered[i].image_id, rank, False, reason))
    return chosen
