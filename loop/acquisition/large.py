"""Unsure and unlike each other, exactly, out of pools of any size: the greedy rule with distances worked out late."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.types import FloatArray

Float64Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

_CHUNK = 16384
_CENTRES = 256
_FRONT = 2048
_SAME = 1e-12


class Chosen(NamedTuple):
    """Rows in the order they were chosen, and how far each was from what stood before it.

    `rows` (K,) int64; `spread` (K,) float64 in [0, 1]: the distance to the nearest row chosen before or labelled, as a
    share of the largest that any row had at the start; 0 for the first where nothing is labelled.
    """

    rows: Rows
    spread: Float64Array


def select_large(
    embeddings: npt.NDArray[np.floating],
    uncertainty: npt.ArrayLike,
    k: int,
    *,
    labelled: Sequence[FloatArray] | npt.NDArray[np.floating] = (),
) -> Chosen:
    """min(k, N) rows, one after the other by uncertainty times distance to the nearest chosen or labelled one.

    Distances are Euclidean between embeddings standardised over the N rows (`loop.acquisition.base.standardised`). The
    first row is the most uncertain one where nothing is labelled. Equal products go by uncertainty, then by row. With
    equal uncertainties this is k-centre (core-set). Nothing is random, and the answer is that of the plain rule, which
    works out N distances for each choice: distances only ever fall, so an old one is an upper bound, and a row is
    looked at again only when its bound is the highest of all. Rows nearer than 1e-6 of their length count as alike.

    Cost: N x (1 + M) distances, then k times a look at N numbers and, as a rule, at a few thousand distances; N x k
    distances at worst. Memory beyond what is given: about 30 bytes a row and 100 MB; no N x k or N x M matrix.

    Args:
        embeddings: (N, D) float32 or float64, a memory map or not; N may be 0.
        uncertainty: (N,) finite, >= 0.
        k: how many, >= 0.
        labelled: M arrays (D,), or (M, D): what the model has learnt from.

    Raises:
        ShapeError: shapes do not fit.
        NonFiniteError: a number is NaN or infinite; the text names the row.
        InputError: k or an uncertainty is negative.

    Source: greedy k-centre of Sener and Savarese 2018 (Core-Set), times uncertainty; the late evaluation is Minoux 1978
    (accelerated greedy). Differs: rows are looked at again in batches, most promising first, each twice as large as the
    one before until a choice is certain.
    """
    unsure = _checked(embeddings, uncertainty, k)
    wanted = min(k, len(unsure))
    if wanted == 0:
        return Chosen(np.zeros(0, np.int64), np.zeros(0))
    pool = _Pool(embeddings, unsure, wanted, labelled)
    spread = []
    if not len(labelled):
        pool.choose(int(np.argmax(unsure)))
        spread.append(0.0)
    pool.look_at(np.arange(len(unsure)))
    largest = float(pool.distance.max())
    while len(spread) < wanted:
        row = pool.best()
        pool.look_at(np.array([row]))
        spread.append(float(pool.distance[row]) / largest if largest > 0 else 0.0)
        pool.choose(row)
    return Chosen(np.array(pool.chosen, dtype=np.int64), np.array(spread))


class _Pool:
    """Rows with upper bounds of their distance to the centres: the labelled ones, then the chosen ones in order.

    `distance` (N,) is exact for the first `seen` (N,) centres of each row; `value` is the bound of uncertainty times
    distance, -inf for a chosen row.
    """

    def __init__(
        self,
        embeddings: npt.NDArray[np.floating],
        uncertainty: Float64Array,
        k: int,
        labelled: Sequence[FloatArray] | npt.NDArray[np.floating],
    ) -> None:
        n, width = embeddings.shape
        if any(np.shape(embedding) != (width,) for embedding in labelled):
            raise ShapeError(f"an embedding of a labelled image does not have {width} numbers like the open ones")
        known = np.asarray(labelled, dtype=np.float64).reshape(len(labelled), width)
        if not np.isfinite(known).all():
            raise NonFiniteError("an embedding of a labelled image holds NaN or infinity; predict it again")
        self.chosen: list[int] = []
        self.distance = np.full(n, np.inf)
        self.value = uncertainty / max(float(uncertainty.max()), 1e-12)
        self._share = self.value.copy()
        self._uncertainty = uncertainty
        self._embeddings = embeddings
        self._centre, self._factor = _scaling(embeddings)
        self._seen = np.zeros(n, np.int64)
        self._centres = np.empty((len(known) + k, width))
        self._centres[: len(known)] = (known - self._centre) * self._factor
        self._n_centres = len(known)

    def choose(self, row: int) -> None:
        """Makes a row a centre and takes it out."""
        self.chosen.append(row)
        self._centres[self._n_centres] = self._standardised(np.array([row]))[0]
        self._n_centres += 1
        self.value[row] = self._share[row] = -np.inf

    def best(self) -> int:
        """The open row of the highest value, equal ones by uncertainty, then by row."""
        batch = _FRONT
        while True:
            tied = np.flatnonzero(self.value == self.value.max())
            old = tied[self._seen[tied] < self._n_centres]
            if self.value[tied[0]] == 0 or len(old) == 0:
                return int(tied[np.argmax(self._uncertainty[tied])])
            front = old
            if len(self.value) > batch > len(old):
                front = np.argpartition(self.value, len(self.value) - batch)[-batch:]
            elif batch >= len(self.value):
                front = np.arange(len(self.value))
            self.look_at(front[np.isfinite(self.value[front]) & (self._seen[front] < self._n_centres)])
            batch *= 2

    def look_at(self, rows: Rows) -> None:
        """Brings distances and values of these rows up to date."""
        ages = np.frexp((self._n_centres - self._seen[rows]).astype(np.float64))[1]
        for age in np.unique(ages):
            alike = np.sort(rows[ages == age])
            for start in range(0, len(alike), _CHUNK):
                self._catch_up(alike[start : start + _CHUNK])

    def _catch_up(self, rows: Rows) -> None:
        own = self._standardised(rows)
        lengths = np.einsum("nd,nd->n", own, own)
        nearest = self.distance[rows] ** 2
        for start in range(int(self._seen[rows].min()), self._n_centres, _CENTRES):
            centres = self._centres[start : min(start + _CENTRES, self._n_centres)]
            sums = lengths[:, None] + np.einsum("md,md->m", centres, centres)[None]
            squares = sums - 2 * (own @ centres.T)
            squares[squares < _SAME * sums] = 0
            np.minimum(nearest, squares.min(axis=1), out=nearest)
        self.distance[rows] = np.sqrt(nearest)
        self._seen[rows] = self._n_centres
        open_rows = rows[np.isfinite(self._share[rows])]
        self.value[open_rows] = self._share[open_rows] * self.distance[open_rows]

    def _standardised(self, rows: Rows) -> Float64Array:
        moved: Float64Array = np.asarray(self._embeddings[rows], dtype=np.float64)
        moved -= self._centre
        moved *= self._factor
        return moved


def _checked(embeddings: npt.NDArray[np.floating], uncertainty: npt.ArrayLike, k: int) -> Float64Array:
    unsure = np.asarray(uncertainty, dtype=np.float64)
    if k < 0:
        raise InputError(f"k={k}; expected 0 or more images to choose")
    if embeddings.ndim != 2 or unsure.shape != (len(embeddings),):
        raise ShapeError(
            f"embeddings of shape {embeddings.shape}, uncertainty of {unsure.shape}; expected (N, D) and (N,)"
        )
    wrong = np.flatnonzero(~np.isfinite(unsure))
    if len(wrong):
        raise NonFiniteError(f"the uncertainty of row {wrong[0]} is {unsure[wrong[0]]}; predict that image again")
    if len(unsure) and unsure.min() < 0:
        row = int(unsure.argmin())
        raise InputError(f"the uncertainty of row {row} is {unsure[row]}; expected 0 or more")
    return unsure


def _scaling(embeddings: npt.NDArray[np.floating]) -> tuple[Float64Array, Float64Array]:
    """Mean (D,) and 1 / standard deviation (D,) over the rows, in two passes; 0 for a dimension that is constant."""
    n = len(embeddings)
    total = np.zeros(embeddings.shape[1])
    for start in range(0, n, _CHUNK):
        chunk = np.asarray(embeddings[start : start + _CHUNK], dtype=np.float64)
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            raise NonFiniteError(
                f"the embedding of row {start + int(np.flatnonzero(~finite)[0])} holds NaN or infinity; "
                "predict that image again"
            )
        total += chunk.sum(axis=0)
    centre = total / n
    squares = np.zeros_like(centre)
    for start in range(0, n, _CHUNK):
        squares += ((embeddings[start : start + _CHUNK] - centre) ** 2).sum(axis=0)
    spread = np.sqrt(squares / n)
    flat = spread <= 1e-9 * np.maximum(np.abs(centre), 1e-12)
    return centre, np.where(flat, 0.0, 1 / np.where(flat, 1.0, spread))
