"""The labelled images that a replay works with: a pool to choose from and images to measure on."""

import csv
import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loop.data.folder import TEACHING, leaking_groups, open_folder, read_sample
from loop.data.store import read_image, write_label_layers, write_png
from loop.data.text_file import write_text
from loop.errors import InputError
from loop.masks import from_layers, to_layers
from loop.types import ImageRef, Sample

MIN_PIECE = 10
"""What a window leaves of a cell is dropped below so many px."""

COLUMNS = ("image", "label", "modality", "group", "split")


@dataclass(frozen=True)
class ReplayData:
    """Labelled images: the pool to choose from, and those that models are measured on, never chosen."""

    pool: tuple[Sample, ...]
    test: tuple[Sample, ...]


def open_replay(data: Path, *, measure: str = "test", modality: str = "") -> ReplayData:
    """The labelled images of a dataset folder (loop/data/folder.py) for a replay.

    The pool are those of the splits pool and train, and those without one; an image whose group stands in another split
    too is left out of it.

    Args:
        data: the folder.
        measure: the split that models are measured on; "val" while anything is still being tuned.
        modality: only images of this one; "" = all.

    Raises:
        InputError: the pool or the split to measure on has no labelled image.
        LabelError, ImageError: a label image cannot be read.
    """
    images = [ref for ref in open_folder(data).images if ref.label_path is not None]
    images = [ref for ref in images if modality in ("", ref.modality)]
    leaking = leaking_groups(images)
    pool = tuple(read_sample(ref) for ref in images if ref.split in TEACHING and ref.group not in leaking)
    test = tuple(read_sample(ref) for ref in images if ref.split == measure)
    kind = f" of modality {modality}" if modality else ""
    if not pool or not test:
        raise InputError(
            f"{data}: {len(pool)} labelled images{kind} to choose from (split pool), {len(test)} to measure on "
            f"(split {measure}); a replay needs both: give manifest.csv a column split"
        )
    return ReplayData(pool, test)


def cut(data: Path, out: Path, side: int, tell: Callable[[int, int], None] | None = None) -> Path:
    """A dataset folder with one window of at most `side` x `side` px of each labelled image of another.

    Where the window lies is drawn from the image's id, so the same image always gives the same window. Cells are cut
    at its edges; pieces of fewer than 10 px are dropped. Group, modality and split stay. A finished folder is kept.

    Args:
        data: the folder to cut from.
        out: made, or kept where it is complete.
        side: of a window, px.
        tell: called as tell(done, total).

    Returns:
        The folder of the windows, OUT/SIDE.

    Raises:
        InputError: `side` is below 32, or no image is labelled.
    """
    if side < 32:
        raise InputError(f"windows of {side} px; give 32 or more")
    target = out / str(side)
    if (target / "manifest.csv").exists():
        return target
    images = [ref for ref in open_folder(data).images if ref.label_path is not None]
    if not images:
        raise InputError(f"{data} has no labelled image; put 16-bit label images into {data / 'labels'}")
    shutil.rmtree(target, ignore_errors=True)
    for part in ("images", "labels"):
        (target / part).mkdir(parents=True)
    rows = []
    for done, ref in enumerate(images, start=1):
        rows.append(_cut_one(ref, target, side))
        if tell is not None:
            tell(done, len(images))
    _write_manifest(target / "manifest.csv", rows)
    return target


def _cut_one(ref: ImageRef, target: Path, side: int) -> dict[str, str]:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(ref.image_id.encode()).digest()[:8], "big"))
    top, left = (int(rng.integers(max(length - side, 0) + 1)) for length in (ref.height, ref.width))
    pixels = read_image(ref.path).pixels[top : top + side, left : left + side]
    write_png(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, target / "images" / f"{ref.image_id}.png")
    layers = to_layers(read_sample(ref).instances)[:, top : top + side, left : left + side]
    cells = from_layers(layers)
    whole = [i for i, mask in enumerate(cells.masks) if np.count_nonzero(mask) >= MIN_PIECE]
    write_label_layers(to_layers(cells.take(whole)), target / "labels" / f"{ref.image_id}.tif")
    return {
        "image": f"images/{ref.image_id}.png",
        "label": f"labels/{ref.image_id}.tif",
        "modality": ref.modality,
        "group": ref.group,
        "split": ref.split,
    }


def _write_manifest(path: Path, rows: Sequence[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
