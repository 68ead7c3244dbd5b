"""What a way of choosing images is, and what all of them need."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.types import Candidate, FloatArray, Selection

_Float = TypeVar("_Float", bound=np.floating)


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
            InputError: k is negative, an image occurs twice, a number is out of its range, or images lack a measure
                that this way of choosing needs; the text names the images.
            NonFiniteError: a number or the embedding of a candidate is NaN or infinite; the text names the image.
            ShapeError: embeddings differ in length.
        """
        ...


def check_candidates(candidates: Sequence[Candidate], k: int, labelled: Sequence[FloatArray] = ()) -> list[Candidate]:
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
        _check_numbers(candidate)
        if not np.isfinite(candidate.embedding).all():
            raise NonFiniteError(
                f"the embedding of image {candidate.image_id!r} holds NaN or infinity; predict it again"
            )
        if candidate.embedding.shape != ordered[0].embedding.shape:
            raise ShapeError(
                f"the embedding of image {candidate.image_id!r} is {candidate.embedding.shape}, that of "
                f"{ordered[0].image_id!r} is {ordered[0].embedding.shape}; predict both with the same model"
            )
    if ordered:
        _check_labelled(labelled, ordered[0].embedding.shape)
    return ordered


def _check_numbers(candidate: Candidate) -> None:
    own = {
        "uncertainty": candidate.uncertainty,
        "foreground": candidate.foreground,
        "seconds": candidate.seconds,
        **candidate.measures,
    }
    for name, value in own.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"the {name} of image {candidate.image_id!r} is {value}; predict it again")
        if value < 0 or (name == "foreground" and value > 1):
            expected = "0 to 1" if name == "foreground" else "0 or more"
            raise InputError(f"the {name} of image {candidate.image_id!r} is {value}; expected {expected}")


def _check_labelled(labelled: Sequence[FloatArray], shape: tuple[int, ...]) -> None:
    for number, embedding in enumerate(labelled):
        if np.shape(embedding) != shape:
            raise ShapeError(
                f"the embedding of labelled image {number} (from 0) is {np.shape(embedding)}, those of the open images "
                f"are {shape}; predict both with the same model"
            )
        if not np.isfinite(embedding).all():
            raise NonFiniteError(f"the embedding of labelled image {number} (from 0) holds NaN or infinity")


def standardised(
    embeddings: npt.NDArray[np.floating], others: Sequence[FloatArray] = ()
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Embeddings with mean 0 and standard deviation 1 in each dimension, taken over `embeddings` alone.

    Args:
        embeddings: (N, D), N >= 1. A dimension in which all are equal becomes 0 for all.
        others: M further (D,) arrays, moved and scaled alike (0 in such a dimension).

    Returns:
        (N, D) and (M, D) float64.

    Raises:
        ShapeError: one of `others` is not (D,).
        NonFiniteError: one of `others` holds NaN or infinity.
    """
    own = np.asarray(embeddings, dtype=np.float64)
    _check_labelled(others, own.shape[1:])
    rest = np.asarray(others, dtype=np.float64).reshape(len(others), own.shape[1])
    centre, spread = own.mean(axis=0), own.std(axis=0)
    flat = spread <= 1e-9 * np.maximum(np.abs(centre), 1e-12)
    scale = np.where(flat, 1.0, spread)
    keep = np.where(flat, 0.0, 1.0)
    return (own - centre) / scale * keep, (rest - centre) / scale * keep


def embedded(
    ordered: Sequence[Candidate], labelled: Sequence[FloatArray] = ()
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Standardised embeddings of N >= 1 candidates and of what is labelled: (N, D) and (M, D) float64."""
    return standardised(np.stack([c.embedding for c in ordered]), labelled)


def squared_distances(points: npt.NDArray[_Float], centres: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """(N, M) squared Euclidean distances of (N, D) to (M, D), >= 0, in their dtype; by one matrix product.

    Near 0 they are as good as the dtype's rounding of the squared lengths: take embeddings that lie around 0.
    """
    lengths = np.einsum("ij,ij->i", points, points)
    others = np.einsum("ij,ij->i", centres, centres)
    squares: npt.NDArray[_Float] = points @ centres.T
    squares *= -2
    squares += lengths[:, None]
    squares += others
    np.maximum(squares, 0, out=squares)
    return squares


def blocks(places: npt.NDArray[np.intp], width: int) -> list[npt.NDArray[np.intp]]:
    """The places in pieces so long that a float64 matrix of a piece by `width` takes at most about 32 MiB."""
    rows = max(1, 2**22 // max(width, 1))
    return [places[start : start + rows] for start in range(0, len(places), rows)]


def standing(values: npt.NDArray[np.floating], place: int, more: str) -> str:
    """How a value stands among all (N,), in words: "more uncertain than 93% of 120 open images".

    Args:
        values: of the open images, N >= 1; higher is more.
        place: which of them.
        more: the word of comparison, such as "more uncertain".
    """
    n, value = len(values), values[place]
    below = int(np.sum(values < value))
    if n == 1:
        return "the only open image"
    if values.min() == values.max():
        return f"no {more} or less so than the other {n - 1} open images"
    if below == n - 1:
        return f"{more} than any other of {n} open images"
    if below == 0:
        return f"not {more} than any of {n} open images"
    share = 100 * below // n
    return f"{more} than {f'{share}%' if share else below} of {n} open images"
