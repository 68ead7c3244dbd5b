"""The cell that a person points at, from a model's probability maps."""

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.segmentation import watershed

from loop.config import InstanceConfig
from loop.labelstudio.results import Prompts
from loop.masks import from_masks, to_dense, to_label_image
from loop.models.watershed import check_maps, fill_holes, segment
from loop.types import BoolArray, FloatArray, Instances, IntArray, Source

NEAR = 3
CLEAR = 0.05
SHARES = (0.5, 0.7, 0.85)
GAP = 5
COMPACT = 0.4
"""How far the watershed of a cut rises from its points, over the radius of the region. Of 1200 cuts between two drawn
discs or rods from points anywhere in them the mean IoU with the true half was 0.50 without and 0.86 with it; above 0.5
small cells beside large ones suffer."""
MARGIN = 192

Points = list[tuple[int, int]]


class Scene(NamedTuple):
    """What a click is answered from.

    Attributes:
        probs: (2, H, W) float32 in [0, 1], interior and border.
        nuclei: (H, W) float32 in [0, 1], or None where the model does not say.
        instances: the cells that a sparse model found, which may overlap; None where they are found in `probs`.
    """

    probs: FloatArray
    nuclei: FloatArray | None = None
    instances: Instances | None = None

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        masks = 0 if self.instances is None else sum(mask.nbytes for mask in self.instances.masks)
        return int(self.probs.nbytes) + (0 if self.nuclei is None else int(self.nuclei.nbytes)) + masks


class _View(NamedTuple):
    """The part of an image that is looked at: maps (2, h, w), cells (h, w) with 0 = none, prompts as row, col.

    `whole` holds the mask (h, w) of cell i + 1 where cells overlap, so that `cells` cannot show them whole; else ().
    """

    probs: FloatArray
    cells: IntArray
    whole: tuple[BoolArray, ...]
    positive: Points
    negative: Points
    boxes: list[tuple[int, int, int, int]]


def cell_at(
    scene: Scene,
    prompts: Prompts,
    config: InstanceConfig,
    *,
    image_id: str = "",
    source: Source = "model",
    model_version: str = "",
) -> Instances:
    """The one cell that prompts mean, or none.

    - A positive point: the cell under it or within 3 px, found by the watershed or by a sparse model itself. Where
      there is none: the region around the point whose interior probability stays above half (or more, where half would
      leak) of the highest within 3 px of it; nothing where that is below 0.05 (clear background).
    - Several positive points: their cells together, gaps of up to 4 px closed.
    - A box: the cells that lie in it by half or more, gaps of up to 4 px between them closed, else the pixels above the
      threshold in it, else those above half of its highest probability; cut to the box, largest part. Points and boxes
      together: the union.
    - Negative points within 3 px of the result: it is divided between positive and negative points by a watershed, and
      the negative side is dropped. Only negative points: nothing.

    Args:
        scene: what the model sees in the image.
        prompts: px of the image; points outside are moved to its edge.
        config: thresholds; `min_area` and `min_score` do not apply to what a person points at.
        image_id: goes into the instances.
        source: goes into the instances.
        model_version: goes into the instances.

    Returns:
        0 or 1 instances; score = mean interior probability in the mask.

    Raises:
        ShapeError: `probs` is not (2, H, W).
        NonFiniteError: a probability near the prompts is NaN or infinite.
    """
    probs = scene.probs
    shape = (probs.shape[-2], probs.shape[-1])
    margin = MARGIN
    while True:
        rows, columns = _window(prompts, shape, margin)
        part = probs[..., rows, columns]
        check_maps(part, image_id)
        region = _region(_view(scene, prompts, config, rows, columns), config)
        if not _is_cut(region, rows, columns, shape):
            break
        margin *= 4
    if not region.any():
        return Instances.build(shape, image_id=image_id, source=source, model_version=model_version)
    full = np.zeros(shape, np.bool_)
    full[rows, columns] = region
    score = float(np.clip(part[0][region].mean(dtype=np.float64), 0, 1))
    return from_masks([full], shape, scores=[score], image_id=image_id, source=source, model_version=model_version)


def _window(prompts: Prompts, shape: tuple[int, int], margin: int) -> tuple[slice, slice]:
    """Rows and columns around all prompts; a cell that its edge cuts is looked at again in a larger one."""
    xy = np.concatenate([prompts.points_xy.reshape(-1, 2), prompts.boxes_xyxy.reshape(-1, 2)])
    if len(xy) == 0:
        return slice(0, shape[0]), slice(0, shape[1])
    low = np.floor(xy.min(axis=0)).astype(int) - margin
    high = np.ceil(xy.max(axis=0)).astype(int) + margin + 1
    x0, y0 = (int(np.clip(low[i], 0, shape[1 - i] - 1)) for i in range(2))
    x1, y1 = (int(np.clip(high[i], 1, shape[1 - i])) for i in range(2))
    return slice(y0, y1), slice(x0, x1)


def _is_cut(region: BoolArray, rows: slice, columns: slice, shape: tuple[int, int]) -> bool:
    """Whether the region reaches an edge of the window that is no edge of the image."""
    return bool(
        (rows.start > 0 and region[0].any())
        or (rows.stop < shape[0] and region[-1].any())
        or (columns.start > 0 and region[:, 0].any())
        or (columns.stop < shape[1] and region[:, -1].any())
    )


def _view(scene: Scene, prompts: Prompts, config: InstanceConfig, rows: slice, columns: slice) -> _View:
    top, left = rows.start, columns.start
    probs = scene.probs[..., rows, columns]
    height, width = probs.shape[1:]
    if scene.instances is None:
        whole: tuple[BoolArray, ...] = ()
        nuclei = None if scene.nuclei is None else scene.nuclei[rows, columns]
        cells, _ = segment(probs, config.model_copy(update={"min_area": 1}), nuclei=nuclei)
    else:
        near = _moved(scene.instances, rows, columns)
        cells = to_label_image(near, on_overlap="score")
        whole = tuple(to_dense(near))

    def pixel(x: float, y: float) -> tuple[int, int]:
        return int(np.clip(np.floor(y) - top, 0, height - 1)), int(np.clip(np.floor(x) - left, 0, width - 1))

    points = [pixel(float(x), float(y)) for x, y in prompts.points_xy.reshape(-1, 2)]
    drawn = []
    for x0, y0, x1, y1 in prompts.boxes_xyxy.reshape(-1, 4):
        (row0, col0), (row1, col1) = pixel(x0, y0), pixel(np.ceil(x1) - 1, np.ceil(y1) - 1)
        drawn.append((row0, col0, max(row1, row0) + 1, max(col1, col0) + 1))
    return _View(
        probs,
        cells,
        whole,
        [p for p, keep in zip(points, prompts.positive, strict=True) if keep],
        [p for p, keep in zip(points, prompts.positive, strict=True) if not keep],
        drawn,
    )


def _moved(cells: Instances, rows: slice, columns: slice) -> Instances:
    """The parts of the cells inside a window, in the window's px; cells that lie outside are gone."""
    corner = np.array([columns.start, rows.start] * 2, np.int32)
    size = np.array([columns.stop - columns.start, rows.stop - rows.start] * 2, np.int32)
    boxes = cells.boxes_xyxy - corner
    inside = np.clip(boxes, 0, size)
    seen = np.flatnonzero((inside[:, 0] < inside[:, 2]) & (inside[:, 1] < inside[:, 3]))
    masks = []
    for i in seen.tolist():
        x0, y0, x1, y1 = (inside[i] - np.tile(boxes[i, :2], 2)).tolist()
        masks.append(cells.masks[i][y0:y1, x0:x1])
    return Instances.build((int(size[1]), int(size[0])), inside[seen], masks, scores=cells.scores[seen])


def _region(view: _View, config: InstanceConfig) -> BoolArray:
    region = np.zeros(view.cells.shape, np.bool_)
    for point in view.positive:
        region |= _under_point(view, point)
    for box in view.boxes:
        region |= _inside_box(view, box, config)
    if len(view.positive) + len(view.boxes) > 1:
        region = close_gaps(region)
    near = [p for p in view.negative if region[_around(p, region.shape, NEAR)].any()]
    if near and region.any():
        region = cut_away(region, view.positive, near, border=view.probs[1])
    return region


def _around(point: tuple[int, int], shape: tuple[int, ...], radius: int) -> tuple[slice, slice]:
    row, column = point
    return (
        slice(max(row - radius, 0), min(row + radius + 1, shape[0])),
        slice(max(column - radius, 0), min(column + radius + 1, shape[1])),
    )


def _under_point(view: _View, point: tuple[int, int]) -> BoolArray:
    found = cell_near(view.cells, point)
    if found:
        return view.whole[found - 1] if view.whole else np.asarray(view.cells == found)
    free = view.cells == 0
    interior = np.where(free, view.probs[0], 0)
    window = _around(point, interior.shape, NEAR)
    highest = float(interior[window].max())
    if highest < CLEAR:
        return np.zeros(free.shape, np.bool_)
    offset = np.unravel_index(int(interior[window].argmax()), interior[window].shape)
    start = (window[0].start + int(offset[0]), window[1].start + int(offset[1]))
    limit = _largest_plausible(view.cells)
    grown = free
    for share in SHARES:
        pieces, _ = ndimage.label(interior >= share * highest)
        grown = pieces == pieces[start]
        if grown.sum() <= limit:
            break
    else:  # whatever the share, the region runs over: there is no cell here that can be told from its surroundings
        return np.zeros(free.shape, np.bool_)
    return np.asarray(fill_holes(grown.astype(np.int32)).astype(np.bool_) & free)


def cell_near(cells: IntArray, point: tuple[int, int]) -> int:
    """The value under a point (row, col) of a label image, else that of the nearest pixel of a cell within 3 px, or 0.

    Args:
        cells: (H, W) int32, 0 = background.
        point: row, column; where it lies outside nothing is under it.
    """
    window = _around(point, cells.shape, NEAR)
    rows, columns = np.nonzero(cells[window])
    if len(rows) == 0:
        return 0
    squared = (rows + window[0].start - point[0]) ** 2 + (columns + window[1].start - point[1]) ** 2
    if squared.min() > NEAR**2:
        return 0
    best = int(squared.argmin())
    return int(cells[window][rows[best], columns[best]])


def _largest_plausible(cells: IntArray) -> float:
    """An area in px beyond which a grown region has leaked: four median cells, or a quarter of the view without any."""
    areas = np.bincount(cells.ravel())[1:]
    return 4 * float(np.median(areas)) if len(areas) else cells.size / 4


def _inside_box(view: _View, box: tuple[int, int, int, int], config: InstanceConfig) -> BoolArray:
    window = np.s_[box[0] : box[2], box[1] : box[3]]
    cells, interior = view.cells[window], view.probs[0][window]
    everywhere = np.bincount(view.cells.ravel())
    inside = np.bincount(cells.ravel(), minlength=len(everywhere))
    mostly = 2 * inside >= np.maximum(everywhere, 1)
    mostly[0] = False
    chosen = mostly[cells]
    chosen = close_gaps(chosen) & (chosen | (cells == 0)) if chosen.any() else interior > config.foreground
    highest = float(interior.max())
    if not chosen.any() and highest >= CLEAR:
        chosen = interior >= SHARES[0] * highest
    region = np.zeros(view.cells.shape, np.bool_)
    region[window] = fill_holes(_largest_part(chosen).astype(np.int32)).astype(np.bool_)
    return region


def _largest_part(mask: BoolArray) -> BoolArray:
    """The largest 4-connected part of a mask (H, W); none of it where it is empty."""
    pieces, _ = ndimage.label(mask)
    areas = np.bincount(pieces.ravel())
    areas[0] = 0
    return np.asarray((pieces == areas.argmax()) & mask, dtype=np.bool_)


def close_gaps(region: BoolArray) -> BoolArray:
    """The region (H, W) with gaps of up to 4 px between its parts closed, where that makes fewer parts of it."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (GAP, GAP))
    padded = np.pad(region.astype(np.uint8), GAP)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)
    fewer = cv2.connectedComponents(closed, connectivity=4)[0] < cv2.connectedComponents(padded, connectivity=4)[0]
    return np.asarray(closed[GAP:-GAP, GAP:-GAP].astype(np.bool_)) if fewer else region


def cut_away(region: BoolArray, positive: Points, negative: Points, *, border: FloatArray | None = None) -> BoolArray:
    """What is left of a region after a watershed from positive and negative points gave the rest away.

    The landscape falls towards the middle of cells (distance to the region's edge) and rises at predicted borders and,
    by COMPACT, with the distance from the points: without that a point beside the middle of its cell kept next to
    nothing where no neck parts the cells. Where no positive point lies in the region, the pixel farthest from both its
    edge and the negative points is one.

    Args:
        region: (H, W) bool, not empty.
        positive: row, col inside (H, W); those beside the region do not count.
        negative: row, col inside (H, W), at least one; each takes what lies around the pixel of the region nearest to
            it.
        border: (H, W) float32 in [0, 1]; None where no model says where borders are.

    Returns:
        (H, W) bool; empty where every positive point is a negative one too.

    Source: Neubert and Protzel 2014, "Compact Watershed and Preemptive SLIC", section II.
    """
    depth = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    deepest = max(float(depth.max()), 1.0)
    landscape = (0 if border is None else border) - depth / deepest
    markers = np.zeros(region.shape, np.int32)
    inside = [p for p in positive if region[p]] or [_farthest(depth, region, negative)]
    for value, points in ((1, inside), (2, negative)):
        for point in points:
            markers[_closest(region, point)] = value
    if not (markers == 1).any():
        return np.zeros(region.shape, np.bool_)
    sides = watershed(landscape, markers, mask=region, compactness=COMPACT / deepest)
    kept, _ = ndimage.label(sides == 1)
    wanted = np.unique(kept[markers == 1])
    return np.asarray(np.isin(kept, wanted[wanted > 0]), dtype=np.bool_)


def _farthest(depth: npt.NDArray[np.float32], region: BoolArray, negative: Points) -> tuple[int, int]:
    others = np.ones(region.shape, np.uint8)
    for point in negative:
        others[point] = 0
    distance = cv2.distanceTransform(others, cv2.DIST_L2, 5)
    best = np.unravel_index(int(np.where(region, np.minimum(depth, distance), -1).argmax()), region.shape)
    return int(best[0]), int(best[1])


def _closest(region: BoolArray, point: tuple[int, int]) -> tuple[int, int]:
    """The pixel of a region (not empty) nearest to a point."""
    rows, columns = np.nonzero(region)
    best = int(((rows - point[0]) ** 2 + (columns - point[1]) ** 2).argmin())
    return int(rows[best]), int(columns[best])
