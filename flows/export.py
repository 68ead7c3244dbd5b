"""The masks out of a project, in the formats that other tools read."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from flows.absent import named
from flows.context import LoopContext, image_ref
from flows.folders import coco_document, write_label_image, write_label_layers
from flows.freeze import newest_annotations, parse_annotation, split_nuclei
from flows.sync import sync
from loop.adapters.index import ImageRow
from loop.data.preprocess import Window
from loop.data.store import write_png
from loop.errors import InputError, LabelError, OverlapError
from loop.labelstudio.results import ParsedAnnotation
from loop.models.stitch import merge_windows
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


class _Labelled(NamedTuple):
    """An image with what was drawn on it, and where it is labelled: (H, W) bool, None = as a whole."""

    ref: ImageRef
    drawn: Instances
    done: BoolArray | None


class _Piece(NamedTuple):
    """A labelled tile: what it shows of its image, and what was drawn on it."""

    row: ImageRow
    parsed: ParsedAnnotation

    @property
    def window(self) -> Window:
        top, left = self.row.top, self.row.left
        return Window(top, left, top + self.row.height, left + self.row.width)


def export(context: LoopContext, out: Path, formats: Sequence[str]) -> ExportReport:
    """Writes the annotations of every labelled image (after a sync) below `out`, whatever rounds made of them.

    Of several annotations of an image the one that counts for training is written (`labels.several`).

    `coco`: coco.json, RLE masks, overlaps kept. `labels`: labels/STEM.png, 16-bit, where the first of two overlapping
    cells keeps their pixels; nuclei that are labelled beside the cells go to nuclei/STEM.png. `layers`:
    layers/STEM.tif, as many pages as keep overlapping cells whole, which `celloop train` reads as labels. `cellpose`:
    cellpose/STEM_masks.png, the cells under the name that Cellpose looks for. `geojson`: geojson/STEM.geojson, outlines
    in px with their holes and parts, as QuPath reads; they enclose exactly the pixels of the cells. Doubtful cells are
    cells. For an image that a person did only in part, done/STEM.png is 255 inside the done areas. An annotation that
    cannot be read is left out and named.

    An image that was cut into tiles is written as one image again. A cell that lies in several tiles is one: as the
    tile drew it in which it lies deepest, or, where none shows all of it, everything that they drew of it. Where people
    disagree a cell counts that one tile shows whole; a piece at a tile's edge does not count where a neighbour shows
    the whole place and has nothing there. Of an image with tiles that are not labelled yet done/STEM.png is 255 where
    it is labelled, and the report names what is missing.

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
        pairs = [(image.ref, image.drawn) for image in found]
        (out / "coco.json").write_text(json.dumps(coco_document(pairs, names)), encoding="utf-8")
    for image in found:
        _write_done(out / "done", image)
        try:
            _write_rasters(context, image, out, formats)
        except OverlapError as error:
            left_out.append(f"{image.ref.image_id}: {error}")
        if "geojson" in formats:
            _write_geojson(out / "geojson", image.ref, image.drawn, names)
    for line in left_out:
        logger.warning("export of %s: %s", context.project_name, line)
    return ExportReport(len(found), sum(len(image.drawn) for image in found), str(out), tuple(left_out))


def _write_done(directory: Path, image: _Labelled) -> None:
    """Where the image is labelled; the file of an earlier export goes once it is labelled as a whole."""
    path = directory / f"{image.ref.image_id}.png"
    if image.done is None:
        path.unlink(missing_ok=True)
    else:
        write_png(image.done.astype(np.uint8) * 255, path)


def _write_rasters(context: LoopContext, image: _Labelled, out: Path, formats: Sequence[str]) -> None:
    """The formats that number the cells in pixels.

    Raises:
        OverlapError: there are more cells than 16 bits can number.
    """
    cells, nuclei = split_nuclei(image.drawn, context.interface, context.config.publish.nucleus_label)
    if "labels" in formats:
        write_label_image(out / "labels", image.ref.image_id, cells)
        if nuclei is not None:
            write_label_image(out / "nuclei", image.ref.image_id, nuclei)
    if "layers" in formats:
        write_label_layers(out / "layers", image.ref.image_id, cells)
    if "cellpose" in formats:
        write_label_image(out / "cellpose", f"{image.ref.image_id}_masks", cells)


def _labelled(context: LoopContext) -> tuple[list[_Labelled], list[str]]:
    """Every labelled image, tiles made into their image, by id; and a line about whatever is missing or unreadable."""
    several = context.config.labels.several
    newest = newest_annotations(context.index.annotations(context.project_name), several)
    rows = {row.image_id: row for row in context.index.images(context.project_name)}
    found: list[_Labelled] = []
    pieces: dict[str, list[_Piece]] = {}
    left_out: list[str] = []
    for row in rows.values():
        if row.state != "labelled" or row.image_id not in newest:
            continue
        try:
            parsed = parse_annotation(newest[row.image_id], row, context.interface)
        except LabelError as error:
            left_out.append(f"{row.image_id}: {error}")
            continue
        if row.parent:
            pieces.setdefault(row.parent, []).append(_Piece(row, parsed))
        else:
            found.append(_Labelled(image_ref(row), parsed.instances, None if parsed.whole else parsed.done))
    whole = {image.ref.image_id for image in found}
    for parent, parts in pieces.items():
        if parent in whole:
            left_out.append(f"{parent}: it is labelled as a whole, so its {len(parts)} labelled tiles are not written")
            continue
        found.append(_stitched(context, rows[parent], parts))
        tiles = [row for row in rows.values() if row.parent == parent and row.state != "tiled"]
        left_out += _missing(found[-1], tiles, parts)
    return sorted(found, key=lambda image: image.ref.image_id), left_out


def _stitched(context: LoopContext, parent: ImageRow, pieces: Sequence[_Piece]) -> _Labelled:
    """One image of its labelled tiles; cells and nuclei are put together each for themselves."""
    shape, nucleus_label = (parent.height, parent.width), context.config.publish.nucleus_label
    done = np.zeros(shape, np.bool_)
    kinds: tuple[list[tuple[Window, Instances]], ...] = ([], [])
    for piece in pieces:
        y0, x0, y1, x1 = window = piece.window
        done[y0:y1, x0:x1] |= True if piece.parsed.done is None else piece.parsed.done
        drawn = split_nuclei(piece.parsed.instances, context.interface, nucleus_label)
        for kind, parts in zip(drawn, kinds, strict=True):
            if kind is not None:
                parts.append((window, kind))
    merged = [merge_windows(shape, parts) for parts in kinds if parts]
    cells = Instances.build(
        shape,
        np.concatenate([kind.boxes_xyxy for kind in merged]),
        [mask for kind in merged for mask in kind.masks],
        labels=np.concatenate([kind.labels for kind in merged]),
        image_id=parent.image_id,
    )
    return _Labelled(image_ref(parent), cells, None if done.all() else done)


def _missing(image: _Labelled, tiles: Sequence[ImageRow], pieces: Sequence[_Piece]) -> list[str]:
    """A line where some of an image's tiles are not labelled and leave a part of it out."""
    labelled = {piece.row.image_id for piece in pieces}
    open_tiles = [row for row in tiles if row.image_id not in labelled]
    if image.done is None or not open_tiles:
        return []
    name = image.ref.image_id
    return [
        f"{name}: {len(open_tiles)} of its {len(tiles)} tiles are not labelled ({named(open_tiles)}); what is written "
        f"is the rest of it, and done/{name}.png says where that is"
    ]


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
