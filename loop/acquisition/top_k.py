"""The images with the highest uncertainty of one kind, whatever they look like."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import Acquisition, check_candidates, standing
from loop.errors import InputError
from loop.types import Candidate, FloatArray, Selection

WORDS = {
    "entropy": "more uncertain, averaged over the frame,",
    "margin": "more often torn between cell and background",
    "bald": "more changeable from look to look, pixel by pixel,",
    "disagreement": "more changeable from look to look, cell by cell,",
}
"""What a measure says, in words of comparison."""

SEVERAL_LOOKS = ("bald", "disagreement")


def by(measure: str) -> Acquisition:
    """The strategy that takes the images with the highest `measure`; ties go by image id. Nothing is random.

    Args:
        measure: a key of `Candidate.measures`.

    Returns:
        See `loop.acquisition.base.Acquisition`. It raises an InputError where a candidate lacks the measure.

    Source: entropy and margin: Settles 2009, Active learning literature survey; bald: Houlsby et al. 2011 and Gal et
    al. 2017; disagreement: Morrison et al. 2019, as MaskAL (Blok et al. 2022) uses it.
    """

    def select(
        candidates: Sequence[Candidate],
        k: int,
        rng: np.random.Generator,
        *,
        labelled: Sequence[FloatArray] = (),
    ) -> list[Selection]:
        ordered = check_candidates(candidates, k, labelled)
        values = measured(ordered, measure)
        more = WORDS.get(measure, f"higher in {measure}")
        return [
            Selection(ordered[i].image_id, rank, False, f"{standing(values, i, more)} ({measure} {values[i]:.3g})")
            for rank, i in enumerate(highest(values, k), start=1)
        ]

    return select


def measured(ordered: Sequence[Candidate], measure: str) -> npt.NDArray[np.float64]:
    """(N,) values of a measure of the candidates.

    Raises:
        InputError: some candidates lack it; the text names up to three and says what to do.
    """
    lacking = [c.image_id for c in ordered if measure not in c.measures]
    if lacking:
        named = ", ".join(repr(image_id) for image_id in lacking[:3])
        cure = (
            "set select.passes: turns (or dropout), so that each image is looked at several times"
            if measure in SEVERAL_LOOKS
            else "predict them again"
        )
        raise InputError(
            f"{len(lacking)} of {len(ordered)} open images have no measure {measure!r}, among them {named}; {cure}"
        )
    return np.array([c.measures[measure] for c in ordered], dtype=np.float64)


def highest(values: npt.NDArray[np.float64], k: int) -> list[int]:
    """Places of the min(k, N) highest values, falling; equal ones in the order given."""
    return [int(i) for i in np.argsort(-values, kind="stable")[:k]]
