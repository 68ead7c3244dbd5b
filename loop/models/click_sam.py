"""The cell that a person points at, from SAM's answers, of which one of a usual size and shape is taken.

Source: Kirillov et al. 2023, "Segment Anything" (arXiv:2304.02643): three masks, from part to whole, where a prompt is
ambiguous, and a fourth where it is not (appendix A); of several the one with the highest expected IoU (section 7.1).
Differs: what is known of labelled cells has a say in the choice; masks are cut to the piece that is meant.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from loop.labelstudio.results import Prompts
from loop.metrics.typical import Typical, touches_edge
from loop.models.click import Points, cell_near, close_gaps, cut_away
from loop.models.sam import Answers
from loop.models.sam_steps import Multimask
from loop.rings import Crop, crop_mask
from loop.types import BoolArray, Instances, IntArray, Source

TYPICAL_WEIGHT = 0.5
"""Of ln(typicality) beside ln(expected IoU) for a single point, which says nothing of the cell's size: a mask that is a
quarter as typical must be expected to have twice the IoU. Boxes and several points say a good deal of the size: half of
it."""
PROMPT_WEIGHT = 1.5
"""Of ln(share of positive points held) and ln(IoU with the drawn box): what a person says outweighs what is usual."""
BEYOND_WEIGHT = 0.35
"""Of ln(share of the mask that lies in the drawn box). What lies beyond it is cut off, so this only decides between
masks: a clump that is cut at the box looks as usual and as well placed as the cell in it."""
CUT_PENALTY = 0.5
"""Of a mask that had to be cut because SAM left a negative point in it."""
MARGIN = 8
_LEAST_SCORE = 1e-3
_MIDDLE_FIRST = (1, 2, 0)  # of equal masks: the whole cell before the clump and before the part


class Answering(Protocol):
    """A network that answers prompts about an encoded image: loop/models/sam.py."""

    def decode(
        self,
        embedding: Any,
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        boxes: npt.ArrayLike | None = None,
        multimask: Multimask = True,
    ) -> Answers:
        """Masks of P prompts; see `loop.models.sam.Sam.decode`."""
        ...


class Encoded(Protocol):
    """What `decode` takes."""

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the image, px."""
        ...


class _Candidate(NamedTuple):
    """One mask, cut to what is meant; `score` is SAM's, `value` (a logarithm) what it is chosen by."""

    crop: Crop
    score: float
    value: float


class _Piece(NamedTuple):
    """A mask (h, w) in the window of the image whose top left pixel is `row`, `column`."""

    mask: BoolArray
    row: int
    column: int

    def points(self, prompts: Prompts, positive: bool) -> Points:
        """The window's pixels under the points of one kind; those outside the window are left out."""
        xy = np.floor(prompts.points_xy[prompts.positive == positive]).astype(int) - (self.column, self.row)
        height, width = self.mask.shape
        return [(y, x) for x, y in xy.tolist() if 0 <= x < width and 0 <= y < height]

    def within(self, box: npt.NDArray[np.float64]) -> "_Piece":
        """Without the pixels that the box does not touch; whole for a box without area, which is a point."""
        x0, y0, x1, y1 = box.tolist()
        if x0 >= x1 or y0 >= y1:
            return self
        rows, columns = (np.arange(n) + start for n, start in zip(self.mask.shape, self[1:], strict=True))
        inside = ((rows + 1 > y0) & (rows < y1))[:, None] & (columns + 1 > x0) & (columns < x1)
        return self._replace(mask=self.mask & inside)

    def crop(self) -> Crop | None:
        """Cut to its pixels, in the image's frame."""
        found = crop_mask(self.mask, x0=self.column)
        if found is None:
            return None
        x0, y0, x1, y1 = found.box_xyxy
        return Crop((x0, y0 + self.row, x1, y1 + self.row), found.mask)


def sam_cell_at(
    sam: Answering,
    embedding: Encoded,
    prompts: Prompts,
    *,
    typical: Typical | None = None,
    image_id: str = "",
    source: Source = "model",
    model_version: str = "",
) -> Instances:
    """The one cell that prompts mean, or none.

    What SAM is asked:
    - all points together are one prompt, positive and negative;
    - a box is a prompt, with the positive points in it and all negative ones; positive points beside every box are one
      more prompt; the answers are joined, gaps of up to 4 px closed;
    - positive points that the answer leaves out by more than 3 px are asked for once more by themselves and joined;
    - only negative points: nothing.

    Of each mask the pixels that the box does not touch are cut off, where there is one. Then the pieces under a
    positive point (or within 3 px of it) stay, of a box without points the largest piece in the box, with gaps of up to
    4 px closed before where there is a box or more than one positive point, and holes filled. A negative point that is
    still in it divides it by the watershed of loop/models/click.py.

    Of the masks of a prompt the one with the highest sum is taken:
    - ln of the IoU that SAM expects;
    - TYPICAL_WEIGHT x ln of the typicality, half of that for a box or several points; none without `typical`, so that
      SAM's own order stands as in the paper (the middle mask of equals, which is the whole thing, not part or group);
    - PROMPT_WEIGHT x ln of the share of positive points in it; with none in it the mask is out;
    - PROMPT_WEIGHT x ln of the IoU of its box with the box that was drawn: a box merges what lies in it;
    - BEYOND_WEIGHT x ln of the share of the mask's pixels that lay in the box;
    - ln CUT_PENALTY where a negative point had to be cut away.

    Three masks are in the choice, and the one for clear prompts where there is a box or more than one point.

    Args:
        sam: the network.
        embedding: what it made of the image.
        prompts: px of the image; the centre of pixel (r, c) is (c + 0.5, r + 0.5).
        typical: size and shape of cells that are labelled already.
        image_id: goes into the instances.
        source: goes into the instances.
        model_version: goes into the instances.

    Returns:
        0 or 1 instances; score = the IoU that SAM expects, the least one where answers are joined.

    Raises:
        NonFiniteError: SAM gave NaN or infinity.
    """
    shape = embedding.shape
    prompts = _inside(prompts, shape)
    found: list[_Candidate] = []
    for asked in _split(prompts):
        best = _best(sam, embedding, asked, typical)
        if best is not None:
            found.append(best)
            again = _missed(asked, best.crop, shape)
            second = None if again is None else _best(sam, embedding, again, typical)
            found += [] if second is None else [second]
    crop = _joined([candidate.crop for candidate in found], prompts, shape)
    return Instances.build(
        shape,
        [] if crop is None else [crop.box_xyxy],
        [] if crop is None else [crop.mask],
        scores=[] if crop is None else [min(candidate.score for candidate in found)],
        image_id=image_id,
        source=source,
        model_version=model_version,
    )


def _inside(prompts: Prompts, shape: tuple[int, int]) -> Prompts:
    """The prompts with points on the image's edge moved into its outermost pixels."""
    last = np.nextafter(np.array([shape[1], shape[0]], np.float64), 0)
    return replace(prompts, points_xy=np.clip(prompts.points_xy.reshape(-1, 2), 0, last))


def _split(prompts: Prompts) -> list[Prompts]:
    """What SAM is asked one after the other: at most one box each."""
    points, positive, boxes = prompts.points_xy, prompts.positive, prompts.boxes_xyxy.reshape(-1, 4)
    held = np.all((points >= boxes[:, None, :2]) & (points <= boxes[:, None, 2:]), axis=2)
    parts = [_part(prompts, held[i] | ~positive, boxes[i : i + 1]) for i in range(len(boxes))]
    beside = positive & ~held.any(axis=0)
    if beside.any():
        parts.append(_part(prompts, beside | ~positive, boxes[:0]))
    return parts


def _part(prompts: Prompts, chosen: BoolArray, boxes: npt.NDArray[np.float64]) -> Prompts:
    return replace(prompts, points_xy=prompts.points_xy[chosen], positive=prompts.positive[chosen], boxes_xyxy=boxes)


def _missed(asked: Prompts, crop: Crop, shape: tuple[int, int]) -> Prompts | None:
    """The prompt for positive points that the answer leaves out; None where it holds all of them."""
    whole = _paste([crop], shape)
    labels = whole.mask.astype(np.int32)
    chosen = ~asked.positive
    for i in np.flatnonzero(asked.positive).tolist():
        one = whole.points(_part(asked, np.arange(len(chosen)) == i, asked.boxes_xyxy), True)
        chosen[i] = not (one and cell_near(labels, one[0]))
    return _part(asked, chosen, asked.boxes_xyxy[:0]) if chosen[asked.positive].any() else None


def _best(sam: Answering, embedding: Encoded, asked: Prompts, typical: Typical | None) -> _Candidate | None:
    """The mask that one prompt means most likely."""
    given: dict[str, Any] = {}
    if len(asked.points_xy):
        given |= {"points": asked.points_xy[None], "point_labels": asked.positive[None].astype(np.int64)}
    if len(asked.boxes_xyxy):
        given["boxes"] = asked.boxes_xyxy
    clear = len(asked.boxes_xyxy) > 0 or len(asked.points_xy) > 1
    answer = sam.decode(embedding, multimask="all" if clear else True, **given)
    crops = answer.crops[0]
    order = sorted(range(len(crops)), key=lambda k: _MIDDLE_FIRST.index(k) if k in _MIDDLE_FIRST else k)
    candidates: list[_Candidate] = []
    for k in order:
        crop = crops[k]
        if crop is not None:
            candidates += _candidate(crop, float(answer.scores[0, k]), asked, embedding.shape)
    if typical is not None and candidates:
        boxes, masks = zip(*(candidate.crop for candidate in candidates), strict=True)
        usual = typical.of(masks, cut=touches_edge(Instances.build(embedding.shape, boxes, masks)))
        weights = (TYPICAL_WEIGHT / 2 if clear else TYPICAL_WEIGHT) * np.log(usual)
        candidates = [c._replace(value=c.value + float(w)) for c, w in zip(candidates, weights, strict=True)]
    return max(candidates, key=lambda candidate: candidate.value, default=None)


def _candidate(crop: Crop, score: float, asked: Prompts, shape: tuple[int, int]) -> list[_Candidate]:
    """The mask cut to what is meant, with its value but for typicality; none where nothing of it is meant."""
    piece = _paste([crop], shape)
    for box in asked.boxes_xyxy:
        piece = piece.within(box)
    held = np.count_nonzero(piece.mask) / np.count_nonzero(crop.mask)
    positive, n_positive = piece.points(asked, True), int(asked.positive.sum())
    mask = _filled(close_gaps(piece.mask) if len(asked.boxes_xyxy) or n_positive > 1 else piece.mask)
    pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1]
    wanted = np.zeros(int(pieces.max()) + 1, np.bool_)
    if n_positive:
        wanted[[cell_near(pieces, point) for point in positive]] = True
        share = sum(bool(cell_near(pieces, point)) for point in positive) / n_positive
    else:
        wanted[_largest_in(pieces, asked.boxes_xyxy[0], piece)], share = True, 1.0
    wanted[0] = False
    mask = wanted[pieces]
    negative = [point for point in piece.points(asked, False) if mask[point]]
    if negative:
        mask = cut_away(mask, positive, negative)
    cut = piece._replace(mask=mask).crop()
    if cut is None:
        return []
    if len(asked.boxes_xyxy):
        share *= max(_box_iou(cut.box_xyxy, asked.boxes_xyxy[0]), _LEAST_SCORE)
    value = math.log(max(score, _LEAST_SCORE)) + PROMPT_WEIGHT * math.log(share) + BEYOND_WEIGHT * math.log(held)
    return [_Candidate(cut, score, value + (math.log(CUT_PENALTY) if negative else 0))]


def _filled(mask: BoolArray) -> BoolArray:
    """The mask with its holes, but for holes that are larger than the mask: what is meant is not their frame."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED)
    return filled.astype(np.bool_) if cv2.countNonZero(filled) <= 2 * np.count_nonzero(mask) else mask


def _largest_in(pieces: IntArray, box: npt.NDArray[np.float64], frame: _Piece) -> int:
    """The number of the piece with the most pixels whose centres lie in the box; 0 where none does."""
    x0, y0, x1, y1 = (int(np.clip(round(v), 0, None)) for v in box - (frame.column, frame.row) * 2)
    counts = np.bincount(pieces[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].ravel(), minlength=1)
    counts[0] = 0
    return int(counts.argmax())


def _box_iou(found: Sequence[float], drawn: npt.NDArray[np.float64]) -> float:
    x0, y0, x1, y1 = found
    a0, b0, a1, b1 = drawn.tolist()
    shared = max(min(x1, a1) - max(x0, a0), 0) * max(min(y1, b1) - max(y0, b0), 0)
    return float(shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared))


def _paste(crops: Sequence[Crop], shape: tuple[int, int]) -> _Piece:
    """At least one mask in a window with a margin, as far as the image reaches."""
    boxes = np.array([crop.box_xyxy for crop in crops])
    left, top = np.maximum(boxes[:, :2].min(axis=0) - MARGIN, 0).tolist()
    right, bottom = np.minimum(boxes[:, 2:].max(axis=0) + MARGIN, shape[::-1]).tolist()
    mask = np.zeros((bottom - top, right - left), np.bool_)
    for (x0, y0, x1, y1), part in crops:
        mask[y0 - top : y1 - top, x0 - left : x1 - left] |= part
    return _Piece(mask, top, left)


def _joined(crops: Sequence[Crop], prompts: Prompts, shape: tuple[int, int]) -> Crop | None:
    """Several answers as one mask, without the side of negative points that closing a gap took in."""
    if len(crops) < 2:
        return crops[0] if crops else None
    piece = _paste(crops, shape)
    mask = close_gaps(piece.mask)
    negative = [point for point in piece.points(prompts, False) if mask[point]]
    if negative:
        mask = cut_away(mask, piece.points(prompts, True), negative)
    return piece._replace(mask=mask).crop()
