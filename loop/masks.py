"""Masks as label images, dense stacks, COCO run lengths and polygons: pure functions on `Instances`."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from loop.errors import LabelError, OverlapError, ShapeError
from loop.rings import Crop, PointArray, crop_mask, fill_rings, outlines
from loop.types import BoolArray, FloatArray, Instances, IntArray, Origin, Source


class Fields(TypedDict, total=False):
    """What `Instances.build` takes beside boxes and masks: a score, label, weight and origin for each mask, ..."""

    scores: Sequence[float] | FloatArray | None
    labels: Sequence[int] | IntArray | None
    weights: Sequence[float] | FloatArray | None
    image_id: str
    source: Source
    model_version: str
    origins: Sequence[Origin]


class CocoRle(TypedDict):
    """COCO's compressed run lengths: size [H, W], counts as pycocotools writes them."""

    size: list[int]
    counts: str


def from_label_image(
    labels: npt.NDArray[np.integer],
    *,
    image_id: str = "",
    source: Source = "human",
    scores: Sequence[float] | FloatArray | None = None,
    model_version: str = "",
) -> Instances:
    """One instance for each positive value, in ascending order of the values; an image of zeros gives none.

    Args:
        labels: (H, W) integers >= 0, 0 = background. A value may have several parts, they stay one instance.
        image_id: the image's stem.
        source: who drew them.
        scores: one in [0, 1] for each value, ascending; 1 by default.
        model_version: registry version of the model that drew them.

    Raises:
        ShapeError: `labels` is not two-dimensional.
        LabelError: `labels` is not of an integer type or holds negative values.
    """
    if labels.ndim != 2:
        raise ShapeError(f"label image of {image_id!r} has shape {labels.shape}; expected (H, W)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise LabelError(f"label image of {image_id!r} is {labels.dtype}; expected integers, 0 = background")
    if labels.size and labels.min() < 0:
        raise LabelError(f"label image of {image_id!r} holds {labels.min()}; expected values >= 0, 0 = background")
    highest = int(labels.max(initial=0))
    if highest > 65535:  # find_objects takes memory with the highest value, so sparse large ones are renumbered
        values, inverse = np.unique(labels, return_inverse=True)
        labels = inverse.reshape(labels.shape) + int(values[0] != 0)
    boxes, masks = [], []
    for value, place in enumerate(ndimage.find_objects(labels.astype(np.int32, copy=False)), start=1):
        if place is not None:
            rows, columns = place
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
            masks.append(labels[place] == value)
    return Instances.build(
        (labels.shape[0], labels.shape[1]),
        boxes,
        masks,
        scores=scores,
        image_id=image_id,
        source=source,
        model_version=model_version,
    )


def from_masks(masks: Sequence[BoolArray], shape: tuple[int, int], **fields: Unpack[Fields]) -> Instances:
    """Instances cropped from full-size masks; empty masks are dropped, with their scores, labels, weights and origins.

    Args:
        masks: N arrays (H, W) bool, they may overlap.
        shape: (H, W) of the image, px.
        **fields: what `Instances.build` takes beside boxes and masks (scores, labels, weights, image_id, ...).

    Raises:
        ShapeError: a mask is not (H, W).
    """
    for i, mask in enumerate(masks):
        if mask.shape != tuple(shape):
            raise ShapeError(f"mask {i} is {mask.shape}; the image is {tuple(shape)}")
    return _gather(shape, [crop_mask(mask) for mask in masks], fields)


def to_label_image(instances: Instances, *, on_overlap: Literal["error", "score", "order"] = "error") -> IntArray:
    """(H, W) int32 with i + 1 where instance i lies and 0 elsewhere: a lossy view where masks overlap.

    Args:
        instances: any, 0 included.
        on_overlap: who gets a pixel that several claim: "score" the highest score (the earlier of equals), "order" the
            last, as Label Studio draws them. An instance wholly covered by others has no pixel left.

    Raises:
        OverlapError: masks overlap and `on_overlap` is "error".
    """
    labels = np.zeros(instances.shape, np.int32)
    n = len(instances)
    order = np.argsort(-instances.scores, kind="stable")[::-1] if on_overlap == "score" else np.arange(n)
    for i in order.tolist():
        x0, y0, x1, y1 = instances.boxes_xyxy[i]
        window, mask = labels[y0:y1, x0:x1], instances.masks[i]
        if on_overlap == "error" and window[mask].any():
            other = int(window[mask].max()) - 1
            raise OverlapError(
                f"masks {other} and {i} of image {instances.image_id!r} share {int((window[mask] == other + 1).sum())}"
                ' px; a label image holds one cell a pixel: choose on_overlap="score" or "order"'
            )
        window[mask] = i + 1
    return labels


def to_dense(instances: Instances) -> BoolArray:
    """(N, H, W) bool. Costs N x H x W bytes: for tests and small images."""
    dense = np.zeros((len(instances), *instances.shape), np.bool_)
    for full, (x0, y0, x1, y1), mask in zip(dense, instances.boxes_xyxy, instances.masks, strict=True):
        full[y0:y1, x0:x1] = mask
    return dense


def to_coco_rle(instances: Instances) -> list[CocoRle]:
    """Compressed COCO run lengths of every mask, equal to pycocotools' `encode`; made from the crops alone."""
    height, width = instances.shape
    rles: list[CocoRle] = []
    for (x0, y0, _, _), mask in zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True):
        columns = np.pad(mask.T, ((0, 0), (1, 1))).astype(np.int8)
        change = np.diff(columns, axis=1)
        column, row = np.nonzero(change)
        turns = (x0 + column) * height + y0 + row  # start, end, start, end, ... in column-major order
        meets = np.flatnonzero(turns[1:-1:2] == turns[2::2])  # a run that goes on at the top of the next column
        turns = np.delete(turns, np.concatenate([2 * meets + 1, 2 * meets + 2]))
        counts = np.diff(np.concatenate([[0], turns, [height * width]]))
        if len(counts) > 1 and counts[-1] == 0:
            counts = counts[:-1]
        rles.append({"size": [height, width], "counts": _pack_counts(counts.tolist())})
    return rles


def from_coco_rle(rles: Sequence[CocoRle], shape: tuple[int, int], **fields: Unpack[Fields]) -> Instances:
    """Instances from compressed COCO run lengths, decoded into crops; empty masks are dropped as in `from_masks`.

    Args:
        rles: N masks as `to_coco_rle` or pycocotools gives them (counts as str).
        shape: (H, W) of the image, px.
        **fields: as in `from_masks`.

    Raises:
        ShapeError: a mask is of another size than the image.
        LabelError: run lengths that do not fill their mask exactly.
    """
    height, width = shape
    crops: list[Crop | None] = []
    for i, rle in enumerate(rles):
        if tuple(rle["size"]) != (height, width):
            raise ShapeError(f"run lengths {i} are of size {rle['size']}; the image is {[height, width]}")
        counts = np.array(_unpack_counts(rle["counts"]), np.int64)
        if counts.sum() != height * width or (counts < 0).any():
            raise LabelError(
                f"run lengths {i} cover {counts.sum()} px of {height * width}; expected COCO's compressed counts, whole"
            )
        ends = np.cumsum(counts)
        starts, stops = ends[: len(counts) - 1 : 2], ends[1::2]
        if not len(starts) or starts[0] == stops[-1]:
            crops.append(None)
            continue
        x0, x1 = int(starts[0] // height), int((stops[-1] - 1) // height) + 1
        steps = np.zeros((x1 - x0) * height + 1, np.int8)
        np.add.at(steps, starts - x0 * height, 1)
        np.add.at(steps, stops - x0 * height, -1)
        strip = np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_).reshape(x1 - x0, height).T
        crops.append(crop_mask(strip, x0=x0))
    return _gather(shape, crops, fields)


def to_polygons(instances: Instances, tolerance_px: float) -> list[PointArray]:
    """One closed ring (K, 2) float64 of x, y px for each instance, within `tolerance_px` of its border.

    See `outlines` for the ring and for what is lost of a cell with holes or several parts. Every cell without them
    keeps IoU >= 0.97 through `from_polygons`; at tolerance 0 it comes back exactly. The last point is not repeated.
    """
    rings = outlines(instances.masks, tolerance_px)
    return [ring.points_xy + box[:2] for ring, box in zip(rings, instances.boxes_xyxy, strict=True)]


def from_polygons(polygons: Sequence[PointArray], shape: tuple[int, int], **fields: Unpack[Fields]) -> Instances:
    """Instances of the pixels whose centres lie inside the rings: the inverse of `to_polygons`.

    Rings may be drawn by hand: any position, clipped to the image, either direction. A ring that crosses itself
    encloses what winds around it (non-zero rule), as browsers fill it. Rings around no pixel centre are dropped as
    empty masks are in `from_masks`.

    Args:
        polygons: N arrays (K, 2) of x, y px, K >= 3, closed whether or not the first point is repeated.
        shape: (H, W) of the image, px.
        **fields: as in `from_masks`.

    Raises:
        ShapeError: a ring is not (K, 2) with K >= 3.
        NonFiniteError: a coordinate is NaN or infinite.
    """
    return _gather(shape, fill_rings(polygons, shape), fields)


def _gather(shape: tuple[int, int], crops: Sequence[Crop | None], fields: Fields) -> Instances:
    kept = [i for i, crop in enumerate(crops) if crop is not None]
    full = [crop for crop in crops if crop is not None]

    def of_kept(name: str, values: Any) -> Any:
        if values is not None and len(values) != len(crops):
            raise ShapeError(f"{len(crops)} masks but {len(values)} {name}: give one for each mask")
        return None if values is None else np.asarray(values)[kept]

    origins = fields.get("origins", ())
    if origins and len(origins) != len(crops):
        raise ShapeError(f"{len(crops)} masks but {len(origins)} origins: give one for each mask, or none at all")
    return Instances.build(
        shape,
        [crop.box_xyxy for crop in full],
        [crop.mask for crop in full],
        scores=of_kept("scores", fields.get("scores")),
        labels=of_kept("labels", fields.get("labels")),
        weights=of_kept("weights", fields.get("weights")),
        image_id=fields.get("image_id", ""),
        source=fields.get("source", "human"),
        model_version=fields.get("model_version", ""),
        origins=[origins[i] for i in kept] if origins else (),
    )


def _pack_counts(counts: Sequence[int]) -> str:
    # COCO: from the fourth count on the difference to the last but one; 5 bits a character, least significant first,
    # bit 0x20 = more follow, the sign is the last character's bit 0x10.
    characters = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = rest & 0x1F
            rest >>= 5
            more = rest != (-1 if bits & 0x10 else 0)
            characters.append(chr(48 + (bits | 0x20 if more else bits)))
    return "".join(characters)


def _unpack_counts(text: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts


def to_layers(instances: Instances) -> npt.NDArray[np.uint16]:
    """Label layers that keep overlapping cells whole: (L, H, W) uint16, i + 1 where instance i lies, 0 elsewhere.

    Each cell goes into the first layer on which its pixels are free, so cells that overlap nowhere share one layer. One
    layer of zeros where there are no cells. `from_layers` is the inverse. Costs cells x layers.

    Raises:
        LabelError: more than 65,535 cells.
    """
    highest = np.iinfo(np.uint16).max
    if len(instances) > highest:
        raise LabelError(
            f"{instances.image_id!r} has {len(instances)} cells, 16 bits number {highest}; use COCO or cut the image up"
        )
    layers = [np.zeros(instances.shape, np.uint16)]
    for number, (box, mask) in enumerate(zip(instances.boxes_xyxy.tolist(), instances.masks, strict=True), start=1):
        x0, y0, x1, y1 = box
        free = next((layer for layer in layers if not layer[y0:y1, x0:x1][mask].any()), None)
        if free is None:
            free = np.zeros(instances.shape, np.uint16)
            layers.append(free)
        free[y0:y1, x0:x1][mask] = number
    return np.stack(layers)


def from_layers(layers: npt.NDArray[np.integer], **fields: Unpack[Fields]) -> Instances:
    """One instance for each positive value, in ascending order of the values, whichever layer it lies in.

    Args:
        layers: (L, H, W) integers >= 0, 0 = background; a value lies in one layer only.
        **fields: what `Instances.build` takes beside boxes and masks.

    Raises:
        ShapeError: `layers` is not three-dimensional.
        LabelError: a value lies in two layers, or is negative or no integer.
    """
    if layers.ndim != 3:
        raise ShapeError(f"label layers are {layers.shape}; expected (L, H, W)")
    found: dict[int, Crop] = {}
    for number, layer in enumerate(layers):
        cells = from_label_image(layer, image_id=fields.get("image_id", ""))
        values = [int(value) for value in np.unique(layer) if value > 0]
        for value, box, mask in zip(values, cells.boxes_xyxy.tolist(), cells.masks, strict=True):
            if value in found:
                raise LabelError(
                    f"value {value} lies in two layers, the second is {number + 1}; give each cell its own"
                )
            found[value] = Crop((box[0], box[1], box[2], box[3]), mask)
    return _gather((layers.shape[1], layers.shape[2]), [found[value] for value in sorted(found)], fields)
