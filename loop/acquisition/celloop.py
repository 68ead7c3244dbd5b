"""The default: every kind of image gets its share, within a kind the fuller and later the more uncertain images."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, embedded, standing
from loop.acquisition.clusters import k_means
from loop.acquisition.per_minute import UNKNOWN, minutes
from loop.acquisition.spaced import families_of
from loop.types import Candidate, FloatArray, Selection

Float64Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

KINDS = 10
"""Kinds of image, at most."""

BY_WEIGHT = 0.66
"""Chance that an image is drawn by its weight; else each of its kind has the same."""

UNTRUSTED, TRUSTED = 50, 200
"""Up to so many labelled images uncertainty has no say, from so many on its full say."""

POWER, COST = 4.0, 0.5
"""How strongly the rank by uncertainty weighs, and the expected minutes, once uncertainty has its full say."""


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images, kind by kind by need and by chance within; see `loop.acquisition.base.Acquisition`.

    Open and labelled images together fall into at most ten kinds (k-means of the standardised embeddings). One image
    after the other comes from the kind that has the least of what it should have, of those with open images: its
    labelled and chosen images over the square root of its size, so that a rare kind gets more than its share; equals by
    chance. Within the kind near-duplicates of what is chosen wait until there is nothing else. Of the rest an image is
    drawn by weight with chance 0.66 and any with the same chance otherwise. The weight is f^(1 - t) x (r^4 / m^0.5)^t:
    f its predicted foreground, r the share of the open images that are no more uncertain, m its expected minutes (1
    where no image's time is known). t rises from 0 with 50 labelled images to 1 with 200: a model that has seen
    little is unsure in the wrong places. With one kind and few labels this is `foreground_random` without doubles.

    Raises:
        InputError: as `Acquisition`; the time is known for some images only.

    Source: strata with a share by the square root of their size are the power allocation of Bankier 1988; drawing by
    foreground as nnActive (Lüth et al. 2025); stratified, noised uncertainty as ClaSP PE (Lüth et al. 2026); diversity
    early and uncertainty late as Ash et al. 2020 found; utility over cost as Settles et al. 2008. Differs: one rule in
    place of them all, with kinds of image as strata.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    trusted, time = trust(len(labelled)), minutes(ordered)
    weight = _weights(ordered, trusted, time)
    kinds, _ = k_means(np.concatenate(embedded(ordered, labelled)), KINDS, rng)
    pool = _Pool(kinds, len(ordered), families_of(ordered, rng))
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    chosen: list[Selection] = []
    while len(chosen) < min(k, len(ordered)):
        kind = pool.neediest(rng)
        reason = pool.reason(kind)
        place = pool.draw(kind, weight, rng)
        if trusted > 0:
            reason += f"; {standing(uncertainty, place, 'more uncertain')}{'' if time is not None else f'; {UNKNOWN}'}"
        chosen.append(Selection(ordered[place].image_id, len(chosen) + 1, False, reason))
    return chosen


def trust(n_labelled: int) -> float:
    """How much uncertainty counts with so many labelled images, in [0, 1]."""
    return float(np.clip((n_labelled - UNTRUSTED) / (TRUSTED - UNTRUSTED), 0, 1))


def _weights(ordered: Sequence[Candidate], trusted: float, time: Float64Array | None) -> Float64Array:
    """(N,) >= 0, how likely each image is drawn within its kind."""
    foreground = np.array([c.foreground for c in ordered], dtype=np.float64)
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    rank = np.searchsorted(np.sort(uncertainty), uncertainty, side="right") / len(uncertainty)
    gain = rank**POWER / (1.0 if time is None else time**COST)
    weights: Float64Array = foreground ** (1 - trusted) * gain**trusted
    return weights


class _Pool:
    """Open images with their kinds and families, and what is labelled or chosen of each kind."""

    def __init__(self, kinds: Places, n_open: int, family: Places) -> None:
        self._kinds = kinds[:n_open]
        self._sizes = np.bincount(kinds)
        self._taken = np.bincount(kinds[n_open:], minlength=len(self._sizes))
        self._left = np.bincount(self._kinds, minlength=len(self._sizes))
        self._members = [np.flatnonzero(self._kinds == kind) for kind in range(len(self._sizes))]
        self._open = np.ones(n_open, np.bool_)
        self._family = family
        self._seen = np.zeros(int(family.max()) + 1, np.intp)

    def neediest(self, rng: np.random.Generator) -> int:
        """The kind with open images that has the fewest taken over the square root of its size."""
        need = np.where(self._left > 0, self._taken / np.sqrt(self._sizes), np.inf)
        return int(rng.choice(np.flatnonzero(need == need.min())))

    def draw(self, kind: int, weight: Float64Array, rng: np.random.Generator) -> int:
        """The place of an open image of the kind, which is taken now."""
        members = self._members[kind]
        members = members[self._open[members]]
        turns = self._seen[self._family[members]]
        fresh = members[turns == turns.min()]
        chance = weight[fresh] if rng.random() < BY_WEIGHT and weight[fresh].sum() > 0 else np.ones(len(fresh))
        place = int(rng.choice(fresh, p=chance / chance.sum()))
        self._open[place] = False
        self._seen[self._family[place]] += 1
        self._taken[kind] += 1
        self._left[kind] -= 1
        return place

    def reason(self, kind: int) -> str:
        """Why an image of this kind is next."""
        alike, taken = int(self._sizes[kind]), int(self._taken[kind])
        known = "none is" if taken == 0 else "one is" if taken == 1 else f"{taken} are"
        return f"one of {alike} images that look alike, of which {known} labelled or chosen yet"
