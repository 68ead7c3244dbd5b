"""Whatever the strategy: near-duplicates are not chosen together while there is something else to choose."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import Acquisition
from loop.acquisition.near import apart, families
from loop.types import Candidate, FloatArray, Selection

MOST_COMPARED = 5000
"""Candidates that are compared with one another: about a second. Of a larger pool the first choice and a random sample
are; what lies outside of it counts as a near-duplicate of nothing."""


def select_spaced(
    strategy: Acquisition,
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images as `strategy` wants them, one of each family of near-duplicates (loop/acquisition/near.py).

    The strategy chooses; what is of the family of an image before it is put aside, and the strategy chooses as many
    again among the families not touched yet, with the images so far as labelled ones. Where all families are touched,
    what was put aside fills the batch, each family in its turn. Ranked from 1 in this order.

    Args:
        strategy: how images are chosen.
        candidates: the images that may teach.
        k: how many, >= 0.
        rng: the only source of randomness.
        labelled: embeddings of images that have taught.

    Raises:
        As the strategy.
    """
    found = strategy(candidates, k, rng, labelled=labelled)
    if len(found) < 2 or len(found) == len(candidates):
        return found
    family = _families(candidates, {s.image_id for s in found}, rng)
    embedding = {c.image_id: c.embedding for c in candidates}
    taken: dict[int, Selection] = {}
    aside: list[Selection] = []
    while True:
        for selection in found:
            aside += [selection] if taken.setdefault(family[selection.image_id], selection) is not selection else []
        left = [c for c in candidates if family[c.image_id] not in taken]
        if len(taken) == k or not left:
            break
        seen = [*labelled, *(embedding[s.image_id] for s in taken.values())]
        found = strategy(left, k - len(taken), rng, labelled=seen)
    more = apart([s.image_id for s in aside], np.array([family[s.image_id] for s in aside], np.intp), k - len(taken))
    by_id = {s.image_id: s for s in aside}
    together = [*taken.values(), *(by_id[image_id] for image_id in more)]
    return [Selection(s.image_id, rank, s.control, s.reason) for rank, s in enumerate(together, start=1)]


def families_of(candidates: Sequence[Candidate], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """(N,) the family of near-duplicates of each candidate (loop/acquisition/near.py), before anything is chosen.

    Of more than MOST_COMPARED a random sample is compared; of the others those of one group are one family.
    """
    if not candidates:
        return np.zeros(0, np.intp)
    family = _families(candidates, set(), rng)
    groups: dict[str, int] = {}
    found = []
    for candidate in sorted(candidates, key=lambda c: family[c.image_id]):
        own = family[candidate.image_id]
        found.append((candidate.image_id, groups.setdefault(candidate.group, own) if candidate.group else own))
    number = dict(found)
    return np.unique([number[c.image_id] for c in candidates], return_inverse=True)[1].astype(np.intp)


def _families(candidates: Sequence[Candidate], chosen: set[str], rng: np.random.Generator) -> dict[str, int]:
    compared = list(candidates)
    if len(candidates) > MOST_COMPARED:
        first = [c for c in candidates if c.image_id in chosen]
        others = [c for c in candidates if c.image_id not in chosen]
        sample = rng.permutation(len(others))[: max(0, MOST_COMPARED - len(first))]
        compared = first + [others[int(i)] for i in sorted(sample)]
    known = dict(zip((c.image_id for c in compared), families(compared).tolist(), strict=True))
    alone = (c.image_id for c in candidates if c.image_id not in known)
    return known | {image_id: len(compared) + place for place, image_id in enumerate(alone)}
