"""Images drawn uniformly at random: the baseline that every other way has to beat."""

from collections.abc import Sequence

import numpy as np

from loop.acquisition.base import check_candidates
from loop.types import Candidate, FloatArray, Selection


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images in random order; see `loop.acquisition.base.Acquisition`. `labelled` is checked, no more."""
    ordered = check_candidates(candidates, k, labelled)
    drawn = rng.permutation(len(ordered))[:k]
    reason = f"drawn at random from {len(ordered)} open images"
    return [Selection(ordered[int(i)].image_id, rank, False, reason) for rank, i in enumerate(drawn, start=1)]
