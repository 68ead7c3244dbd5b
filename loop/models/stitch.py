"""Cells seen several times become one: in overlapping windows of a large image, or in several passes over one frame.

A network that finds whole cells sees an image larger than its crop through windows. A cell at a window's inner edge
(one that is not the image's own) is cut there. `merge_windows` decides which cells of neighbouring windows are the same
one, by what both windows say about the pixels that they share.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loop.data.preprocess import Window
from loop.errors import InputError, ShapeError
from loop.metrics.matching import Int64Array, areas, intersections, iou_matrix
from loop.rings import Crop, crop_mask
from loop.types import BoolArray, Instances, IntArray

Box = tuple[int, int, int, int]

_COVERED = 0.8  # share of an arm, inside what both windows see, that lies in the cell it belongs to
_APART = 0.2  # share of an arm that may lie in another piece of that cell from the arm's own window
_BAND = 200  # cells
_DOUBT_PX = 16  # agreement on few pixels is weak: it is weighed as if so many more had disagreed


class _Pieces(NamedTuple):
    """All windows' cells in the image's coordinates, boxes tight, window after window.

    `windows` (W, 4) int64 x0, y0, x1, y1; `safe` the same with every inner edge moved inwards by `edge_px`; `window`
    (N,) the row of each piece's window; `first` (W + 1,) where each window's pieces start.
    """

    windows: Int64Array
    safe: Int64Array
    cells: Instances
    window: Int64Array
    first: Int64Array


class _Links(NamedTuple):
    """Pairs of pieces i, j of two windows that share pixels: (K,) int64 each.

    `shared` px; `area_i`, `area_j` px of either inside the rectangle that both windows see.
    """

    i: Int64Array
    j: Int64Array
    shared: Int64Array
    area_i: Int64Array
    area_j: Int64Array


class _Groups:
    """Disjoint groups of pieces, at first one each; `sources` is the window or pass of each piece."""

    def __init__(self, sources: Sequence[int]) -> None:
        self._sources = sources
        self._group = [[i] for i in range(len(sources))]  # one list, shared by all members

    def of(self, i: int) -> list[int]:
        return self._group[i]

    def join(self, i: int, j: int) -> None:
        if self._group[i] is not self._group[j]:
            joined = sorted(self._group[i] + self._group[j])
            for k in joined:
                self._group[k] = joined

    def join_unless_rivals(self, i: int, j: int) -> None:
        """Joins the groups of i and j, but not where one window or pass holds both apart."""
        of_i, of_j = ({self._sources[k] for k in self._group[m]} for m in (i, j))
        if not of_i & of_j:
            self.join(i, j)

    def all(self) -> list[list[int]]:
        return [group for i, group in enumerate(self._group) if group[0] == i]


def merge_windows(
    shape: tuple[int, int],
    parts: Iterable[tuple[Window, Instances]],
    *,
    agreement: float = 0.5,
    edge_px: int = 2,
) -> Instances:
    """The cells of a whole image from those of its windows: none cut at a seam, none doubled.

    Cells of two windows are one where their masks agree inside the rectangle that both windows see. The best agreement
    is taken first, and never does a cell take in two of one window that both stand for it: overlapping cells stay two.
    A piece cut by its window that lies inside a neighbour's cell which leaves that window belongs to it as well (the
    second arm of a bent cell). Then, for each cell:

    - a window saw it uncut: its mask, from the window in which it lies farthest from an inner edge (the better score of
      equals), and that score;
    - all windows cut it (it is larger than their overlap): the union, score = mean weighted by area;
    - cut wherever it was found, but another window has the whole place in view and finds nothing there: left out.

    Args:
        shape: (H, W) of the image, px.
        parts: each a window and its cells in the window's coordinates, N >= 0; taken one by one, so they may come from
            a generator. Neighbours should overlap by more than a usual cell is long.
        agreement: in (0, 1], the IoU inside the shared rectangle from which on two cells are one.
        edge_px: >= 1; a cell nearer than this to an inner edge of its window counts as cut there.

    Returns:
        N >= 0 cells in the order in which they were first met; label and weight are those of the mask (of the largest
        piece in a union); image_id, source and model_version of the first part. Empty masks are dropped.

    Raises:
        InputError: no windows, or a setting out of its range.
        ShapeError: a window leaves the image, or its cells are of another size than the window.

    Memory is that of the cropped masks. The cost grows with the pairs of cells of different windows whose boxes touch,
    and with W^2 for W windows (a comparison of four numbers each).
    """
    if not 0 < agreement <= 1 or edge_px < 1:
        raise InputError(f"agreement={agreement}, edge_px={edge_px}; expected 0 < agreement <= 1 and edge_px >= 1")
    pieces = _collect(shape, parts, edge_px)
    groups = _Groups(pieces.window.tolist())
    links = _links(pieces)
    _join_agreeing(groups, links, agreement)
    uncut = _inside(pieces.cells.boxes_xyxy, pieces.safe[pieces.window])
    _join_arms(groups, links, pieces, uncut)
    return _resolve(groups, pieces, uncut)


def fuse(parts: Sequence[Instances], *, agreement: float = 0.5, min_votes: int = 1) -> Instances:
    """One set of cells from several passes over the same frame, as test-time augmentation makes them.

    Cells of different passes pair where their IoU reaches `agreement`, best pairs first; a pass gives at most one cell
    to a group. A pixel is the group's where more than half of its cells have it; at a tie the best-scored one decides.

    Args:
        parts: M >= 1 passes in the same coordinates (turned back where they were turned).
        agreement: in (0, 1].
        min_votes: from 1 to M; groups found in fewer passes are left out.

    Returns:
        N >= 0 cells; score = sum of a group's scores / M, so a cell found in one of eight passes scores an eighth at
        most; label and weight of its best-scored cell; image_id, source and model_version of the first pass.

    Raises:
        InputError: no passes, or a setting out of its range.
        ShapeError: passes of different shapes.

    The cost grows with the pairs of cells of different passes whose boxes touch, and lightly with M^2 N^2 (boxes are
    compared in bands of 200 cells).
    """
    if not parts or not 1 <= min_votes <= len(parts) or not 0 < agreement <= 1:
        raise InputError(
            f"{len(parts)} passes, min_votes={min_votes}, agreement={agreement}; expected at least one pass, "
            "1 <= min_votes <= passes and 0 < agreement <= 1"
        )
    if any(part.shape != parts[0].shape for part in parts):
        raise ShapeError(f"passes over {sorted({part.shape for part in parts})}; expected one shape (H, W) for all")
    first = np.cumsum([0, *map(len, parts)])
    groups = _Groups(np.repeat(np.arange(len(parts)), np.diff(first)).tolist())
    pairs: list[tuple[float, int, int]] = []  # best first, when sorted
    for p, one in enumerate(parts):
        for q in range(p + 1, len(parts)):
            pairs += ((-iou, first[p] + i, first[q] + j) for iou, i, j in _agreeing(one, parts[q], agreement))
    for _, i, j in sorted(pairs):
        groups.join_unless_rivals(i, j)
    cells = _concatenate(parts)
    kept = [group for group in groups.all() if len(group) >= min_votes]
    best = [max(group, key=lambda k: (cells.scores[k], -k)) for group in kept]
    crops = [_vote(cells, group, k) for group, k in zip(kept, best, strict=True)]
    scores = [float(cells.scores[group].sum()) / len(parts) for group in kept]
    return _rebuilt(cells, best, crops, scores)


def _collect(shape: tuple[int, int], parts: Iterable[tuple[Window, Instances]], edge_px: int) -> _Pieces:
    height, width = shape
    windows: list[tuple[int, int, int, int]] = []
    moved: list[Instances] = []
    for window, cells in parts:
        y0, x0, y1, x1 = window
        if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
            raise ShapeError(f"{window} leaves the image of {tuple(shape)} (H, W); use the windows of `tiles`")
        if cells.shape != (y1 - y0, x1 - x0):
            raise ShapeError(f"the cells of {window} lie in {cells.shape}; expected {(y1 - y0, x1 - x0)}")
        windows.append((x0, y0, x1, y1))
        moved.append(_place(cells, (height, width), x0, y0))
    if not windows:
        raise InputError(f"no windows of the image of {tuple(shape)}; give at least one")
    frames = np.array(windows, dtype=np.int64)
    inner = frames != np.array([0, 0, width, height])
    counts = [len(cells) for cells in moved]
    return _Pieces(
        windows=frames,
        safe=frames + inner * np.array([edge_px, edge_px, -edge_px, -edge_px]),
        cells=_concatenate(moved),
        window=np.repeat(np.arange(len(frames)), counts),
        first=np.cumsum([0, *counts]),
    )


def _place(cells: Instances, shape: tuple[int, int], x: int, y: int) -> Instances:
    """A window's cells in the image's coordinates with tight boxes, without the empty ones."""
    crops = [crop_mask(mask) for mask in cells.masks]
    kept = [i for i, crop in enumerate(crops) if crop is not None]
    tight = [crop for crop in crops if crop is not None]
    boxes = np.array([crop.box_xyxy for crop in tight], dtype=np.int32).reshape(-1, 4)
    boxes += np.tile(cells.boxes_xyxy[kept, :2] + np.array([x, y], dtype=np.int32), 2)
    return Instances.build(
        shape,
        boxes,
        [crop.mask for crop in tight],
        scores=cells.scores[kept],
        labels=cells.labels[kept],
        weights=cells.weights[kept],
        image_id=cells.image_id,
        source=cells.source,
        model_version=cells.model_version,
    )


def _links(pieces: _Pieces) -> _Links:
    """Every pair of pieces of two windows that share a pixel."""
    columns: list[list[int]] = [[], [], [], [], []]
    boxes = pieces.cells.boxes_xyxy
    for a, frame in enumerate(pieces.windows):
        others = pieces.windows[a + 1 :]
        meets = (np.maximum(others[:, :2], frame[:2]) < np.minimum(others[:, 2:], frame[2:])).all(axis=1)
        for b in (a + 1 + np.flatnonzero(meets)).tolist():
            low = np.maximum(frame[:2], pieces.windows[b, :2])
            high = np.minimum(frame[2:], pieces.windows[b, 2:])
            reaching = []
            for which in (a, b):
                start, stop = pieces.first[which : which + 2]
                part = boxes[start:stop]
                reaching.append(start + np.flatnonzero(((part[:, :2] < high) & (part[:, 2:] > low)).all(axis=1)))
            ones, twos = reaching
            shared = intersections(pieces.cells.take(ones), pieces.cells.take(twos))
            rows, cols = np.nonzero(shared)
            inside: Box = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
            of_one = {row: _area_inside(pieces.cells, int(ones[row]), inside) for row in set(rows.tolist())}
            of_two = {col: _area_inside(pieces.cells, int(twos[col]), inside) for col in set(cols.tolist())}
            columns[0] += ones[rows].tolist()
            columns[1] += twos[cols].tolist()
            columns[2] += shared[rows, cols].tolist()
            columns[3] += [of_one[row] for row in rows.tolist()]
            columns[4] += [of_two[col] for col in cols.tolist()]
    return _Links(*(np.array(column, dtype=np.int64) for column in columns))


def _join_agreeing(groups: _Groups, links: _Links, agreement: float) -> None:
    union = links.area_i + links.area_j - links.shared
    strength = links.shared / (union + _DOUBT_PX)
    agreeing = np.flatnonzero(links.shared >= agreement * union)
    for k in agreeing[np.argsort(-strength[agreeing], kind="stable")].tolist():
        groups.join_unless_rivals(int(links.i[k]), int(links.j[k]))


def _join_arms(groups: _Groups, links: _Links, pieces: _Pieces, uncut: BoolArray) -> None:
    """Joins a piece that is cut, and alone, to the cell of another window that covers it and leaves its window."""
    parts = np.concatenate([links.i, links.j])
    wholes = np.concatenate([links.j, links.i])
    shared = np.tile(links.shared, 2)
    covered = shared >= _COVERED * np.concatenate([links.area_i, links.area_j])
    leaves = ~_inside(pieces.cells.boxes_xyxy[wholes], pieces.windows[pieces.window[parts]])
    found = np.flatnonzero(covered & leaves & ~uncut[parts])
    for k in found[np.argsort(-shared[found], kind="stable")].tolist():
        part, whole = int(parts[k]), int(wholes[k])
        if len(groups.of(part)) > 1:
            continue
        own = pieces.cells.take([part])
        siblings = [m for m in groups.of(whole) if pieces.window[m] == pieces.window[part]]
        if intersections(own, pieces.cells.take(siblings)).sum() <= _APART * areas(own)[0]:
            groups.join(part, whole)


def _resolve(groups: _Groups, pieces: _Pieces, uncut: BoolArray) -> Instances:
    """One cell for each group that is not left out; see `merge_windows`."""
    cells = pieces.cells
    sizes = areas(cells)
    room = _room(pieces)
    chosen: list[int] = []
    crops: list[Crop] = []
    scores: list[float] = []
    for group in groups.all():
        hull = np.array(_hull(cells, group))
        whole = [k for k in group if uncut[k] and _inside(hull, pieces.windows[pieces.window[k]])]
        if whole:
            best = max(whole, key=lambda k: (room[k], cells.scores[k], -k))
            crops.append(_crop(cells, best))
            scores.append(float(cells.scores[best]))
        else:
            seeing = np.flatnonzero(_inside(hull, pieces.safe))
            if not uncut[group].any() and len(np.setdiff1d(seeing, pieces.window[group])):
                continue
            best = max(group, key=lambda k: (sizes[k], -k))
            box, counts = _count(cells, group)
            crops.append(Crop(box, counts > 0))
            scores.append(float(np.average(cells.scores[group], weights=sizes[group])))
        chosen.append(best)
    return _rebuilt(cells, chosen, crops, scores)


def _room(pieces: _Pieces) -> Int64Array:
    """(N,) px from each piece to the nearest inner edge of its window; more than the image has where there is none."""
    gaps = np.abs(pieces.cells.boxes_xyxy - pieces.windows[pieces.window])
    inner = pieces.windows != pieces.safe
    room: Int64Array = np.where(inner[pieces.window], gaps, 2 * max(pieces.cells.shape)).min(axis=1)
    return room


def _agreeing(one: Instances, other: Instances, agreement: float) -> Iterator[tuple[float, int, int]]:
    """IoU, row and column of every pair that agrees; a band of cells at a time, so no table is N x N."""
    order = np.argsort(one.boxes_xyxy[:, 1], kind="stable")
    for start in range(0, len(order), _BAND):
        rows = order[start : start + _BAND]
        top, bottom = one.boxes_xyxy[rows, 1].min(), one.boxes_xyxy[rows, 3].max()
        columns = np.flatnonzero((other.boxes_xyxy[:, 1] < bottom) & (other.boxes_xyxy[:, 3] > top))
        iou = iou_matrix(one.take(rows), other.take(columns))
        for i, j in np.argwhere(iou >= agreement).tolist():
            yield float(iou[i, j]), int(rows[i]), int(columns[j])


def _vote(cells: Instances, group: Sequence[int], best: int) -> Crop:
    """The pixels that most cells of a group have, `best` deciding ties; its own mask where that leaves none."""
    box, votes = _count(cells, group)
    x0, y0, x1, y1 = cells.boxes_xyxy[best]
    own = np.zeros(votes.shape, np.bool_)
    own[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]] = cells.masks[best]
    crop = crop_mask((2 * votes > len(group)) | ((2 * votes == len(group)) & own))
    if crop is None:
        return _crop(cells, best)
    left, top, right, bottom = crop.box_xyxy
    return Crop((box[0] + left, box[1] + top, box[0] + right, box[1] + bottom), crop.mask)


def _count(cells: Instances, group: Sequence[int]) -> tuple[Box, IntArray]:
    """The box around a group's cells, and (h, w) how many of them have each of its pixels."""
    box = _hull(cells, group)
    counts = np.zeros((box[3] - box[1], box[2] - box[0]), np.int32)
    for k in group:
        x0, y0, x1, y1 = cells.boxes_xyxy[k]
        counts[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]] += cells.masks[k]
    return box, counts


def _hull(cells: Instances, group: Sequence[int]) -> Box:
    boxes = cells.boxes_xyxy[group]
    x0, y0 = boxes[:, :2].min(axis=0).tolist()
    x1, y1 = boxes[:, 2:].max(axis=0).tolist()
    return x0, y0, x1, y1


def _crop(cells: Instances, k: int) -> Crop:
    x0, y0, x1, y1 = cells.boxes_xyxy[k].tolist()
    return Crop((x0, y0, x1, y1), cells.masks[k])


def _inside(boxes: npt.NDArray[np.integer], frames: npt.NDArray[np.integer]) -> BoolArray:
    """Whether boxes (..., 4) lie inside frames (..., 4), both x0, y0, x1, y1: (...) bool."""
    low, high = boxes[..., :2] >= frames[..., :2], boxes[..., 2:] <= frames[..., 2:]
    return np.asarray((low & high).all(axis=-1))


def _area_inside(cells: Instances, k: int, frame: Box) -> int:
    """Pixels of cell k inside a rectangle x0, y0, x1, y1 that its box meets."""
    x0, y0, _, _ = cells.boxes_xyxy[k].tolist()
    left, top = max(frame[0] - x0, 0), max(frame[1] - y0, 0)
    return int(np.count_nonzero(cells.masks[k][top : frame[3] - y0, left : frame[2] - x0]))


def _concatenate(parts: Sequence[Instances]) -> Instances:
    """All cells of images of one shape, in order; the origin of the first part."""
    return Instances.build(
        parts[0].shape,
        np.concatenate([part.boxes_xyxy for part in parts]),
        [mask for part in parts for mask in part.masks],
        scores=np.concatenate([part.scores for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        image_id=parts[0].image_id,
        source=parts[0].source,
        model_version=parts[0].model_version,
    )


def _rebuilt(cells: Instances, chosen: Sequence[int], crops: Sequence[Crop], scores: Sequence[float]) -> Instances:
    """New masks and scores, label and weight of the `chosen` cell for each."""
    return Instances.build(
        cells.shape,
        [crop.box_xyxy for crop in crops],
        [crop.mask for crop in crops],
        scores=np.minimum(np.array(scores, dtype=np.float32), 1),
        labels=cells.labels[list(chosen)],
        weights=cells.weights[list(chosen)],
        image_id=cells.image_id,
        source=cells.source,
        model_version=cells.model_version,
    )
