"""Uncertain images with some luck in it, most of them spread over the kinds of image there are."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, embedded, standing
from loop.acquisition.clusters import k_means
from loop.acquisition.top_k import measured
from loop.types import Candidate, FloatArray, Selection

SHARE = 0.66
"""Share of the batch that is spread over the kinds of image."""

MOST_KINDS = 10
LEAST_BETA, MOST_BETA = 1.0, 100.0


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images by noised entropy; see `loop.acquisition.base.Acquisition`.

    The score of an image is `power_noised` of its mean entropy, with `beta`. int(0.66 k) images are taken kind by
    kind, in turns: the best of each kind by falling score, then the second best of each, and so on; a kind that is
    used up is left out. Kinds are clusters of the standardised embeddings: as many as images are taken from them, at
    most 10. The rest of the batch are the best of all that is left.

    Raises:
        InputError: as `Acquisition`; a candidate lacks the measure "entropy".

    Source: ClaSP PE (Lüth et al. 2026, arXiv 2601.13677): two thirds of the budget by class, log-scores with Gumbel
    noise whose beta grows exponentially from 1 to 100. Differs: cells are one class, so kinds of image (clusters)
    stand in for classes; whole images instead of 3D patches, so one entropy an image and not one a class; beta
    follows the number of labelled images, since the loop does not know how many rounds there will be; places that do
    not divide evenly go to the kinds with the best scores, not to random ones.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    entropy = measured(ordered, "entropy")
    k = min(k, len(ordered))
    score = power_noised(entropy, beta(len(labelled), len(ordered)), rng)
    n_spread = int(SHARE * k)
    embeddings, _ = embedded(ordered)
    kinds, _ = k_means(embeddings, min(MOST_KINDS, max(n_spread, 1)), rng)
    spread = in_turns(score, kinds)[:n_spread]
    rest = np.setdiff1d(np.arange(len(ordered)), spread)
    rest = rest[np.argsort(-score[rest], kind="stable")]
    chosen = []
    for rank, i in enumerate([*spread, *rest[: k - n_spread]], start=1):
        reason = f"{standing(entropy, int(i), 'more uncertain')} (entropy {entropy[i]:.3g}), with some luck"
        if rank <= n_spread:
            reason += f"; it stands for {int(np.sum(kinds == kinds[i]))} open images that look like it"
        chosen.append(Selection(ordered[int(i)].image_id, rank, False, reason))
    return chosen


def beta(n_labelled: int, n_open: int) -> float:
    """How much the score counts against luck: 100^t, from 1 (nothing labelled) to 100 (nothing left open).

    t = log(1 + n_labelled) / log(1 + n_labelled + n_open), in [0, 1]: the logarithm because rounds that follow each
    other add ever smaller shares to what is labelled, as the exponential schedule of the source does by rounds.
    """
    total = np.log1p(n_labelled + n_open)
    t = np.log1p(n_labelled) / total if total > 0 else 0.0
    return float(LEAST_BETA * (MOST_BETA / LEAST_BETA) ** t)


def power_noised(scores: npt.NDArray[np.float64], power: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Power x log(score) + Gumbel(0, 1) noise, (N,): the k highest are k draws by chance proportional to score^power.

    Scores of 0 come after all others, in random order.

    Source: Kirsch et al. 2021, A simple baseline for batch active learning with stochastic acquisition functions
    (arXiv 2106.12059): power acquisition. Differs: all times the power, which leaves the order as it is.
    """
    noise: npt.NDArray[np.float64] = rng.gumbel(size=len(scores))
    noise += power * np.log(np.maximum(scores, 1e-300))
    return noise


def in_turns(scores: npt.NDArray[np.float64], kinds: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """All places, by turns through the kinds: the best of each kind by falling score, then the second best of each."""
    falling = np.argsort(-scores, kind="stable")
    turn = np.empty(len(scores), np.intp)
    seen = np.zeros(int(kinds.max()) + 1, np.intp)
    for i in falling:
        turn[i] = seen[kinds[i]]
        seen[kinds[i]] += 1
    return np.asarray(falling[np.argsort(turn[falling], kind="stable")], dtype=np.intp)
