"""The most typical image of each large kind of which none is labelled: for a start without a model."""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from loop.acquisition.base import check_candidates, embedded
from loop.acquisition.clusters import k_means
from loop.types import Candidate, FloatArray, Selection

MOST_CLUSTERS = 500
NEIGHBOURS = 20

MOST_COMPARED = 5000
"""Images of a cluster that are compared with one another; of a larger one a sample is."""


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images, typical ones of kinds not labelled yet; see `loop.acquisition.base.Acquisition`.

    Open and labelled images together fall into len(labelled) + min(k, N) clusters (at most 500) of the standardised
    embeddings. One image after the other comes from the cluster with the fewest labelled or chosen images, among these
    from the largest: its open image with the lowest mean distance to its nearest neighbours in the cluster (20, or
    half of the cluster where that is fewer), then the next. Uncertainty is not looked at. Of a cluster of more than
    5000 images a sample is compared, so that pools of a million take minutes.

    Source: TypiClust (Hacohen et al. 2022, arXiv 2202.02794), algorithm 1; numbers of clusters and neighbours as there.
    Differs: clusters of five or fewer images are not dropped, they come after the larger ones; labelled images count
    as neighbours; past the last cluster the order of the clusters takes account of what was chosen.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    k = min(k, len(ordered))
    points = np.concatenate(embedded(ordered, labelled))
    labels, _ = k_means(points, min(len(labelled) + k, MOST_CLUSTERS), rng)
    members = [np.flatnonzero(labels == cluster) for cluster in range(int(labels.max()) + 1)]
    taken = [int(np.sum(own >= len(ordered))) for own in members]
    heap = [(taken[c], -len(own), c) for c, own in enumerate(members) if taken[c] < len(own)]
    heapq.heapify(heap)
    queues: dict[int, list[int]] = {}
    chosen: list[Selection] = []
    while len(chosen) < k:
        n_taken, minus_size, cluster = heapq.heappop(heap)
        if cluster not in queues:
            queues[cluster] = [int(i) for i in by_typicality(points, members[cluster]) if i < len(ordered)]
        image = queues[cluster].pop(0)
        if queues[cluster]:
            heapq.heappush(heap, (n_taken + 1, minus_size, cluster))
        reason = _reason(-minus_size, n_taken)
        chosen.append(Selection(ordered[image].image_id, len(chosen) + 1, False, reason))
    return chosen


def by_typicality(points: npt.NDArray[np.float64], members: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The members of a cluster, the most typical first; equally typical ones in the order given.

    Of more than `MOST_COMPARED` members an evenly spaced sample is compared among itself; the others follow as given.

    Args:
        points: (N, D).
        members: (M,) places of the cluster's points, M >= 1.
    """
    every = -(-len(members) // MOST_COMPARED)
    compared = members[::every]
    n = min(NEIGHBOURS, len(compared) // 2)
    if n == 0:
        return members
    own = points[compared]
    distances, _ = NearestNeighbors(n_neighbors=n + 1, algorithm="brute").fit(own).kneighbors(own)
    falling = compared[np.argsort(distances[:, 1:].mean(axis=1), kind="stable")]
    return np.concatenate([falling, np.delete(members, np.s_[::every])])


def _reason(size: int, n_taken: int) -> str:
    if size == 1:
        return "looks like no other image, open or labelled" if n_taken == 0 else "looks like one that is labelled"
    known = "none is" if n_taken == 0 else "one is" if n_taken == 1 else f"{n_taken} are"
    place = "the most typical" if n_taken == 0 else "a typical one"
    return f"{place} of {size} images that look alike, of which {known} labelled or chosen yet"
