"""What people did to many predictions, in one line: shares of the offered cells with intervals, seconds a cell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loop.effort.edits import Edits

_Z = 1.959964  # two-sided 95 %
_CELLS_AN_IMAGE = 10.0  # cells of one image resemble one another: on average they weigh no more than so many


class Piece(NamedTuple):
    """One annotation: what became of the offered cells, and the time that it took.

    `edited_iou` is the mean IoU of the edited cells with the offered ones, None without any; `seconds` None where they
    were not measured; `predicted` says whether a model's prediction, be it of 0 cells, was on screen.
    """

    edits: Edits
    edited_iou: float | None
    seconds: float | None
    predicted: bool


class Share(NamedTuple):
    """A share in [0, 1] with its 95 % interval; low <= mean <= high."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What several annotations say.

    Attributes:
        images: number of annotations.
        offered: number of cells that a model offered in them.
        kept: share of the offered cells that were left untouched; None where none was offered.
        edited: likewise, reshaped or given another class.
        deleted: likewise, removed.
        edited_iou: mean IoU of the edited cells with the offered ones; None without any.
        added_per_image: cells drawn in an image that a model had looked at; None where there is no such image.
        seconds_per_cell: of measured annotations, the seconds over the submitted cells; None without either.
    """

    images: int
    offered: int
    kept: Share | None
    edited: Share | None
    deleted: Share | None
    edited_iou: float | None
    added_per_image: float | None
    seconds_per_cell: float | None


def summarise(pieces: Sequence[Piece]) -> Summary:
    """The figures of some annotations; of what was drawn from nothing only the time counts."""
    shown = [piece for piece in pieces if piece.predicted]
    offered = [piece.edits.kept + piece.edits.edited + piece.edits.deleted for piece in shown]
    edited = [(piece.edits.edited, piece.edited_iou) for piece in shown if piece.edited_iou is not None]
    measured = [(piece.seconds, piece.edits) for piece in pieces if piece.seconds is not None]
    submitted = sum(edits.kept + edits.edited + edits.added for _, edits in measured)
    n_edited = sum(n for n, _ in edited)
    return Summary(
        images=len(pieces),
        offered=int(sum(offered)),
        kept=share([piece.edits.kept for piece in shown], offered),
        edited=share([piece.edits.edited for piece in shown], offered),
        deleted=share([piece.edits.deleted for piece in shown], offered),
        edited_iou=sum(n * iou for n, iou in edited) / n_edited if n_edited else None,
        added_per_image=sum(piece.edits.added for piece in shown) / len(shown) if shown else None,
        seconds_per_cell=sum(seconds for seconds, _ in measured) / submitted if submitted else None,
    )


def share(hits: Sequence[float], cells: Sequence[float]) -> Share | None:
    """The share of all cells that are hits, with an interval that knows that cells of an image are alike.

    Wilson's interval for n / d cells in place of n. The design effect d is how much more the share varies than if all
    cells were independent, estimated from the images:

        d = n / (p (1 - p)) * m / (m - 1) * sum over images of (hits - p cells)^2 / n^2

    Differs: d is at least 1, and at least what lets an image weigh ten cells on average, so that two images in which
    all was kept do not look like hundreds of cells.

    Args:
        hits: of each of M images, in [0, cells].
        cells: of each of M images, >= 0.

    Returns:
        None where there is no cell.

    Source: Rao and Scott (1992), A simple method for the analysis of clustered binary data, Biometrics 48, p. 577-585;
    Wilson (1927), Probable inference, J. Am. Stat. Assoc. 22, p. 209-212.
    """
    here = [(hit, of) for hit, of in zip(hits, cells, strict=True) if of > 0]
    n = float(sum(of for _, of in here))
    if not here:
        return None
    p, m = sum(hit for hit, _ in here) / n, len(here)
    effect = max(1.0, n / (_CELLS_AN_IMAGE * m))
    if m > 1 and 0 < p < 1:
        spread = m / (m - 1) * sum((hit - p * of) ** 2 for hit, of in here) / n**2
        effect = max(effect, spread * n / (p * (1 - p)))
    n /= effect
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Share(p, min(max(middle - half, 0.0), p), max(min(middle + half, 1.0), p))
