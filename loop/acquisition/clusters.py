"""Groups of images that look alike: k-means on embeddings."""

import warnings

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

LARGE = 20_000
"""With more images than this k-means works on mini-batches."""


def k_means(
    points: npt.NDArray[np.float64],
    n: int,
    rng: np.random.Generator,
    weights: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """At most n clusters of the points, and never an empty one.

    Args:
        points: (N, D), N >= 1. Equal points count as one place: no more clusters than places come back.
        n: number of clusters wanted, >= 1.
        rng: seeds k-means.
        weights: (N,) > 0, how much each point counts; None = all alike.

    Returns:
        (N,) number of each point's cluster, 0 to C - 1, and (C, D) their centres.
    """
    seed = int(rng.integers(2**31))
    n = min(n, len(np.unique(points, axis=0)))
    if n == 1:
        return np.zeros(len(points), np.intp), np.average(points, axis=0, weights=weights)[None]
    if len(points) > LARGE:
        model = MiniBatchKMeans(n, n_init=3, batch_size=4096, random_state=seed)
    else:
        model = KMeans(n, n_init=4, random_state=seed)
    with warnings.catch_warnings():
        # places that differ by less than rounding end in one cluster: fewer come back, as documented
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(points, sample_weight=weights)
    used, labels = np.unique(model.labels_, return_inverse=True)
    return labels.astype(np.intp), np.asarray(model.cluster_centers_[used], dtype=np.float64)
