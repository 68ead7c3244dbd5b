"""Immutable datasets: which images, whose masks, which split; the name is the hash of the content.

On disk: ROOT/ID/snapshot.json, the masks in it as COCO run lengths so that overlaps survive. It appears whole or not at
all, and the same content written again is the same snapshot.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from loop.data.store import file_sha256
from loop.errors import ImageError, InputError, NonFiniteError, ShapeError, StateError
from loop.masks import CocoRle, from_coco_rle, to_coco_rle
from loop.metrics.matching import areas
from loop.types import ImageRef, Instances, Sample

SPLITS = ("train", "holdout")

_FILE = "snapshot.json"
_FORMAT = 1
_WHERE = ("path", "label_path", "extra")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A frozen dataset.

    Attributes:
        id: the first 16 hex digits of the SHA-256 of the content: project, and of each image its id, hash, split,
            group, modality, annotation ids, cells and, where they are labelled, nuclei (masks, labels, weights, scores,
            source, model version). Where files lie, the manifest's extra columns, the order of the images and the time
            do not count.
        samples: by image_id; ImageRef.split is "train" or "holdout", ImageRef.path absolute.
        annotation_ids: image_id -> ids of the annotations that its cells come from, ascending; none for pseudo-labels.
        project: its name.
    """

    id: str
    samples: tuple[Sample, ...]
    annotation_ids: dict[str, list[int]]
    project: str

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of one split, "train" or "holdout", by image_id."""
        return tuple(sample for sample in self.samples if sample.image.split == name)

    def verify(self) -> None:
        """Reads every image file and compares its hash with the one the snapshot was made from.

        Raises:
            ImageError: a file is missing or has changed; the text names it.
        """
        for sample in self.samples:
            found = file_sha256(sample.image.path)
            if found != sample.image.sha256:
                raise ImageError(
                    f"{sample.image.path} has changed since snapshot {self.id} (SHA-256 {found[:12]}..., expected "
                    f"{sample.image.sha256[:12]}...); restore the file or take a new snapshot"
                )


def write_snapshot(
    root: Path, samples: Sequence[Sample], annotation_ids: Mapping[str, Sequence[int]], project: str
) -> Snapshot:
    """Freezes samples under ROOT; the same content again is found and not written twice.

    Where only the place of the image files differs from the snapshot already there, the new place is noted in it.

    Args:
        root: the folder of all snapshots; it is made.
        samples: in any order, each image once; ImageRef.split "train" or "holdout". Cells and nuclei without a
            pixel are dropped.
        annotation_ids: image_id -> annotation ids; images left out have none.
        project: its name.

    Returns:
        The snapshot, its samples sorted by image_id.

    Raises:
        InputError: an image twice, another split, a group in both splits, or ids of an image that is not there.
        ShapeError: cells or nuclei of another size than their image.
        NonFiniteError: a score or weight is NaN or infinite.
        StateError: the disk refuses.
    """
    entries = sorted((_tidy(sample) for sample in samples), key=lambda sample: sample.image.image_id)
    ids = {s.image.image_id: sorted(annotation_ids.get(s.image.image_id, ())) for s in entries}
    _check(entries, annotation_ids)
    records = [_to_record(sample, ids[sample.image.image_id]) for sample in entries]
    name = _identify(project, records)
    document = {"format": _FORMAT, "id": name, "project": project, "samples": records}
    try:
        _publish(root, name, orjson.dumps(document, option=orjson.OPT_SORT_KEYS))
    except OSError as error:
        raise StateError(
            f"snapshot {name} cannot be written to {root}: {error.strerror}; check the disk's space and rights"
        ) from error
    return Snapshot(name, tuple(entries), ids, project)


def load_snapshot(root: Path, snapshot_id: str) -> Snapshot:
    """The snapshot of that id; its content is checked against the id, its image files are not read (see `verify`).

    Raises:
        StateError: no such snapshot, or a damaged one.
    """
    file = root / snapshot_id / _FILE
    if not re.fullmatch(r"[0-9a-f]{16}", snapshot_id) or not file.is_file():
        raise StateError(f"there is no snapshot {snapshot_id!r} in {root}; take one, or give the folder that holds it")
    try:
        document = orjson.loads(file.read_bytes())
        project, records = document["project"], document["samples"]
        sound = document["format"] == _FORMAT and _identify(project, records) == snapshot_id
        samples = tuple(_from_record(record) for record in records)
    except (OSError, ValueError, TypeError, KeyError, InputError) as error:
        raise StateError(
            f"{file} is damaged ({type(error).__name__}: {error}); delete it and take a new one"
        ) from error
    if not sound:
        raise StateError(f"{file} is damaged: its content is not that of {snapshot_id}; delete it and take a new one")
    ids = {record["image"]["image_id"]: record["annotations"] for record in records}
    return Snapshot(snapshot_id, samples, ids, project)


def _tidy(sample: Sample) -> Sample:
    place = Path(os.path.abspath(sample.image.path))
    nuclei = None if sample.nuclei is None else _with_pixels(sample.nuclei)
    return Sample(replace(sample.image, path=place), _with_pixels(sample.instances), nuclei)


def _with_pixels(cells: Instances) -> Instances:
    seen = np.flatnonzero(areas(cells))
    return cells if len(seen) == len(cells) else cells.take(seen)


def _check(samples: Sequence[Sample], annotation_ids: Mapping[str, Sequence[int]]) -> None:
    splits, seen = dict[str, str](), set[str]()
    for image, cells, nuclei in samples:
        if image.image_id in seen:
            raise InputError(f"image {image.image_id} is given twice; a snapshot holds each image once")
        seen.add(image.image_id)
        if image.split not in SPLITS:
            raise InputError(f"image {image.image_id} is in split {image.split!r}; expected one of {SPLITS}")
        if image.group and splits.setdefault(image.group, image.split) != image.split:
            raise InputError(
                f"group {image.group!r} is in both splits (image {image.image_id} in {image.split!r}); a slide, well "
                "or patient belongs to one of them"
            )
        _check_drawn(image, cells, "cells")
        if nuclei is not None:
            _check_drawn(image, nuclei, "nuclei")
    strange = sorted(annotation_ids.keys() - seen)
    if strange:
        raise InputError(f"annotation ids are given for {strange[:5]}, which are not among the samples; leave them out")


def _check_drawn(image: ImageRef, drawn: Instances, what: str) -> None:
    if drawn.shape != (image.height, image.width):
        raise ShapeError(
            f"the {what} of {image.image_id} lie in {drawn.shape}, the image is {(image.height, image.width)} (H, W); "
            "give them in the pixels of the upright image"
        )
    if not (np.isfinite(drawn.scores).all() and np.isfinite(drawn.weights).all()):
        raise NonFiniteError(f"a score or weight of the {what} of image {image.image_id!r} is no number")


def _to_record(sample: Sample, annotations: Sequence[int]) -> dict[str, Any]:
    image, cells, nuclei = sample
    fields = asdict(image)
    fields["path"] = str(image.path)
    fields["label_path"] = None if image.label_path is None else str(image.label_path)
    record = {
        "image": fields,
        "annotations": [int(number) for number in annotations],
        "cells": _to_columns(cells),
    }
    # Without nuclei the key is left out, so that such snapshots keep the ids they had before there were any.
    return record if nuclei is None else {**record, "nuclei": _to_columns(nuclei)}


def _to_columns(cells: Instances) -> dict[str, Any]:
    return {
        "counts": [rle["counts"] for rle in to_coco_rle(cells)],
        "scores": cells.scores.tolist(),
        "labels": cells.labels.tolist(),
        "weights": cells.weights.tolist(),
        "source": cells.source,
        "model_version": cells.model_version,
    }


def _from_record(record: dict[str, Any]) -> Sample:
    fields = record["image"]
    label = fields["label_path"]
    image = ImageRef(**{**fields, "path": Path(fields["path"]), "label_path": None if label is None else Path(label)})
    nuclei = _from_columns(record["nuclei"], image) if "nuclei" in record else None
    return Sample(image, _from_columns(record["cells"], image), nuclei)


def _from_columns(columns: dict[str, Any], image: ImageRef) -> Instances:
    shape = (image.height, image.width)
    rest = {key: value for key, value in columns.items() if key != "counts"}
    rles: list[CocoRle] = [{"size": list(shape), "counts": counts} for counts in columns["counts"]]
    return from_coco_rle(rles, shape, image_id=image.image_id, **rest)


def _identify(project: str, records: Sequence[dict[str, Any]]) -> str:
    content = [
        {**record, "image": {key: value for key, value in record["image"].items() if key not in _WHERE}}
        for record in records
    ]
    canonical = orjson.dumps([_FORMAT, project, content], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()[:16]


def _publish(root: Path, name: str, document: bytes) -> None:
    """Makes ROOT/NAME appear whole: written beside it, flushed to the disk, then renamed."""
    target = root / name
    if target.is_dir() and (target / _FILE).is_file() and (target / _FILE).read_bytes() == document:
        return
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        with (scratch / _FILE).open("wb") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            (scratch / _FILE).replace(target / _FILE)  # there already: the same content, but for where files lie
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
