"""Images that teach the most for each minute that a person spends on them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, standing
from loop.acquisition.top_k import highest
from loop.errors import InputError
from loop.types import Candidate, FloatArray, Selection

UNKNOWN = "how long the images take is not known yet"


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images by uncertainty / expected minutes; see `loop.acquisition.base.Acquisition`.

    The uncertainty stands for what an image is expected to bring. Where no image's time is known (`seconds` 0 for
    all) the uncertainty alone decides, and the reason says so. Ties go by image id. Nothing is random; `labelled` is
    checked, no more.

    Raises:
        InputError: as `Acquisition`; the time is known for some images only.

    Source: Settles et al. 2008, Active learning with real annotation costs: utility / cost.
    """
    ordered = check_candidates(candidates, k, labelled)
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    time = minutes(ordered)
    if time is None:
        return [
            Selection(ordered[i].image_id, rank, False, f"{standing(uncertainty, i, 'more uncertain')}; {UNKNOWN}")
            for rank, i in enumerate(highest(uncertainty, k), start=1)
        ]
    rate = uncertainty / time
    return [
        Selection(
            ordered[i].image_id,
            rank,
            False,
            f"{standing(rate, i, 'more to learn for each minute of work')}: "
            f"uncertainty {uncertainty[i]:.3g}, about {time[i]:.1f} minutes",
        )
        for rank, i in enumerate(highest(rate, k), start=1)
    ]


def minutes(ordered: Sequence[Candidate]) -> npt.NDArray[np.float64] | None:
    """(N,) expected minutes, > 0; None where they are not known for any image.

    Raises:
        InputError: they are known for some images only; the text names up to three without.
    """
    lacking = [c.image_id for c in ordered if c.seconds == 0]
    if len(lacking) == len(ordered):
        return None
    if lacking:
        named = ", ".join(repr(image_id) for image_id in lacking[:3])
        raise InputError(
            f"{len(lacking)} of {len(ordered)} open images have no expected time (seconds 0), among them {named}; "
            "estimate the time of all or of none"
        )
    return np.array([c.seconds for c in ordered], dtype=np.float64) / 60
