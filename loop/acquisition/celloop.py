"""The default: images unlike anything labelled first, then those the model is unsure of too, by what they cost."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, standing
from loop.acquisition.large import select_large
from loop.acquisition.per_minute import UNKNOWN, minutes
from loop.acquisition.spaced import select_spaced
from loop.types import Candidate, FloatArray, Selection

COST = 0.5
"""How much expected minutes weigh: 0 = not at all, 1 = what an image brings is divided by them."""

UNTRUSTED, TRUSTED = 50, 200
"""Up to so many labelled images uncertainty has no say, from so many on its full say."""


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images by novelty, uncertainty and cost; see `loop.acquisition.base.Acquisition`.

    One image after the other has the highest d x r^t / m^0.5: d is its distance to the nearest image that is labelled
    or chosen already; r in (0, 1] the share of the open images that are no more uncertain; m its expected minutes; t
    rises from 0 with 50 labelled images to 1 with 200: a model that has seen little is unsure in the wrong places.
    Near-duplicates do not come together (`select_spaced`). Where no image's time is known the time does not count.
    Without anything labelled the first is the image of the highest r^t / m^0.5, the lowest image id among equals.
    Nothing is random but what `select_spaced` draws in pools of more than 5,000.

    The two exponents and the two bounds were fixed on validation images before a test image was looked at
    (docs/strategies.md).

    Raises:
        InputError: as `Acquisition`; the time is known for some images only.

    Source: greedy k-centre of Sener and Savarese 2018 (Core-Set) for d; the weight by uncertainty as in Yang et al.
    2017 (Suggestive Annotation); utility over cost as Settles et al. 2008. Differs: ranks in place of uncertainties,
    whose scale changes from model to model; a schedule, as diversity wins early and uncertainty late (Ash et al. 2020).
    """
    check_candidates(candidates, k, labelled)
    return select_spaced(_novel, candidates, k, rng, labelled=labelled)


def trust(n_labelled: int) -> float:
    """How much uncertainty counts with so many labelled images, in [0, 1]."""
    return float(np.clip((n_labelled - UNTRUSTED) / (TRUSTED - UNTRUSTED), 0, 1))


def _novel(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    rank = np.searchsorted(np.sort(uncertainty), uncertainty, side="right") / len(uncertainty)
    time = minutes(ordered)
    weight = rank ** trust(len(labelled)) / (1.0 if time is None else time**COST)
    chosen = select_large(np.stack([c.embedding for c in ordered]), weight, k, labelled=labelled)
    found = enumerate(zip(chosen.rows.tolist(), chosen.spread.tolist(), strict=True), start=1)
    told = partial(_reason, uncertainty, n_labelled=len(labelled), timed=time is not None)
    return [Selection(ordered[row].image_id, place, False, told(row, spread, place)) for place, (row, spread) in found]


def _reason(
    uncertainty: npt.NDArray[np.float64], row: int, spread: float, place: int, *, n_labelled: int, timed: bool
) -> str:
    known = "labelled or chosen before it"
    if place == 1 and n_labelled == 0:
        likeness = "the first of its batch"
    elif spread > 0.5:
        likeness = f"unlike anything {known}"
    else:
        likeness = f"{'somewhat unlike' if spread > 0 else 'like'} what is {known}"
    sure = f"; {standing(uncertainty, row, 'more uncertain')}" if trust(n_labelled) > 0 else ""
    return f"{likeness}{sure}{'' if timed else f'; {UNKNOWN}'}"
