"""Makes the pictures of docs/microscope.md again; the same seed, the same files.

    python benchmarks/draw_microscope.py --out docs/images --seed 0

Writes microscope_lines.jpg (six lines in four modalities), microscope_modalities.jpg (one field, large, with its
cells, nuclei and overlaps drawn in) and microscope_maps.jpg (the five overlap maps of that field). Prints one line.
"""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import numpy.typing as npt

from loop.data.cell_shapes import LINES
from loop.data.microscope import Field, Views, draw_field, render
from loop.data.overlap_maps import OverlapMap, overlap_map
from loop.masks import to_polygons

Picture = npt.NDArray[np.uint8]

CELL, NUCLEUS, SHARED = (255, 210, 60), (80, 170, 255), (230, 60, 60)  # RGB
NAMES = {
    "phase": "phase contrast",
    "brightfield_low": "brightfield, below focus",
    "brightfield_high": "brightfield, above focus",
    "fluorescence": "nuclear fluorescence",
}


def main() -> None:
    """Read the arguments, write the pictures, print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    field = draw_field(np.random.default_rng(arguments.seed), (320, 320), 14, "spread", 0.08)
    views = render(field, np.random.default_rng(arguments.seed))
    pictures = {
        "microscope_lines.jpg": lines(arguments.seed),
        "microscope_modalities.jpg": modalities(field, views),
        "microscope_maps.jpg": maps(field),
    }
    sizes = {}
    for name, picture in pictures.items():
        target = arguments.out / name
        if not cv2.imwrite(str(target), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75]):
            raise SystemExit(f"cannot write {target}; check --out and the free space")
        sizes[name] = target.stat().st_size
    print(json.dumps({"bytes": sizes, "signal_to_noise": signal_to_noise(field), "seed": arguments.seed}))


def signal_to_noise(field: Field) -> dict[str, float]:
    """How far the pixels of cells lie from the empty ground (root mean square) over the noise of one pixel.

    The signal is the mean of 16 pictures under different light, against that of as many without cells; the noise is
    the difference of neighbours in the picture without cells over the root of 2.
    """
    blank = draw_field(np.random.default_rng(0), field.instances.shape, 0)
    full, empty = ([render(f, np.random.default_rng(i)) for i in range(16)] for f in (field, blank))
    inside = np.any([_full(field, i) for i in range(len(field.instances))], axis=0)
    found = {}
    for modality in NAMES:
        cells, ground = (np.array([getattr(v, modality) for v in views], np.float64) for views in (full, empty))
        signal = (cells.mean(axis=0) - ground.mean(axis=0))[inside]
        noise = np.diff(ground, axis=2).std() / np.sqrt(2)
        found[modality] = round(float(np.sqrt((signal**2).mean()) / noise), 1)
    return found


def _full(field: Field, i: int) -> npt.NDArray[np.bool_]:
    full = np.zeros(field.instances.shape, np.bool_)
    x0, y0, x1, y1 = field.instances.boxes_xyxy[i]
    full[y0:y1, x0:x1] = field.instances.masks[i]
    return full


def lines(seed: int) -> Picture:
    """A row for each line, a column for each modality."""
    rows = []
    for name in LINES:
        rng = np.random.default_rng(seed)
        views = render(draw_field(rng, (200, 200), 6, name, 0.08), rng)
        cells = [titled(getattr(views, modality), f"{name}: {text}") for modality, text in NAMES.items()]
        rows.append(np.hstack(cells))
    return np.vstack(rows)


def modalities(field: Field, views: Views) -> Picture:
    """The four modalities and the truth: cells yellow, nuclei blue, overlaps red."""
    panels = [titled(getattr(views, modality), text) for modality, text in NAMES.items()]
    truth = coloured(views.phase)
    truth[field.overlap] = (0.5 * truth[field.overlap] + 0.5 * np.array(SHARED)).astype(np.uint8)
    for instances, colour in ((field.instances, CELL), (field.nuclei, NUCLEUS)):
        rings = [np.rint(4 * ring - 2).astype(np.int32) for ring in to_polygons(instances, 0.5)]
        cv2.polylines(truth, rings, True, colour, 1, cv2.LINE_AA, 2)
    height, width = field.instances.shape
    top, left = height // 4, width // 4
    close = np.s_[top : top + height // 2, left : left + width // 2]
    zoom = cv2.resize(views.brightfield_high[close], (width, height), interpolation=cv2.INTER_CUBIC)
    panels += [titled(truth, "truth: cells, nuclei, overlaps"), titled(zoom, "brightfield above focus, middle, x2")]
    return np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])])


def maps(field: Field) -> Picture:
    """The cells as numbers of layers, then v0 to v4, black 0.1 and white 1."""
    count = np.zeros(field.instances.shape, np.uint8)
    for (x0, y0, x1, y1), mask in zip(field.instances.boxes_xyxy, field.instances.masks, strict=True):
        count[y0:y1, x0:x1][mask] += 90
    for (x0, y0, x1, y1), mask in zip(field.nuclei.boxes_xyxy, field.nuclei.masks, strict=True):
        count[y0:y1, x0:x1][mask] += 40
    panels = [titled(count, "cells, overlaps, nuclei")]
    for kind in get_args(OverlapMap):
        share = (overlap_map(kind, field.instances, field.nuclei) - 0.1) / 0.9
        panels.append(titled(np.rint(255 * share).clip(0, 255).astype(np.uint8), kind))
    return np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])])


def titled(picture: npt.NDArray[Any], text: str) -> Picture:
    """The picture in colour under a strip with its name; in steps of 8 grey levels, which makes the file small."""
    picture = np.minimum(picture // 8 * np.uint8(8) + np.uint8(4), 255)
    strip = np.full((16, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
    return np.pad(np.vstack([strip, coloured(picture)]), ((0, 2), (0, 2), (0, 0)), constant_values=255)


def coloured(picture: npt.NDArray[Any]) -> Picture:
    """Three channels, a copy."""
    return np.array(picture) if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)


if __name__ == "__main__":
    main()
