"""All uncertainties of an image by name, as strategies ask for them (`select.measure`)."""

from collections.abc import Sequence

import numpy as np

from loop.errors import ShapeError
from loop.types import FloatArray, Instances
from loop.uncertainty.aggregate import (
    cell_means,
    mean_of_top,
    mean_over_cells,
    mean_over_frame,
    sum_over_frame,
    sum_per_foreground,
)
from loop.uncertainty.agreement import agreement
from loop.uncertainty.entropy import binary_entropy
from loop.uncertainty.margin import binary_margin
from loop.uncertainty.mutual_information import mutual_information

DOUBTFUL = 0.35
"""A cell of a higher mean entropy, in nats, is doubtful: about half of ln 2."""

FROM_ONE_LOOK = (
    "entropy",
    "entropy_sum",
    "entropy_top",
    "entropy_foreground",
    "entropy_cells",
    "margin",
    "doubtful_cells",
)
FROM_SEVERAL_LOOKS = ("bald", "disagreement")
MEASURES = (*FROM_ONE_LOOK, *FROM_SEVERAL_LOOKS)


def measures_of(interior: FloatArray, instances: Instances) -> dict[str, float]:
    """What one look at an image tells of its uncertainty; each is >= 0, and higher = ask a person sooner.

    `entropy` is the mean over the frame, `entropy_sum` the sum, `entropy_top` the mean over the most uncertain 5 % of
    the pixels, `entropy_foreground` the sum over the number of pixels in cells (5 % of the frame at least),
    `entropy_cells` the mean over the cells of each cell's mean; all in nats. `margin` is the mean over the cells of
    each cell's mean margin uncertainty, in [0, 1]. `doubtful_cells` is the number of cells whose mean entropy is above
    `DOUBTFUL`.

    Args:
        interior: (H, W) float32 in [0, 1], how likely each pixel is inside a cell.
        instances: the cells found there, 0 included; `image_id` is named in errors.

    Returns:
        A number for each name of `FROM_ONE_LOOK`.

    Raises:
        ShapeError: `interior` is not of the image's size.
        NonFiniteError: `interior` holds NaN; names the image.
    """
    entropy = binary_entropy(interior)
    return {
        "entropy": mean_over_frame(entropy, instances),
        "entropy_sum": sum_over_frame(entropy, instances),
        "entropy_top": mean_of_top(entropy, instances),
        "entropy_foreground": sum_per_foreground(entropy, instances),
        "entropy_cells": mean_over_cells(entropy, instances),
        "margin": mean_over_cells(binary_margin(interior), instances),
        "doubtful_cells": float(np.count_nonzero(cell_means(entropy, instances) > DOUBTFUL)),
    }


def measures_of_looks(interiors: FloatArray, looks: Sequence[Instances]) -> dict[str, float]:
    """What several looks at an image tell of its uncertainty; each is >= 0, and higher = ask a person sooner.

    `bald` is the mean over the cells of each cell's mean mutual information, in [0, ln 2] nats; the cells are those
    that one look or more saw, with the pixels that half of these looks gave them, so that a cell that comes and goes
    counts like any other; where no look saw one it is the mean over the frame. `disagreement` is 1 minus the mean
    certainty of the same cells, in [0, 1]; 0 where there is none.

    Args:
        interiors: (M, H, W) float32 in [0, 1], M >= 1.
        looks: the cells of the M looks, in the same coordinates; `image_id` is named in errors.

    Returns:
        A number for each name of `FROM_SEVERAL_LOOKS`.

    Raises:
        InputError: no looks.
        ShapeError: M or the image's size differ.
        NonFiniteError: a probability or a score is NaN; names the image.
    """
    if len(interiors) != len(looks):
        raise ShapeError(f"{len(interiors)} maps but the cells of {len(looks)} looks; give both of each look")
    together = agreement(looks)
    return {
        "bald": mean_over_cells(mutual_information(interiors), together.cells),
        "disagreement": together.disagreement,
    }
