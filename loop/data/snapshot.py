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
from loop.masks import CocoRle, from_coco_rle, to_coco_rle, to_dense
from loop.metrics.matching import areas
from loop.types import BoolArray, ImageRef, Instances, Origin, Sample

SPLITS = ("train", "holdout", "pseudo")

_FILE = "snapshot.json"
_FORMAT = 1
_WHERE = ("path", "label_path", "extra")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A frozen dataset.

    Attributes:
        id: the first 16 hex digits of the SHA-256 of the content: project, and of each image its id, hash, split,
            group, modality, annotation ids, cells and, where they are labelled, nuclei (masks, labels, weights, scores,
            source, model version, origins where they differ) and where the labels are complete, if not everywhere.
            Where files lie, the manifest's extra columns, the order of the images and the time do not count.
        samples: by image_id; ImageRef.split is one of SPLITS, ImageRef.path absolute. "pseudo" holds images whose
            cells no person drew.
        annotation_ids: image_id -> ids of the annotations that its cells come from, ascending; none for pseudo-labels.
        project: its name.
    """

    id: str
    samples: tuple[Sample, ...]
    annotation_ids: dict[str, list[int]]
    project: str

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of one split, "train", "holdout" or "pseudo", by image_id."""
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
        samples: in any order, each image once; ImageRef.split one of SPLITS. Cells and nuclei without a pixel are
            dropped; origins that say no more than source and model version, and a `known` that covers the whole image,
            are the same as none.
        annotation_ids: image_id -> annotation ids; images left out have none.
        project: its name.

    Returns:
        The snapshot, its samples sorted by image_id.

    Raises:
        InputError: an image twice, another split, a group in the hold-out and beside it, or ids of an image that is
            not there.
        ShapeError: cells, nuclei or `known` of another size than their image.
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
    nuclei = None if sample.nuclei is None else _plain(sample.nuclei)
    known = sample.known
    if known is not None and known.shape == sample.instances.shape and known.all():
        known = None
    return Sample(replace(sample.image, path=place), _plain(sample.instances), nuclei, known)


def _plain(cells: Instances) -> Instances:
    """Without cells that have no pixel, and without origins where they tell nothing new."""
    seen = np.flatnonzero(areas(cells))
    kept = cells if len(seen) == len(cells) else cells.take(seen)
    usual = Origin(kept.source, kept.model_version)
    return replace(kept, origins=()) if all(origin == usual for origin in kept.origins) else kept


def _check(samples: Sequence[Sample], annotation_ids: Mapping[str, Sequence[int]]) -> None:
    measures, seen = dict[str, bool](), set[str]()
    for image, cells, nuclei, known in samples:
        if image.image_id in seen:
            raise InputError(f"image {image.image_id} is given twice; a snapshot holds each image once")
        seen.add(image.image_id)
        if image.split not in SPLITS:
            raise InputError(f"image {image.image_id} is in split {image.split!r}; expected one of {SPLITS}")
        held = image.split == "holdout"
        if image.group and measures.setdefault(image.group, held) != held:
            raise InputError(
                f"group {image.group!r} is in the hold-out and beside it (image {image.image_id} in {image.split!r}); "
                "a slide, well or patient either teaches or measures"
            )
        _check_drawn(image, cells, "cells")
        if nuclei is not None:
            _check_drawn(image, nuclei, "nuclei")
        if known is not None and known.shape != cells.shape:
            raise ShapeError(f"`known` of {image.image_id} is {known.shape}, the image is {cells.shape} (H, W)")
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
    image, cells, nuclei, known = sample
    fields = asdict(image)
    fields["path"] = str(image.path)
    fields["label_path"] = None if image.label_path is None else str(image.label_path)
    record: dict[str, Any] = {
        "image": fields,
        "annotations": [int(number) for number in annotations],
        "cells": _to_columns(cells),
    }
    # What there is none of has no key, so that such snapshots keep the ids they had before it could be there.
    if nuclei is not None:
        record["nuclei"] = _to_columns(nuclei)
    if known is not None:
        whole = Instances.build(cells.shape, [(0, 0, cells.shape[1], cells.shape[0])], [known])
        record["known"] = to_coco_rle(whole)[0]["counts"]
    return record


def _to_columns(cells: Instances) -> dict[str, Any]:
    columns = {
        "counts": [rle["counts"] for rle in to_coco_rle(cells)],
        "scores": cells.scores.tolist(),
        "labels": cells.labels.tolist(),
        "weights": cells.weights.tolist(),
        "source": cells.source,
        "model_version": cells.model_version,
    }
    return {**columns, "origins": [list(origin) for origin in cells.origins]} if cells.origins else columns


def _from_record(record: dict[str, Any]) -> Sample:
    fields = record["image"]
    label = fields["label_path"]
    image = ImageRef(**{**fields, "path": Path(fields["path"]), "label_path": None if label is None else Path(label)})
    nuclei = _from_columns(record["nuclei"], image) if "nuclei" in record else None
    known = _from_counts(record["known"], (image.height, image.width)) if "known" in record else None
    return Sample(image, _from_columns(record["cells"], image), nuclei, known)


def _from_columns(columns: dict[str, Any], image: ImageRef) -> Instances:
    shape = (image.height, image.width)
    rest = {key: value for key, value in columns.items() if key not in ("counts", "origins")}
    origins = [Origin(*origin) for origin in columns.get("origins", ())]
    rles: list[CocoRle] = [{"size": list(shape), "counts": counts} for counts in columns["counts"]]
    return from_coco_rle(rles, shape, image_id=image.image_id, origins=origins, **rest)


def _from_counts(counts: str, shape: tuple[int, int]) -> BoolArray:
    """(H, W) bool of one mask's run lengths, which may hold no pixel."""
    masks = to_dense(from_coco_rle([{"size": list(shape), "counts": counts}], shape))
    return masks[0] if len(masks) else np.zeros(shape, np.bool_)


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
