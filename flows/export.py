"""The masks out of a project, in the formats that other tools read."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flows.context import LoopContext, image_ref
from flows.folders import coco_document, write_label_image, write_label_layers
from flows.freeze import newest_annotations, parse_annotation, split_nuclei
from flows.sync import sync
from loop.data.store import write_png
from loop.errors import InputError, LabelError
from loop.labelstudio.results import ParsedAnnotation
from loop.types import BoolArray, ImageRef, Instances

logger = logging.getLogger(__name__)

FORMATS = ("coco", "labels", "layers", "cellpose", "geojson")


@dataclass(frozen=True)
class ExportReport:
    """How many images and cells were written, where, and what was left out."""

    images: int
    cells: int
    out: str
    left_out: tuple[str, ...]


def export(context: LoopContext, out: Path, formats: Sequence[str]) -> ExportReport:
    """Writes the newest annotation of every labelled image (after a sync) below `out`, whatever rounds made of it.

    `coco`: coco.json, RLE masks, overlaps kept. `labels`: labels/STEM.png, 16-bit, where the first of two overlapping
    cells keeps their pixels; nuclei that are labelled beside the cells go to nuclei/STEM.png. `layers`:
    layers/STEM.tif, as many pages as keep overlapping cells whole, which `celloop train` reads as labels. `cellpose`:
    cellpose/STEM_masks.png, the cells under the name that Cellpose looks for. `geojson`: geojson/STEM.geojson, outlines
    in px with their holes and parts, as QuPath reads; they enclose exactly the pixels of the cells. Doubtful cells are
    cells. For an image that a person did only in part, done/STEM.png is 255 inside the done areas. An annotation that
    cannot be read is left out and named.

    Raises:
        InputError: a format is unknown.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise InputError(f"unknown format {', '.join(unknown)}; choose from {', '.join(FORMATS)}")
    sync(context)
    found, left_out = _labelled(context)
    out.mkdir(parents=True, exist_ok=True)
    names = context.interface.labels
    if "coco" in formats:
        pairs = [(ref, parsed.instances) for ref, parsed in found]
        (out / "coco.json").write_text(json.dumps(coco_document(pairs, names)), encoding="utf-8")
    for ref, parsed in found:
        drawn = parsed.instances
        if parsed.done is not None and not parsed.whole:
            write_png(parsed.done.astype(np.uint8) * 255, out / "done" / f"{ref.image_id}.png")
        cells, nuclei = split_nuclei(drawn, context.interface, context.config.publish.nucleus_label)
        if "labels" in formats:
            write_label_image(out / "labels", ref.image_id, cells)
            if nuclei is not None:
                write_label_image(out / "nuclei", ref.image_id, nuclei)
        if "layers" in formats:
            write_label_layers(out / "layers", ref.image_id, cells)
        if "cellpose" in formats:
            write_label_image(out / "cellpose", f"{ref.image_id}_masks", cells)
        if "geojson" in formats:
            _write_geojson(out / "geojson", ref, drawn, names)
    return ExportReport(len(found), sum(len(parsed.instances) for _, parsed in found), str(out), left_out)


def _labelled(context: LoopContext) -> tuple[list[tuple[ImageRef, ParsedAnnotation]], tuple[str, ...]]:
    """Every labelled image with what was drawn on it, and a line about each whose annotation cannot be read."""
    newest = newest_annotations(context.index.annotations(context.project_name))
    interface = context.interface
    found: list[tuple[ImageRef, ParsedAnnotation]] = []
    left_out: list[str] = []
    for row in context.index.images(context.project_name, state="labelled"):
        if row.image_id not in newest:
            continue
        try:
            found.append((image_ref(row), parse_annotation(newest[row.image_id], row, interface)))
        except LabelError as error:
            left_out.append(f"{row.image_id}: {error}")
            logger.warning("not exported from %s: %s: %s", context.project_name, row.image_id, error)
    return found, tuple(left_out)


def _write_geojson(directory: Path, ref: ImageRef, cells: Instances, names: Sequence[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    document = {"type": "FeatureCollection", "features": geojson_features(cells, names)}
    (directory / f"{ref.image_id}.geojson").write_text(json.dumps(document), encoding="utf-8")


def geojson_features(cells: Instances, names: Sequence[str]) -> list[dict[str, Any]]:
    """A feature for each cell: a Polygon, or a MultiPolygon where it has several parts; holes are inner rings.

    Coordinates are px from the image's upper left corner. Each ring runs through the midpoints of the pixel edges
    that part the cell from the rest, so that the centres of exactly the cell's pixels lie inside.

    Args:
        cells: N cells; 0 gives an empty list.
        names: the name of each label index.
    """
    features: list[dict[str, Any]] = []
    for mask, box, label in zip(cells.masks, cells.boxes_xyxy, cells.labels, strict=True):
        parts = _parts(mask, int(box[0]), int(box[1]))
        shape = ("Polygon", parts[0]) if len(parts) == 1 else ("MultiPolygon", parts)
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": shape[0], "coordinates": shape[1]},
                "properties": {"objectType": "annotation", "classification": {"name": names[int(label)]}},
            }
        )
    return features


def _parts(mask: BoolArray, x0: int, y0: int) -> list[list[list[list[float]]]]:
    """The parts (8-connected) of a mask (h, w) as polygons: the closed outer ring, then the closed rings of holes."""
    # Half-pixel lattice: pixel centres at odd places; a pixel covers its centre, edges and corners.
    lattice = np.zeros((2 * mask.shape[0] + 1, 2 * mask.shape[1] + 1), np.uint8)
    lattice[1::2, 1::2] = mask
    lattice = cv2.dilate(lattice, np.ones((3, 3), np.uint8))
    contours, hierarchy = cv2.findContours(lattice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parts: dict[int, list[list[list[float]]]] = {}
    holes: list[tuple[int, list[list[float]]]] = []
    for number, (contour, links) in enumerate(zip(contours, hierarchy[0], strict=True)):
        points = contour.reshape(-1, 2)
        midpoints = points[((points[:, 0] ^ points[:, 1]) & 1) == 1]
        corners = cv2.approxPolyDP(midpoints, 0, True).reshape(-1, 2)
        ring = [[x / 2 + x0, y / 2 + y0] for x, y in corners.tolist()]
        ring.append(ring[0])
        parent = int(links[3])
        if parent < 0:
            parts[number] = [ring]
        else:
            holes.append((parent, ring))
    for parent, ring in holes:
        parts[parent].append(ring)
    return list(parts.values())
