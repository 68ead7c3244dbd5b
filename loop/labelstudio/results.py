"""Cells as Label Studio's result items, and back: percent of the image (0..100) there, pixels here.

Written: polygons, and a brush or bitmask region for a cell that one ring cannot hold. Read: polygon, brush, bitmask,
rectangle and ellipse regions. A pixel belongs to a drawn shape when its centre does.
"""

import itertools
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from loop.errors import InputError, LabelError, NonFiniteError
from loop.labelstudio.interface import UNUSABLE, Control, Interface
from loop.labelstudio.regions import (
    Cell,
    add_area,
    check_frame,
    is_done_area,
    is_prompt,
    kind_of,
    label_names,
    name_of,
    origin_of,
    read_cell,
    read_pixels,
    value_of,
)
from loop.labelstudio.rle import encode_brush
from loop.labelstudio.shapes import number, png_url, rectangle_ring, to_percent, to_pixels
from loop.rings import MIN_POLYGON_IOU, Outline, PointArray, fewer_corners, outlines
from loop.types import BoolArray, Instances, Source

logger = logging.getLogger(__name__)

_BORDER_PX = 2
_NAMESPACE = uuid.UUID("6f1f63a2-5c0e-4d0c-9a43-0d6f2a1c7b58")
# Result items that are no shapes on the image; "" is what is left of "labels".
_NOT_SHAPES = frozenset(
    ["", "choices", "textarea", "rating", "number", "taxonomy", "datetime", "pairwise", "ranker", "relation"]
)


@dataclass(frozen=True, eq=False)
class ParsedAnnotation:
    """What an annotation says.

    Attributes:
        instances: the cells, in the annotation's order; none where a person submitted "no cells here". Of a person's
            cells each knows whether it was drawn, accepted or edited.
        prompts_left: how many keypoints and smart boxes were left over; they are no cells.
        unknown_labels: label names that the config lacks, each once. Their regions are left out: the caller refuses
            the annotation or reports it.
        unreadable: one text for each region that was left out because it is damaged, empty or of a kind that holds no
            cell, with its id and the reason.
        done: (H, W) bool, the union of the areas that the person declared done; None where there is none, which says
            that the whole image is.
    """

    instances: Instances
    prompts_left: int
    unknown_labels: tuple[str, ...]
    unreadable: tuple[str, ...]
    done: BoolArray | None = None

    @property
    def whole(self) -> bool:
        """True where the whole image is labelled, so that it may measure a model."""
        return self.done is None or bool(self.done.all())

    def known(self) -> BoolArray | None:
        """(H, W) bool: where the labels say what is there; None = everywhere.

        That is in the done areas, and in each drawn shape with a border of 2 px (diagonally too), wherever it lies.
        """
        if self.done is None or self.whole:
            return None
        drawn = np.zeros(self.instances.shape, np.uint8)
        for (x0, y0, x1, y1), mask in zip(self.instances.boxes_xyxy.tolist(), self.instances.masks, strict=True):
            drawn[y0:y1, x0:x1] |= mask
        known = self.done | (cv2.dilate(drawn, np.ones((2 * _BORDER_PX + 1,) * 2, np.uint8)) > 0)
        return None if known.all() else known


@dataclass(frozen=True, eq=False)
class Prompts:
    """Hints of a person's smart tool, px of the image.

    Attributes:
        points_xy: (P, 2) float64.
        positive: (P,) bool; False = "not this".
        boxes_xyxy: (B, 4) float64, x0 <= x1, y0 <= y1.
        label: the class that was chosen for them, or "".
    """

    points_xy: PointArray
    positive: BoolArray
    boxes_xyxy: PointArray
    label: str


def to_results(
    instances: Instances,
    interface: Interface,
    *,
    tolerance_px: float = 0.5,
    max_points: int = 0,
    id_seed: str = "",
    doubtful_below: float = 0.0,
) -> list[dict[str, Any]]:
    """One result item for each cell, in order, as Label Studio imports them.

    A cell becomes a polygon. One that no polygon holds at IoU 0.97 (large holes, several parts) becomes a brush or
    bitmask region where the config has such a control, else its outer ring. Where the polygons have more corners in all
    than the budget they are simplified further, each no further than IoU 0.97 with its cell; a line in the log says
    what that cost, and how many corners remain where the budget cannot be kept.

    Args:
        instances: N cells, 0 included. `labels` index `interface.labels`.
        interface: of the project's label config.
        tolerance_px: how far a polygon may leave the cell's border, px >= 0.
        max_points: budget of corners of all polygons; 0 = no limit.
        id_seed: told apart from other results for the same image and model, e.g. the suggestions of one click:
            ids follow from image id, model version, this and the cell's place, so equal calls give equal ids.
        doubtful_below: cells of class 0 with a score under this get the label `interface.doubtful`, where the config
            has it. Only for scores that are confidences.

    Raises:
        LabelError: a cell's label is not in the config, or none of its controls that hold masks has it.
        NonFiniteError: a score is NaN or infinite.
    """
    height, width = instances.shape
    seed = uuid.uuid5(_NAMESPACE, "\n".join([instances.image_id, instances.model_version, id_seed]))
    origin = "manual" if instances.source.startswith("human") else "prediction"
    targets = _targets(instances, interface)
    polygons = _polygons(instances, targets, tolerance_px, max_points)
    limit = float(np.float32(doubtful_below))
    results = []
    for i, (index, score) in enumerate(zip(instances.labels.tolist(), instances.scores.tolist(), strict=True)):
        if not math.isfinite(score):
            raise NonFiniteError(f"cell {i} of image {instances.image_id!r} has score {score}; expected 0..1")
        doubtful = interface.doubtful if score < limit and index == 0 else ""
        control, value = _shape(instances, i, targets[index], polygons.get(i))
        label = doubtful if doubtful in control.labels else targets[index].label
        results.append(
            {
                "id": f"{seed.hex[:12]}-{i}",
                "from_name": control.name,
                "to_name": interface.image_name,
                "type": control.kind,
                "origin": origin,
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": round(score, 4),
                "value": {**value, control.kind: [label]},
            }
        )
    return results


def from_results(
    results: Sequence[Any],
    interface: Interface,
    shape: tuple[int, int],
    *,
    image_id: str = "",
    source: Source = "human",
    started_from: str = "",
    offered: Sequence[Any] = (),
) -> ParsedAnnotation:
    """The cells of an annotation's (or prediction's) result items.

    A region without a label gets the only one where the config has one class; of several labels the first counts. One
    of the label `interface.doubtful` is a cell of class 0: whoever submitted it saw it. One of `interface.done` is no
    cell but a done area. Cells of a model keep their score; a person's have score 1.

    A person's cell is "human-accepted" where its region says that it came from a prediction and still covers the same
    pixels, under the same class, as the offered region of its id (or no region of that id was offered: the answer to a
    click), and "human-edited" where it does not, or says itself that it was changed. Label Studio 1.23 goes on saying
    "prediction" of a region whose corners were dragged, so without `offered` such edits stay unseen.

    Args:
        results: the `result` list.
        interface: of the project's label config.
        shape: (H, W) of the image, px.
        image_id: the image's stem.
        source: who drew them.
        started_from: the published version that the person saw, for the origins of cells that came from it.
        offered: the `result` list of that prediction, as it was published.

    Raises:
        LabelError: a shape was drawn on an image of another or unknown size, or on the image turned round. Nothing of
            such an annotation can be trusted, so it is refused as a whole.
    """
    regions = [region for region in results if isinstance(region, dict)]
    unreadable = [f"a {type(item).__name__} in place of a region" for item in results if not isinstance(item, dict)]
    unknown: list[str] = []
    cells: list[Cell] = []
    done: BoolArray | None = None
    before = {str(region.get("id")): region for region in offered if isinstance(region, dict)}
    shapes = [region for region in regions if kind_of(region) not in _NOT_SHAPES and not is_prompt(region, interface)]
    for region in shapes:
        check_frame(region, shape, image_id)
    for region, pixels in zip(shapes, read_pixels(shapes, shape), strict=True):
        try:
            if is_done_area(region, interface):
                done = np.zeros(shape, np.bool_) if done is None else done  # also where the area cannot be read
                add_area(pixels, done)
                continue
            cell = read_cell(region, interface, pixels)
            origin = origin_of(region, cell, before.get(str(region.get("id"))), interface, started_from)
        except (InputError, NonFiniteError) as error:
            unreadable.append(f"{name_of(region)}: {error}")
        else:
            unknown.extend(cell.unknown_labels)
            cells.extend([] if cell.unknown_labels else [cell._replace(origin=origin)])
    drawn_by_hand = source != "human" or all(cell.origin.source == "human" for cell in cells)
    instances = Instances.build(
        shape,
        [cell.crop.box_xyxy for cell in cells],
        [cell.crop.mask for cell in cells],
        labels=[cell.label for cell in cells],
        scores=[1.0 if source.startswith("human") else cell.score for cell in cells],
        image_id=image_id,
        source=source,
        origins=() if drawn_by_hand else [cell.origin for cell in cells],
    )
    prompts = [region for region in regions if is_prompt(region, interface)]
    return ParsedAnnotation(instances, len(prompts), tuple(dict.fromkeys(unknown)), tuple(unreadable), done)


def prompts_from_context(context: Mapping[str, Any] | None, shape: tuple[int, int]) -> Prompts:
    """The points and boxes of an interactive request's `context`, clipped to the image; none for an empty context.

    A point without `is_positive` is positive. A turned box is given as the upright box around it.

    Args:
        context: `params.context` of the request, {"result": [...]}.
        shape: (H, W) of the image, px.

    Raises:
        LabelError: a prompt is neither keypoint nor rectangle, has no numbers, or was placed on an image of another
            size; or the result is no list of prompts.
    """
    height, width = shape
    points, positive, boxes, labels = [], [], [], []
    regions = (context or {}).get("result") or []
    if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
        raise LabelError(f"the prompts are {str(regions)[:60]!r}; expected a list of objects")
    for region in regions:
        check_frame(region, shape, "")
        kind, value = kind_of(region), value_of(region)
        if kind == "keypoint":
            points.append(to_pixels([[number(value, "x"), number(value, "y")]], shape)[0])
            positive.append(region.get("is_positive") is not False)
        elif kind == "rectangle":
            corners = rectangle_ring(value, shape)
            boxes.append(np.concatenate([corners.min(axis=0), corners.max(axis=0)]))
        else:
            raise LabelError(f"{name_of(region)} is no prompt; expected keypoints or rectangles")
        labels.extend(label_names(value, kind))
    limits = np.array([width, height], np.float64)
    return Prompts(
        points_xy=np.clip(np.reshape(points, (-1, 2)), 0, limits),
        positive=np.array(positive, np.bool_),
        boxes_xyxy=np.clip(np.reshape(boxes, (-1, 4)), 0, np.tile(limits, 2)),
        label=labels[0] if labels else "",
    )


def is_unusable(results: Sequence[Any]) -> bool:
    """True where a person marked the image with the choice "unusable"."""
    values = [item.get("value") for item in results if isinstance(item, dict) and kind_of(item) == "choices"]
    chosen = [value.get("choices") for value in values if isinstance(value, dict)]
    return any(isinstance(names, list) and UNUSABLE in names for names in chosen)


class _Target(NamedTuple):
    """What a cell of one label is written with; `raster` holds holes and several parts, None where nothing does."""

    label: str
    control: Control
    raster: Control | None


def _targets(instances: Instances, interface: Interface) -> dict[int, _Target]:
    """Target of each label index among the cells."""
    targets: dict[int, _Target] = {}
    for i, index in enumerate(instances.labels.tolist()):
        if index in targets:
            continue
        label = interface.labels[index] if 0 <= index < len(interface.labels) else None
        control = None if label is None else interface.mask_control(label)
        if label is None or control is None:
            raise LabelError(
                f"cell {i} of image {instances.image_id!r} has label {index} ({label}), which no mask control of the"
                f" label config has; its labels are {', '.join(interface.labels)}"
            )
        targets[index] = _Target(label, control, interface.mask_control(label, "raster"))
    return targets


def _polygons(
    instances: Instances, targets: Mapping[int, _Target], tolerance_px: float, max_points: int
) -> dict[int, list[list[float]]]:
    """The points of each cell that is written as a polygon, in percent, by the cell's place."""
    drawn = [targets[index] for index in instances.labels.tolist()]
    at = [i for i, target in enumerate(drawn) if target.control.kind == "polygonlabels"]
    found = dict(zip(at, outlines([instances.masks[i] for i in at], tolerance_px), strict=True))
    found = {i: ring for i, ring in found.items() if ring.iou >= MIN_POLYGON_IOU or drawn[i].raster is None}
    rings = list(found.values())
    if not rings:
        return {}
    before = sum(len(ring.points_xy) for ring in rings)
    if max_points and before > max_points:
        rings = fewer_corners(rings, [instances.masks[i] for i in found], tolerance_px, max_points)
        _tell_budget(instances.image_id, before, rings, max_points)
    ends = np.cumsum([len(ring.points_xy) for ring in rings])
    corners = np.repeat(instances.boxes_xyxy[list(found), :2], np.diff(ends, prepend=0), axis=0)
    points = to_percent(np.concatenate([ring.points_xy for ring in rings]) + corners, instances.shape)
    parts = itertools.pairwise([0, *ends.tolist()])
    return {i: points[begin:end] for i, (begin, end) in zip(found, parts, strict=True)}


def _tell_budget(image_id: str, before: int, rings: Sequence[Outline], max_points: int) -> None:
    """Says what keeping to the budget of corners has cost."""
    corners, iou = sum(len(ring.points_xy) for ring in rings), [ring.iou for ring in rings]
    logger.info(
        "the %d polygons of image %r have %d corners in place of %d; IoU with the cells %.4f on average, %.4f at least",
        *(len(rings), image_id, corners, before, np.mean(iou), min(iou)),
    )
    if corners > max_points:
        logger.warning(
            "the polygons of image %r keep %d corners, over the budget of %d: with fewer, IoU would fall below %s",
            *(image_id, corners, max_points, MIN_POLYGON_IOU),
        )


def _shape(
    instances: Instances, i: int, target: _Target, points: list[list[float]] | None
) -> tuple[Control, dict[str, Any]]:
    """Control and value, without the label, of one cell's region; `points` where it is a polygon."""
    if points is not None:
        return target.control, {"points": points, "closed": True}
    x0, y0, x1, y1 = instances.boxes_xyxy[i].tolist()
    control = target.raster or target.control
    if control.kind == "bitmasklabels":
        full = np.zeros(instances.shape, np.bool_)
        full[y0:y1, x0:x1] = instances.masks[i]
        return control, {"imageDataURL": png_url(full)}
    return control, {"format": "rle", "rle": encode_brush(instances.masks[i], instances.shape, (x0, y0))}
