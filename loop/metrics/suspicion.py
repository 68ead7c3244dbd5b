"""How suspicious a person's labels are, given what a model that never saw them predicts.

Five ways in which a label can be wrong. Certainty is what the model's probability p of "inside a cell" says beyond a
coin's toss: max(0, 2p - 1) that a pixel is cell, max(0, 1 - 2p) that it is background. A model that does not know
accuses nobody.

- invented, a labelled cell: mean certainty in it of background, less that of cell, at least 0;
- shifted, a labelled cell: 2 sqrt(a b), at most 1. a is the mean certainty of background in it; b that of cell in the
  predicted cell which it shares most pixels with, where its pixels in labelled cells count as 0;
- merged, a labelled cell in which two predicted cells lie by half or more: the lower of their certainties x evenness;
- split, a labelled cell that lies by half or more in a predicted cell, as another does: its certainty x evenness;
- deleted, a predicted cell: its certainty x (1 - twice the share of it that lies in labelled cells), at least 0.

The certainty of a predicted cell is the mean of that of cell over its pixels. Evenness is twice the smaller of two
parts over both: a speck beside a cell is no second cell. A shift is told by both sides at once, because a model that
draws all cells too thin or too fat differs on one side only.

A model has habits: it overlooks dim cells, or cuts large ones up. So each raw suspicion s becomes s^2 / (s + t), t
being what is usual in that kind among the other images of the modality (see `usual`): as it is where the model is never
wrong, half of it where it often is.

The score of an image is the power mean of exponent 8 of the suspicions of its cells, labelled and predicted: between
their mean (exponent 1), which hides three wrong cells among 60, and their maximum (infinity), which takes no notice of
how many there are; a sum would rank images by how full they are. Three cells at 1 among 60 give 0.69, one 0.60, one
among 15 0.71, and 60 at 0.2 give 0.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from loop.errors import NonFiniteError, ShapeError
from loop.metrics.matching import Float64Array, Int64Array, areas, intersections
from loop.types import BoolArray, FloatArray, Instances

LabelKind = Literal["invented", "shifted", "merged", "split"]
Kind = Literal["invented", "shifted", "merged", "split", "deleted"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)
KINDS: tuple[Kind, ...] = get_args(Kind)

HALF = 0.5
USUAL_QUANTILE = 0.9
USUAL_CELLS = 100.0
"""What is usual in a modality counts as much as what is usual in all images when it has so many cells."""

POWER = 8
WORDS: dict[Kind, str] = {
    "invented": "drawn where the model sees background",
    "shifted": "drawn beside the cell that the model sees",
    "merged": "drawn as one where the model sees two",
    "split": "drawn as several where the model sees one",
    "deleted": "not drawn though the model sees a cell",
}


@dataclass(frozen=True, eq=False)
class Suspicion:
    """Suspicions of one image, each in [0, 1].

    `labelled` (N, 4) float64: of N labelled cells, a column a kind of LABEL_KINDS. `deleted` (M,) float64: that a
    predicted cell was left out.
    """

    labelled: Float64Array
    deleted: Float64Array

    @property
    def cells(self) -> Float64Array:
        """(N + M,) the highest of each labelled cell, then those of the predicted ones."""
        return np.concatenate([self.labelled.max(axis=1, initial=0.0), self.deleted])


class Finding(NamedTuple):
    """One suspicious place: `cell` is the index of the labelled cell, or of the predicted one where it was deleted."""

    kind: Kind
    cell: int
    box_xyxy: tuple[int, int, int, int]
    suspicion: float
    words: str


def suspicion_of(
    labelled: Instances, predicted: Instances, interior: FloatArray, known: BoolArray | None = None
) -> Suspicion:
    """Raw suspicions of an image's labels; the module's text defines them.

    Args:
        labelled: N cells as a person drew them.
        predicted: M cells of a model that has not learnt from them; their scores do not count, `interior` does. Give
            all of them, the doubtful ones too.
        interior: (H, W) in [0, 1], how likely each pixel is inside a cell.
        known: (H, W) bool, where the labels are complete; no cell is missed elsewhere. None = everywhere.

    Raises:
        ShapeError: the four are not of one size.
        NonFiniteError: `interior` holds NaN or infinity; the text names the image.
    """
    shapes = {labelled.shape, predicted.shape, interior.shape, labelled.shape if known is None else known.shape}
    name = labelled.image_id or predicted.image_id
    if len(shapes) > 1:
        raise ShapeError(
            f"labels, prediction and map of {name!r} are of sizes {sorted(shapes)}; give those of one image"
        )
    if not np.isfinite(interior).all():
        raise NonFiniteError(f"the map of image {name!r} holds NaN or infinity; train the model again")
    cell, ground = np.maximum(2.0 * interior - 1, 0), np.maximum(1 - 2.0 * interior, 0)
    unlabelled = ~_union(labelled)
    open_ground = unlabelled if known is None else unlabelled & known
    shared, label_areas, pred_areas = intersections(predicted, labelled), areas(labelled), areas(predicted)
    sure = _means(predicted, cell)
    columns = (
        np.maximum(_means(labelled, ground) - _means(labelled, cell), 0),
        _shifted(shared, _means(labelled, ground), _means(predicted, cell * open_ground)),
        _merged(shared, pred_areas, sure),
        _split(shared, label_areas, sure),
    )
    deleted = sure * np.maximum(1 - 2 * _means(predicted, ~unlabelled), 0)
    if known is not None:
        deleted *= _means(predicted, known) >= HALF
    return Suspicion(np.clip(np.stack(columns, axis=1), 0, 1), np.clip(deleted, 0, 1))


def usual(images: Sequence[Suspicion], modalities: Sequence[str]) -> list[Float64Array]:
    """How suspicious the cells of the other images are, so that a model's habits do not pass for a person's errors.

    For each image and kind the 0.9 quantile over the cells of the other images of its modality, mixed with that over
    all other images: the fewer cells the modality has, the more these count (half at 100 cells). As long as fewer than
    a tenth of the labels are wrong in one way, they do not excuse each other.

    Args:
        images: raw suspicions of K images.
        modalities: one name an image.

    Returns:
        K arrays (5,) float64 in [0, 1], a value a kind of KINDS; 0 without another cell.

    Raises:
        ShapeError: not one modality for each image.
    """
    if len(images) != len(modalities):
        raise ShapeError(f"{len(modalities)} modalities for {len(images)} images; give one for each")
    levels: list[Float64Array] = [np.zeros(len(KINDS)) for _ in images]
    of_modality = [[i for i, other in enumerate(modalities) if other == name] for name in dict.fromkeys(modalities)]
    for k in range(len(KINDS)):
        columns = [image.labelled[:, k] if k < len(LABEL_KINDS) else image.deleted for image in images]
        everywhere = _quantiles_of_others(columns)
        for members in of_modality:
            here = _quantiles_of_others([columns[i] for i in members])
            n = sum(len(columns[i]) for i in members)
            for i, own in zip(members, here, strict=True):
                share = (n - len(columns[i])) / (n - len(columns[i]) + USUAL_CELLS)
                levels[i][k] = share * own + (1 - share) * everywhere[i]
    return levels


def unusual(raw: Suspicion, level: Float64Array) -> Suspicion:
    """Suspicions less what is usual: s^2 / (s + t), which grows with s and is never above it.

    Args:
        raw: of one image.
        level: (5,) in [0, 1], t of each kind of KINDS.
    """
    n = len(LABEL_KINDS)
    return Suspicion(_less(raw.labelled, level[None, :n]), _less(raw.deleted, level[n]))


def judge(images: Sequence[Suspicion], modalities: Sequence[str]) -> list[Suspicion]:
    """The raw suspicions of all images, each less what is usual among the others; arguments and errors as `usual`."""
    return [unusual(raw, level) for raw, level in zip(images, usual(images, modalities), strict=True)]


def image_score(suspicion: Suspicion) -> float:
    """How much an image deserves a second look, see the module's text: in [0, 1], 0 where nothing is suspicious."""
    cells = suspicion.cells
    return float((cells**POWER).mean() ** (1 / POWER)) if len(cells) else 0.0


def findings(suspicion: Suspicion, labelled: Instances, predicted: Instances, *, least: float = 0.0) -> list[Finding]:
    """Places whose suspicion is above 0 and at least `least`, the most suspicious first; one kind a cell.

    Args:
        suspicion: of the image.
        labelled: its N labelled cells.
        predicted: its M predicted ones.
        least: in [0, 1].

    Raises:
        ShapeError: the cells are not those of the suspicions.
    """
    if (len(labelled), len(predicted)) != (len(suspicion.labelled), len(suspicion.deleted)):
        raise ShapeError(
            f"suspicions of {len(suspicion.labelled)} labelled and {len(suspicion.deleted)} predicted cells, but "
            f"{len(labelled)} and {len(predicted)} cells are given; give those that they were made of"
        )
    found = []
    for i, row in enumerate(suspicion.labelled):
        kind = LABEL_KINDS[int(row.argmax())]
        found.append(Finding(kind, i, _box(labelled, i), float(row.max()), WORDS[kind]))
    for j, value in enumerate(suspicion.deleted.tolist()):
        found.append(Finding("deleted", j, _box(predicted, j), value, WORDS["deleted"]))
    kept = [finding for finding in found if finding.suspicion > 0 and finding.suspicion >= least]
    return sorted(kept, key=lambda finding: -finding.suspicion)


def reason(found: Sequence[Finding]) -> str:
    """What the findings say of an image, in plain words, the most suspicious kind first; "" without any."""
    counts: dict[Kind, int] = {}
    for finding in found:
        counts[finding.kind] = counts.get(finding.kind, 0) + 1
    return "; ".join(f"{n} {'cell' if n == 1 else 'cells'} {WORDS[kind]}" for kind, n in counts.items())


def _shifted(shared: Int64Array, ground: Float64Array, left_out: Float64Array) -> Float64Array:
    if shared.size == 0:
        return np.zeros(shared.shape[1])
    partner = shared.argmax(axis=0)
    touches = shared.max(axis=0) > 0
    return np.where(touches, 2 * np.sqrt(ground * left_out[partner]), 0.0)


def _merged(shared: Int64Array, pred_areas: Int64Array, sure: Float64Array) -> Float64Array:
    within = shared / np.maximum(pred_areas, 1)[:, None] >= HALF
    values = np.zeros(shared.shape[1])
    for label in np.flatnonzero(within.sum(axis=0) >= 2).tolist():
        inside = np.flatnonzero(within[:, label])
        first, second = inside[np.argsort(-shared[inside, label], kind="stable")[:2]]
        evenness = 2 * shared[second, label] / (shared[first, label] + shared[second, label])
        values[label] = min(sure[first], sure[second]) * evenness
    return values


def _split(shared: Int64Array, label_areas: Int64Array, sure: Float64Array) -> Float64Array:
    under = shared / np.maximum(label_areas, 1)[None, :] >= HALF
    values = np.zeros(shared.shape[1])
    for pred in np.flatnonzero(under.sum(axis=1) >= 2).tolist():
        labels = np.flatnonzero(under[pred])
        parts = shared[pred, labels]
        order = np.argsort(-parts, kind="stable")
        other = np.where(np.arange(len(parts)) == order[0], parts[order[1]], parts[order[0]])  # the largest but itself
        evenness = 2 * np.minimum(parts, other) / np.maximum(parts + other, 1)
        values[labels] = np.maximum(values[labels], sure[pred] * evenness)
    return values


def _less(raw: Float64Array, level: Float64Array) -> Float64Array:
    both = raw + level
    return np.asarray(np.divide(raw**2, both, out=np.zeros_like(raw), where=both > 0))


def _quantiles_of_others(columns: Sequence[Float64Array]) -> list[float]:
    """For each column the 0.9 quantile (the lower of two neighbours) of all others' values; 0 where there is none.

    All are sorted once; a column's own values, of which there are few, are then stepped over.
    """
    values = np.concatenate([*columns, np.zeros(0)])
    order = np.argsort(values, kind="stable")
    place = np.empty(len(values), np.int64)
    place[order] = np.arange(len(values))
    ends = np.cumsum([len(column) for column in columns])
    found = []
    for own in np.split(place, ends[:-1]) if columns else ():
        n = len(values) - len(own)
        index = int(USUAL_QUANTILE * (n - 1)) if n else 0
        for step in np.sort(own).tolist():
            index += step <= index
        found.append(float(values[order[index]]) if n else 0.0)
    return found


def _means(cells: Instances, image: Float64Array | BoolArray) -> Float64Array:
    """(N,) the mean of an image in each cell; 0 in one without a pixel."""
    values = [
        image[y0:y1, x0:x1][mask].mean() if mask.any() else 0.0
        for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True)
    ]
    return np.array(values, np.float64)


def _union(cells: Instances) -> BoolArray:
    canvas = np.zeros(cells.shape, np.bool_)
    for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True):
        canvas[y0:y1, x0:x1] |= mask
    return canvas


def _box(cells: Instances, i: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = cells.boxes_xyxy[i].tolist()
    return x0, y0, x1, y1
