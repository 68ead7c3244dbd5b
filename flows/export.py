"""The masks out of a project, in the formats that other tools read."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.context import LoopContext, image_ref
from flows.folders import coco_document, write_label_image
from flows.freeze import freeze
from flows.sync import sync
from loop.errors import InputError
from loop.masks import to_polygons
from loop.types import ImageRef, Instances

logger = logging.getLogger(__name__)

FORMATS = ("coco", "labels", "cellpose", "geojson")


@dataclass(frozen=True)
class ExportReport:
    """How many images and cells were written, where, and what was left out."""

    images: int
    cells: int
    out: str
    left_out: tuple[str, ...]


def export(context: LoopContext, out: Path, formats: Sequence[str]) -> ExportReport:
    """Writes what people labelled (after a sync) below `out`.

    `coco`: coco.json, RLE masks, overlaps kept. `labels`: labels/STEM.png, 16-bit. `cellpose`: cellpose/STEM_masks.png,
    the same under the name that Cellpose looks for. `geojson`: geojson/STEM.geojson, outlines in px, as QuPath reads.

    Raises:
        InputError: a format is unknown.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise InputError(f"unknown format {', '.join(unknown)}; choose from {', '.join(FORMATS)}")
    sync(context)
    frozen = freeze(context)
    rows = {row.image_id: row for row in context.index.images(context.project_name)}
    found = [(image_ref(rows[s.image.image_id]), s.instances) for s in frozen.snapshot.samples]
    out.mkdir(parents=True, exist_ok=True)
    names = context.interface.labels
    if "coco" in formats:
        (out / "coco.json").write_text(json.dumps(coco_document(found, names)), encoding="utf-8")
    for ref, cells in found:
        if "labels" in formats:
            write_label_image(out / "labels", ref.image_id, cells)
        if "cellpose" in formats:
            write_label_image(out / "cellpose", f"{ref.image_id}_masks", cells)
        if "geojson" in formats:
            _write_geojson(out / "geojson", ref, cells, names)
    return ExportReport(len(found), sum(len(c) for _, c in found), str(out), frozen.left_out)


def _write_geojson(directory: Path, ref: ImageRef, cells: Instances, names: Sequence[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    features: list[dict[str, Any]] = []
    for ring, label in zip(to_polygons(cells, 0.5), cells.labels, strict=True):
        points = [[round(float(x), 2), round(float(y), 2)] for x, y in ring]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[*points, points[0]]]},
                "properties": {"objectType": "annotation", "classification": {"name": names[int(label)]}},
            }
        )
    document = {"type": "FeatureCollection", "features": features}
    (directory / f"{ref.image_id}.geojson").write_text(json.dumps(document), encoding="utf-8")
