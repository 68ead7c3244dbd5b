"""Images that would change the model much, and each in another way."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, embedded, squared_distances, standing
from loop.types import Candidate, FloatArray, Selection


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images by k-means++ on gradient embeddings; see `loop.acquisition.base.Acquisition`.

    The first has the longest gradient embedding (`gradients`); each further one is drawn with a chance proportional
    to its squared distance to the nearest one chosen; uniformly where all that is left lies on chosen ones.
    `labelled` is checked, no more. Costs N x k distances.

    Source: BADGE (Ash et al. 2020, arXiv 1906.03671), algorithm 1, with the first one as in the authors' program.
    Differs: the gradients, see there, and an image without any counts as chosen from the start, see `seeds`.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    embeddings, _ = embedded(ordered)
    order = seeds(gradients(embeddings, uncertainty), min(k, len(ordered)), rng)
    chosen = []
    for rank, i in enumerate(order, start=1):
        reason = f"{standing(uncertainty, i, 'more uncertain')} (uncertainty {uncertainty[i]:.3g})"
        if rank > 1:
            reason += ", drawn by chance among those unsure in another way than the images before it"
        chosen.append(Selection(ordered[i].image_id, rank, False, reason))
    return chosen


def gradients(embeddings: npt.NDArray[np.float64], uncertainty: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What each image would do to the last layer of the model, about: (N, D + 1).

    The gradient of the last layer of a classifier is (error x features, error), the second for its bias. For a whole
    image of a segmentation network the error is unknown and differs from pixel to pixel: its uncertainty (N,) stands
    for it, and the standardised embedding (N, D) / sqrt(D) for the features.
    """
    features = embeddings / np.sqrt(embeddings.shape[1])
    with_bias: npt.NDArray[np.float64] = np.hstack([features, np.ones((len(features), 1))])
    return with_bias * uncertainty[:, None]


def seeds(points: npt.NDArray[np.float64], k: int, rng: np.random.Generator) -> list[int]:
    """Places of k points by k-means++ without replacement, the longest first; 0 counts as a centre from the start.

    Args:
        points: (N, D).
        k: 1 to N.
        rng: draws each but the first.

    Source: Arthur and Vassilvitskii 2007, section 2.2. Differs: the centre at 0, so that points near it, images
    that would not change the model, are not drawn for being far from those that would.
    """
    nearest: npt.NDArray[np.float64] = np.einsum("ij,ij->i", points, points)
    order = [int(np.argmax(nearest))]
    left = np.ones(len(points), np.bool_)
    while len(order) < k:
        last = order[-1]
        left[last] = False
        nearest = np.where(left, np.minimum(nearest, squared_distances(points, points[last : last + 1])[:, 0]), 0)
        total = float(nearest.sum())
        order.append(int(rng.choice(len(points), p=nearest / total if total > 0 else left / left.sum())))
    return order
