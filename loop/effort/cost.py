"""Seconds that a person needs for an image, from what is kept, edited, deleted and added in it; learnt from few images.

Before anything was measured the costs are those of EffortConfig. They are this project's assumptions for polygons in
Label Studio, not measurements. What is published lies on both sides: drawing nuclei by hand took about 8.4 s each
(6,409 nuclei in about 15 hours: Englbrecht, Ruider and Bausch 2021, PLoS ONE 16(4):e0250093, figure 3), a polygon of an
everyday object about 80 s (COCO, as Papadopoulos, Weber and Torralba report, ICCV 2021) and a third of that where a
model helps (Benenson, Popov and Ferrari, CVPR 2019). No figure for keeping or deleting a predicted cell was found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from loop.config import EffortConfig
from loop.effort.edits import Edits
from loop.errors import InputError, NonFiniteError
from loop.metrics.matching import Float64Array

SMALLEST_S = 0.1
"""A prior of 0 s is pulled towards as if it were this, and no image is expected to take less."""

_HUBER = 1.345  # residuals beyond so many deviations lose weight; 95 % efficient where errors are normal
_SPREAD = (0.05, 0.5)  # the deviation of a relative residual is taken to lie in here
_ROUNDS = 50


class Observation(NamedTuple):
    """What a person did to one image, and the seconds (> 0) that it took; `image_id` is for errors only."""

    edits: Edits
    seconds: float
    image_id: str = ""


@dataclass(frozen=True)
class CostModel:
    """Seconds for an image as such and for each action in it, >= 0; `images` = how many were learnt from."""

    image_s: float
    keep_s: float
    edit_s: float
    delete_s: float
    add_s: float
    images: int = 0

    @classmethod
    def prior(cls, config: EffortConfig) -> "CostModel":
        """The costs before anything was measured."""
        return cls(config.image_s, config.keep_s, config.edit_s, config.delete_s, config.add_s)

    def seconds(self, edits: Edits) -> float:
        """Seconds that an image with such edits takes."""
        kept, edited, deleted, added = edits
        return self.image_s + self.keep_s * kept + self.edit_s * edited + self.delete_s * deleted + self.add_s * added


def fit_cost(observations: Sequence[Observation], prior: EffortConfig) -> CostModel:
    """Costs learnt from measured images: robust, never negative, pulled towards the prior while images are few.

    Minimised over costs c >= 0, with x the counts of an image (1 for the image itself) and t its seconds:

        sum over images of huber((t - x c) / (x c')) + prior_images / 25 * sum over costs of (c / prior - 1)^2

    c' is the costs of the step before, so that errors are relative: a minute too many counts in a quick image and not
    in a long one. The pull is that of `prior_images` images in each of which each of the five costs makes up a fifth
    of the time. An action that was never seen keeps its prior.

    Huber's loss bounds what a lunch break does: beyond 1.345 deviations an image pulls no harder. The deviation is
    estimated (median), but taken to lie in 0.05..0.5, also where three images say otherwise. Steps are repeated until
    no cost moves by more than 1e-6 of the largest prior, at most 50 times; each costs O(images).

    Args:
        observations: in any order; none gives the prior.
        prior: costs before anything was measured, and what they weigh.

    Raises:
        NonFiniteError: seconds or a count are NaN or infinite; names the image.
        InputError: seconds are not above 0, or a count is negative; names the image.
    """
    for number, observation in enumerate(observations):
        _check(observation, number)
    start = CostModel.prior(prior)
    if not observations:
        return start
    counts = np.array([(1.0, *observation.edits) for observation in observations])
    seconds = np.array([observation.seconds for observation in observations])
    before = np.array([start.image_s, start.keep_s, start.edit_s, start.delete_s, start.add_s])
    scale = np.maximum(before, SMALLEST_S)
    pull = math.sqrt(prior.prior_images) / 5 / scale
    costs = before
    for _ in range(_ROUNDS):
        expected = np.maximum(counts @ costs, SMALLEST_S)
        weights = np.sqrt(_huber_weights((seconds - expected) / expected)) / expected
        rows = np.concatenate([counts * weights[:, None], np.diag(pull)])
        found, _ = nnls(rows, np.concatenate([seconds * weights, before * pull]))
        moved = np.abs(found - costs).max() / scale.max()
        costs = found
        if moved < 1e-6:
            break
    image_s, keep_s, edit_s, delete_s, add_s = costs.tolist()
    return CostModel(image_s, keep_s, edit_s, delete_s, add_s, len(observations))


def _huber_weights(residuals: Float64Array) -> Float64Array:
    away = np.abs(residuals)
    spread = min(max(1.4826 * float(np.median(away)), _SPREAD[0]), _SPREAD[1])
    weights: Float64Array = np.minimum(1.0, _HUBER * spread / np.maximum(away, 1e-12))
    return weights


def _check(observation: Observation, number: int) -> None:
    name = f"image {observation.image_id!r}" if observation.image_id else f"observation {number}"
    values = (observation.seconds, *observation.edits)
    if not all(math.isfinite(value) for value in values):
        raise NonFiniteError(
            f"{name}: {observation.seconds} seconds for {observation.edits}; expected finite numbers: leave it out"
        )
    if observation.seconds <= 0 or min(observation.edits) < 0:
        raise InputError(
            f"{name}: {observation.seconds} seconds for {observation.edits}; expected seconds above 0 and counts of at "
            "least 0: leave out what was not measured"
        )
