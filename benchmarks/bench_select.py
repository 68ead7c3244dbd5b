"""Choosing images from pools of 10,000 to 1,000,000: seconds, memory, and how good the choice is beside the plain rule.

The pool: N x 128 float32 in 300 clusters of very unequal size, a tenth of it exact copies and a tenth near copies of
other rows, each cluster with its own level of uncertainty. Each size runs in a process of its own, which reports the
most memory it ever held (resident; some 370 MB of it are libraries) and what the pool itself takes of that. At 10,000,
30,000 and 1,000,000 the plain rule (every distance for every choice) is run too: same rows or not, the ratio of summed
uncertainty and of the covering radius (the farthest that an image is from a chosen one) to the plain rule's, and the
same for random choices. `hard`: points on a sphere, without clusters and all equally uncertain, where putting
distances off helps least.
"""

import multiprocessing
import resource
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import report

from loop.acquisition.large import select_large

WIDTH = 128
CLUSTERS = 300
SIZES = (10_000, 100_000, 1_000_000)
EXACT_SIZES = (10_000, 30_000, 1_000_000)
CHOICES = (100, 1000)
EXACT_CHOICES = 100
HARD_CHOICES = 1000
MB = 2**20
CHUNK = 50_000

Points = npt.NDArray[np.float32]


def pool(n: int, seed: int = 0) -> tuple[Points, npt.NDArray[np.float64]]:
    """(N, 128) float32 in clusters with copies, and (N,) uncertainties."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(CLUSTERS, n, p=rng.dirichlet(np.full(CLUSTERS, 0.3)))
    middles = rng.normal(0, 1, (CLUSTERS, WIDTH)).astype(np.float32)
    points = np.empty((n, WIDTH), np.float32)
    for start in range(0, n, CHUNK):
        block = kind[start : start + CHUNK]
        points[start : start + CHUNK] = middles[block]
        points[start : start + CHUNK] += rng.standard_normal((len(block), WIDTH), np.float32) * 0.3
    order = rng.permutation(n)
    exact, near = order[: n // 10], order[n // 10 : n // 5]
    for rows, noise in ((exact, 0.0), (near, 0.005)):
        for start in range(0, len(rows), CHUNK):
            own = rows[start : start + CHUNK]
            points[own] = points[rng.choice(order[n // 5 :], len(own))]
            points[own] += rng.standard_normal((len(own), WIDTH), np.float32) * np.float32(noise)
    return points, rng.beta(2, 5, CLUSTERS)[kind] * rng.random(n)


def hard_pool(n: int, seed: int = 0) -> tuple[Points, npt.NDArray[np.float64]]:
    """(N, 128) float32 on a sphere, all equally uncertain."""
    points = np.random.default_rng(seed).standard_normal((n, WIDTH), np.float32)
    for start in range(0, n, CHUNK):
        points[start : start + CHUNK] /= np.linalg.norm(points[start : start + CHUNK], axis=1, keepdims=True)
    return points, np.ones(n)


def plain(points: Points, uncertainty: npt.NDArray[np.float64], k: int) -> list[int]:
    """The rule as it reads: after each choice the distance of every row to it, in float64."""
    own = points.astype(np.float64)
    own -= own.mean(axis=0)
    own /= own.std(axis=0)
    lengths = np.einsum("nd,nd->n", own, own)
    rows = [int(np.argmax(uncertainty))]
    squares = np.full(len(own), np.inf)
    while len(rows) < k:
        to_last = lengths - 2 * (own @ own[rows[-1]]) + lengths[rows[-1]]
        squares = np.minimum(squares, np.maximum(to_last, 0))
        value = uncertainty * np.sqrt(squares)
        value[rows] = -np.inf
        rows.append(int(np.argmax(value)))
    return rows


def radius(points: Points, rows: npt.NDArray[np.int64]) -> float:
    """The farthest that any row is from the nearest chosen one, in standardised embeddings."""
    own = (points - points.mean(axis=0)) / points.std(axis=0)
    lengths = np.einsum("nd,nd->n", own, own)
    farthest = 0.0
    for start in range(0, len(own), 4096):
        block = slice(start, start + 4096)
        squares = lengths[block, None] - 2 * own[block] @ own[rows].T + lengths[rows]
        farthest = max(farthest, float(np.sqrt(np.maximum(squares.min(axis=1), 0).max())))
    return farthest


def measure(kind: str, n: int, k: int) -> dict[str, Any]:
    """Seconds of one choice and the memory of this process, which must be a fresh one."""
    points, uncertainty = (hard_pool if kind == "hard" else pool)(n)
    held = points.nbytes + uncertainty.nbytes
    start = time.perf_counter()
    select_large(points, uncertainty, k)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "kind": kind,
        "n": n,
        "k": k,
        "s": round(seconds, 2),
        "peak_mb": round(peak / MB),
        "pool_mb": round(held / MB),
    }


def quality(n: int, k: int) -> dict[str, Any]:
    """How the choice stands beside the plain rule's and beside random ones."""
    points, uncertainty = pool(n)
    ours = select_large(points, uncertainty, k).rows
    start = time.perf_counter()
    exact = np.array(plain(points, uncertainty, k))
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(1)
    drawn = [rng.permutation(n)[:k] for _ in range(5)]
    best, wide = float(uncertainty[exact].sum()), radius(points, exact)
    return {
        "n": n,
        "k": k,
        "plain_s": round(seconds, 2),
        "same_rows": bool(np.array_equal(ours, exact)),
        "uncertainty_ratio": round(float(uncertainty[ours].sum()) / best, 4),
        "radius_ratio": round(radius(points, ours) / wide, 4),
        "random_uncertainty_ratio": round(float(np.mean([uncertainty[rows].sum() for rows in drawn])) / best, 4),
        "random_radius_ratio": round(float(np.mean([radius(points, rows) for rows in drawn])) / wide, 4),
    }


def main() -> None:
    """One line for each size and number of choices, then one for each size of which the plain answer is known."""
    runs = [("clusters", n, k) for n in SIZES for k in CHOICES] + [("hard", n, HARD_CHOICES) for n in SIZES]
    context = multiprocessing.get_context("spawn")
    for run in runs:
        with context.Pool(1) as workers:
            report("select", **workers.apply(measure, run))
    for n in EXACT_SIZES:
        report("select_quality", **quality(n, EXACT_CHOICES))


if __name__ == "__main__":
    main()
