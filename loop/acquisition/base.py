"""What a way of choosing images is, and what all of them need."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.types import Candidate, FloatArray, Selection


class Acquisition(Protocol):
    """Chooses images for a person to label."""

    def __call__(
        self,
        candidates: Sequence[Candidate],
        k: int,
        rng: np.random.Generator,
        *,
        labelled: Sequence[FloatArray] = (),
    ) -> list[Selection]:
        """min(k, len(candidates)) distinct images, the most informative first, each with its reason.

        Args:
            candidates: the open images; their order does not matter.
            k: how many, >= 0.
            rng: the only source of randomness: the same state and candidates give the same answer.
            labelled: embeddings of the images that the model has learnt from.

        Raises:
            InputError: k is negative or an image occurs twice.
            NonFiniteError: a candidate's uncertainty or embedding is NaN or infinite; the text names the image.
            ShapeError: embeddings differ in length.
        """
        ...


def check_candidates(candidates: Sequence[Candidate], k: int) -> list[Candidate]:
    """The candidates by ascending image id.

    Raises:
        InputError, NonFiniteError, ShapeError: as `Acquisition`.
    """
    if k < 0:
        raise InputError(f"k={k}; expected 0 or more images to choose")
    ordered = sorted(candidates, key=lambda c: c.image_id)
    for before, after in pairwise(ordered):
        if before.image_id == after.image_id:
            raise InputError(f"image {after.image_id!r} is given twice; give each open image once")
    for candidate in ordered:
        if not np.isfinite(candidate.uncertainty):
            raise NonFiniteError(
                f"the uncertainty of image {candidate.image_id!r} is {candidate.uncertainty}; predict it again"
            )
        if not np.isfinite(candidate.embedding).all():
            raise NonFiniteError(
                f"the embedding of image {candidate.image_id!r} holds NaN or infinity; predict it again"
            )
        if candidate.embedding.shape != ordered[0].embedding.shape:
            raise ShapeError(
                f"the embedding of image {candidate.image_id!r} is {candidate.embedding.shape}, that of "
                f"{ordered[0].image_id!r} is {ordered[0].embedding.shape}; predict both with the same model"
            )
    return ordered


def standardised(
    embeddings: npt.NDArray[np.floating], others: Sequence[FloatArray] = ()
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Embeddings with mean 0 and standard deviation 1 in each dimension, taken over `embeddings` alone.

    Args:
        embeddings: (N, D), N >= 1. A dimension in which all are equal becomes 0 for all.
        others: M further (D,) arrays, moved and scaled alike (0 in such a dimension).

    Returns:
        (N, D) and (M, D) float64.
    """
    own = np.asarray(embeddings, dtype=np.float64)
    rest = np.asarray(others, dtype=np.float64).reshape(len(others), own.shape[1])
    centre, spread = own.mean(axis=0), own.std(axis=0)
    flat = spread <= 1e-9 * np.maximum(np.abs(centre), 1e-12)
    scale = np.where(flat, 1.0, spread)
    keep = np.where(flat, 0.0, 1.0)
    return (own - centre) / scale * keep, (rest - centre) / scale * keep
