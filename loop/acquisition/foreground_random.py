"""Images drawn at random, two thirds of them where there is much to label: the baseline that is hard to beat."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates
from loop.types import Candidate, FloatArray, Selection

SHARE = 0.66
"""Chance that an image is drawn by its foreground."""


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images, each by chance; see `loop.acquisition.base.Acquisition`. `labelled` is checked, no more.

    For each place of the batch a coin decides: with chance 0.66 the image is drawn from those left with a chance
    proportional to its predicted foreground (uniformly where that is 0 for all left), else uniformly. Costs
    O(N log N): two shuffles, one of them weighted, are walked side by side, which draws with the same chances.

    Source: the foreground-aware random strategy of nnActive (Lüth et al. 2025, arXiv 2511.19183), in the variant in
    which two thirds of the draws are of foreground; the weighted shuffle is that of Efraimidis and Spirakis 2006.
    Differs: nnActive draws patches of 3D images: it goes through the images in turn and puts a patch around a voxel
    of a class, or of a class's border, drawn from the true labels. Here whole images are drawn, there is one class,
    and the foreground is what the model predicts, for in use nobody knows the true one.
    """
    ordered = check_candidates(candidates, k, labelled)
    foreground = np.array([c.foreground for c in ordered], dtype=np.float64)
    piles = (_weighted_shuffle(foreground, rng), rng.permutation(len(ordered)))
    tops = [0, 0]
    taken = np.zeros(len(ordered), np.bool_)
    chosen: list[Selection] = []
    while len(chosen) < min(k, len(ordered)):
        pile = 0 if rng.random() < SHARE else 1
        while taken[piles[pile][tops[pile]]]:
            tops[pile] += 1
        image = int(piles[pile][tops[pile]])
        taken[image] = True
        reason = _reason(foreground, image, by_foreground=pile == 0)
        chosen.append(Selection(ordered[image].image_id, len(chosen) + 1, False, reason))
    return chosen


def _weighted_shuffle(weights: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """All places in the order of draws without replacement by weight; weight 0 comes last, uniformly."""
    waits = rng.exponential(size=len(weights))
    positive = weights > 0
    arrivals = np.divide(waits, weights, out=waits.copy(), where=positive)
    return np.asarray(np.lexsort((arrivals, ~positive)), dtype=np.intp)


def _reason(foreground: npt.NDArray[np.float64], image: int, *, by_foreground: bool) -> str:
    n = len(foreground)
    if not by_foreground:
        return f"drawn at random from {n} open images"
    if foreground[image] == 0:
        return f"drawn at random from {n} open images; the model sees no cells here"
    return (
        f"drawn at random from {n} open images, the more likely the more cells are seen: "
        f"{foreground[image]:.0%} of this frame"
    )
