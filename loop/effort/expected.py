"""What a person is expected to do to a prediction and how long that takes, learnt from what became of earlier ones."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from loop.effort.cost import SMALLEST_S, CostModel
from loop.effort.edits import Edits, Outcome
from loop.errors import NonFiniteError
from loop.metrics.matching import Float64Array, Int64Array
from loop.types import FloatArray, Instances

_EDGES = (0.5, 0.7, 0.85, 0.95)
_KEPT = (0.25, 0.45, 0.6, 0.75, 0.85)
_EDITED = (0.25, 0.3, 0.25, 0.15, 0.1)
_ADDED_PER_CELL, _ADDED_PER_IMAGE = 0.1, 1.0
_PRIOR_CELLS = 20.0  # what the figures above weigh in each bin
_PRIOR_IMAGES = 10.0  # what those of added cells weigh, in images of _TYPICAL cells
_TYPICAL = 10.0
_CELLS_AN_IMAGE = 10.0  # cells of one image resemble one another: in a bin they weigh no more than so many


@dataclass(frozen=True)
class Rates:
    """Chances of what becomes of an offered cell by its score, and how many cells are missing from a prediction.

    Attributes:
        edges: B - 1 scores, ascending, that part B bins; a score on an edge belongs to the bin above.
        kept: B chances in [0, 1] that a cell is kept as it is, lowest scores first.
        edited: B chances that it is edited; it is deleted otherwise.
        added_per_cell: cells added for each offered one, >= 0.
        added_per_image: cells added in an image as such, >= 0.
        images: how many were learnt from.
    """

    edges: tuple[float, ...]
    kept: tuple[float, ...]
    edited: tuple[float, ...]
    added_per_cell: float
    added_per_image: float
    images: int = 0

    @classmethod
    def prior(cls) -> "Rates":
        """The rates before anything was seen: assumptions of this project, not measurements."""
        return cls(_EDGES, _KEPT, _EDITED, _ADDED_PER_CELL, _ADDED_PER_IMAGE)


def learn_rates(outcomes: Iterable[Outcome]) -> Rates:
    """The rates of earlier images, pulled towards the prior while they are few.

    In a bin the prior weighs 20 cells and one image at most 10, however many it has there. Added cells are a line over
    the number of offered ones, fitted with both coefficients >= 0 and a variance that grows with the mean (as counts
    have); its prior weighs ten images of ten cells.

    Args:
        outcomes: one for each image that was shown with a prediction, which may be of 0 cells; images that were drawn
            from nothing say nothing of predictions and must be left out. None gives the prior.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    prior = Rates.prior()
    weights = np.full(len(prior.kept), _PRIOR_CELLS)
    kept, edited = _PRIOR_CELLS * np.array(prior.kept), _PRIOR_CELLS * np.array(prior.edited)
    offered, added = [], []
    for outcome in outcomes:
        bins = _bins(outcome.scores, prior, "an earlier prediction")
        here = np.bincount(bins, minlength=len(weights))
        factor = np.minimum(1.0, _CELLS_AN_IMAGE / np.maximum(here, 1))
        weights += factor * here
        kept += factor * np.bincount(bins[outcome.kept], minlength=len(weights))
        edited += factor * np.bincount(bins[outcome.edited], minlength=len(weights))
        offered.append(len(bins))
        added.append(int(outcome.added.sum()))
    if not offered:
        return prior
    per_image, per_cell = _added(np.array(offered, np.float64), np.array(added, np.float64))
    return Rates(
        prior.edges,
        tuple((kept / weights).tolist()),
        tuple((edited / weights).tolist()),
        per_cell,
        per_image,
        len(added),
    )


def expected_edits(instances: Instances, rates: Rates) -> Edits:
    """What a person is expected to do to a prediction of N cells; with N = 0 only cells of the image as such are added.

    kept + edited + deleted = N.

    Raises:
        NonFiniteError: a score is NaN or infinite; names the image.
    """
    bins = _bins(instances.scores, rates, f"image {instances.image_id!r}")
    kept, edited = float(np.array(rates.kept)[bins].sum()), float(np.array(rates.edited)[bins].sum())
    added = rates.added_per_image + rates.added_per_cell * len(bins)
    return Edits(kept, edited, max(len(bins) - kept - edited, 0.0), added)


def expected_seconds(instances: Instances, cost: CostModel, rates: Rates) -> float:
    """Seconds that a person is expected to need to correct a prediction, at least 0.1.

    Never 0, which would say that the time is not known (`Candidate.seconds`), where an image without cells has learnt
    costs of 0.

    Raises:
        NonFiniteError: a score is NaN or infinite; names the image.
    """
    return max(cost.seconds(expected_edits(instances, rates)), SMALLEST_S)


def _bins(scores: FloatArray, rates: Rates, name: str) -> Int64Array:
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"{name} has a score of {scores[~np.isfinite(scores)][0]}; expected numbers in 0..1")
    return np.searchsorted(np.asarray(rates.edges, np.float32), scores, side="right").astype(np.int64)


def _added(offered: Float64Array, added: Float64Array) -> tuple[float, float]:
    """Added cells of an image as such, and for each offered cell."""
    before = np.array([_ADDED_PER_IMAGE, _ADDED_PER_CELL])
    typical = np.array([1.0, _TYPICAL])
    pull = np.sqrt(_PRIOR_IMAGES / (typical @ before)) * typical
    counts = np.stack([np.ones_like(offered), offered], axis=1)
    found = before
    for _ in range(5):  # the variance is that of the step before; it settles at once
        weights = 1 / np.sqrt(np.maximum(counts @ found, 0.1))
        rows = np.concatenate([counts * weights[:, None], np.diag(pull)])
        found, _ = nnls(rows, np.concatenate([added * weights, before * pull]))
    return float(found[0]), float(found[1])
