"""Images that between them have a near relative of as many others as possible: for a start without a model."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import blocks, check_candidates, embedded, squared_distances
from loop.acquisition.clusters import k_means
from loop.acquisition.core_set import k_centre
from loop.types import Candidate, FloatArray, Selection

PURITY = 0.95
KINDS = 10
SAMPLE = 2000

Points = npt.NDArray[np.float64]


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images that cover the most others; see `loop.acquisition.base.Acquisition`.

    An image covers those within `pure_radius` of it in standardised embeddings; what labelled images cover counts as
    covered. One after the other comes the image that covers the most images not covered yet; when all are covered,
    the farthest from all that is labelled or chosen. Uncertainty is not looked at. Costs about 2 N^2 distances.

    Source: ProbCover (Yehuda et al. 2022, arXiv 2205.11320), algorithm 1. Differs: the best image
    and not one of the five best by chance, as in the source's experiments; the farthest when all is covered, a case
    that the source leaves open; the radius, see `pure_radius`.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    k = min(k, len(ordered))
    points, known = embedded(ordered, labelled)
    order, gains = greedy_cover(points, known, pure_radius(points, rng), k)
    n = len(ordered)
    chosen = [
        Selection(ordered[i].image_id, rank, False, _reason(gain, n))
        for rank, (i, gain) in enumerate(zip(order, gains, strict=True), start=1)
    ]
    left = np.setdiff1d(np.arange(n), order)
    centres = np.concatenate([known, points[order]]).astype(np.float32)
    if len(chosen) < k:
        for i in left[k_centre(points[left].astype(np.float32), centres, k - len(chosen))]:
            reason = "everything has a labelled or chosen relative by now; of the rest this is the farthest from them"
            chosen.append(Selection(ordered[int(i)].image_id, len(chosen) + 1, False, reason))
    return chosen


def pure_radius(points: Points, rng: np.random.Generator) -> float:
    """The largest radius at which 95 % of balls around points hold only points of the centre's kind.

    Kinds are k-means clusters, 10 or half as many as there are points. A ball is pure up to the distance of the nearest
    point of another kind, so the radius is the 5 % quantile of these distances, taken over at most 2000 points drawn
    by chance. Infinite where all points are of one kind.

    Source: Yehuda et al. 2022, the estimate of delta: the same purity. Differs: 10 clusters, since the number of
    classes that the source takes says nothing about kinds of image; a quantile instead of a search over radii.
    """
    kinds, _ = k_means(points, max(1, min(KINDS, len(points) // 2)), rng)
    if kinds.max() == 0:
        return float(np.inf)
    sample = rng.permutation(len(points))[:SAMPLE]
    nearest = [
        np.where(kinds == kinds[block][:, None], np.inf, squared_distances(points[block], points)).min(axis=1)
        for block in blocks(sample, len(points))
    ]
    return float(np.sqrt(np.quantile(np.concatenate(nearest), 1 - PURITY, method="lower")))


def greedy_cover(points: Points, known: Points, radius: float, k: int) -> tuple[list[int], list[int]]:
    """Places of at most k points, each of which covers the most points left, and how many it newly covers.

    Stops when all are covered. Equal gains go by place. Nothing but N numbers is kept: the gains fall by each newly
    covered point's neighbours, and a point becomes covered once, so all in all every distance is computed twice.

    Args:
        points: (N, D).
        known: (M, D): what lies nearer than `radius` to them is covered from the start.
        radius: >= 0, inf = everything.
        k: >= 0.
    """
    covered = np.zeros(len(points), np.bool_)
    for block in blocks(np.arange(len(known)), len(points)):
        covered |= _near(known[block], points, radius).any(axis=0)
    gains = np.zeros(len(points), np.int64)
    for block in blocks(np.flatnonzero(~covered), len(points)):
        gains += _near(points[block], points, radius).sum(axis=0)
    order: list[int] = []
    got: list[int] = []
    while len(order) < k and not covered.all():
        best = int(np.argmax(gains))
        new = np.flatnonzero(_near(points[best : best + 1], points, radius)[0] & ~covered)
        order.append(best)
        got.append(len(new))
        covered[new] = True
        for block in blocks(new, len(points)):
            gains -= _near(points[block], points, radius).sum(axis=0)
    return order, got


def _near(some: Points, points: Points, radius: float) -> npt.NDArray[np.bool_]:
    """(S, N) which of the points lie nearer than the radius; a point itself and its equals always do.

    The radius is the distance of two of the points, so it is drawn in a little: rounding must not decide.
    """
    near: npt.NDArray[np.bool_] = squared_distances(some, points) <= max(radius**2 * (1 - 1e-6), 1e-9)
    return near


def _reason(gain: int, n: int) -> str:
    if gain == 1:
        return "unlike anything labelled or chosen so far, and like no other open image that still lacks a relative"
    return f"unlike anything labelled or chosen so far, and much like {gain - 1} of the other {n - 1} open images"
