"""Step 2: people's labels frozen into an immutable dataset."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flows.context import LoopContext, group_of, image_ref
from flows.sync import count_cells, load_annotation
from loop.adapters.index import AnnotationRow, ImageRow
from loop.data.snapshot import Snapshot, write_snapshot
from loop.errors import LabelError
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import ParsedAnnotation, from_results
from loop.types import Instances, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frozen:
    """A snapshot with what was left out of it and what looks odd, each as `image: reason`.

    Odd is an annotation with a damaged region, without a cell, or with less than half of the cells that were offered:
    a person may mean that, or Label Studio may have lost it. It teaches all the same.
    `seen`: every annotation that was looked at, used or not, with the time of its content.
    """

    snapshot: Snapshot
    left_out: tuple[str, ...]
    suspicious: tuple[str, ...]
    seen: frozenset[tuple[int, datetime]]

    @property
    def train(self) -> tuple[Sample, ...]:
        """The images that a model may learn from."""
        return self.snapshot.split("train")

    @property
    def holdout(self) -> tuple[Sample, ...]:
        """The images drawn at random that no model of this project ever learns from."""
        return self.snapshot.split("holdout")


def freeze(context: LoopContext) -> Frozen:
    """The labelled images of a project as a snapshot; the same labels give the same id.

    An image that a control draw chose is hold-out. An image that a person labelled out of turn may teach, unless a
    hold-out image is of its group. An annotation that cannot be read is left out and named; nothing else stops.
    Regions of the label `publish.nucleus_label` are nuclei and no cells, see `split_nuclei`. Where done areas are drawn
    only they teach, and the cells themselves wherever they lie (Sample.known); an image that is not done as a whole
    cannot measure, so as hold-out it is left out.
    Without any label the snapshot is empty, which is a state and no error.

    Raises:
        OSError: the snapshot cannot be written.
    """
    images = context.index.images(context.project_name)
    annotations = context.index.annotations(context.project_name)
    control_groups = {group_of(row) for row in images if row.role == "control"}
    newest = newest_annotations(annotations, context.config.labels.several)
    samples: list[Sample] = []
    annotation_ids: dict[str, list[int]] = {}
    left_out: list[str] = []
    suspicious: list[str] = []
    for row in images:
        if row.state != "labelled" or row.image_id not in newest:
            continue
        split = "holdout" if row.role == "control" else "train"
        if split == "train" and group_of(row) in control_groups:
            left_out.append(f"{row.image_id}: an image of its group {row.group} is in the hold-out")
            continue
        try:
            sample, odd = _sample(context, newest[row.image_id], row, split)
        except LabelError as error:
            left_out.append(f"{row.image_id}: {error}")
            continue
        suspicious += [f"{row.image_id}: {fault}" for fault in odd]
        samples.append(sample)
        annotation_ids[row.image_id] = [newest[row.image_id].annotation_id]
    for line in left_out:
        logger.warning("left out of the snapshot of %s: %s", context.project_name, line)
    snapshot = write_snapshot(context.workspace.snapshots_dir, samples, annotation_ids, context.project_name)
    seen = frozenset((row.annotation_id, row.updated_at) for row in annotations)
    return Frozen(snapshot, tuple(left_out), tuple(suspicious), seen)


def _sample(context: LoopContext, annotation: AnnotationRow, row: ImageRow, split: str) -> tuple[Sample, list[str]]:
    """A labelled image with what a person drew, and what looks odd about it.

    Raises:
        LabelError: it cannot be read, or is to measure and was labelled in part.
    """
    body, interface = load_annotation(Path(annotation.file)), context.interface
    parsed = _parsed(body, annotation, row, interface)
    if split == "holdout" and not parsed.whole:
        raise LabelError(
            "it was drawn for the hold-out, which must be labelled as a whole, and its done areas "
            f"({context.config.publish.done_label}) cover a part: label the rest and delete them"
        )
    cells, nuclei = split_nuclei(parsed.instances, interface, context.config.publish.nucleus_label)
    offered = count_cells(body.get("offered", ()), interface)
    odd = [*parsed.unreadable, *_losses(annotation, parsed, len(cells), offered)]
    return Sample(replace(image_ref(row), split=split), cells, nuclei, parsed.known()), odd


def split_nuclei(drawn: Instances, interface: Interface, nucleus_label: str) -> tuple[Instances, Instances | None]:
    """Cells and nuclei of what a person drew; both keep their label indices.

    A config without that label has no nuclei (None, which is not "no nucleus here": that is 0 of them). Nor has one
    whose first label it is, which pre-labels take: there the nuclei are what is segmented, so they are the cells.
    """
    if nucleus_label not in interface.labels[1:]:
        return drawn, None
    are_nuclei = drawn.labels == interface.labels.index(nucleus_label)
    return drawn.take(np.flatnonzero(~are_nuclei)), drawn.take(np.flatnonzero(are_nuclei))


def read_annotation(annotation: AnnotationRow, row: ImageRow, interface: Interface) -> Instances:
    """The regions that a person submitted for an image, nuclei among them; none where the annotation is empty.

    Raises:
        LabelError: a region has a label that the config lacks, or another size than the image.
    """
    return parse_annotation(annotation, row, interface).instances


def parse_annotation(annotation: AnnotationRow, row: ImageRow, interface: Interface) -> ParsedAnnotation:
    """All that a person submitted for an image: `read_annotation`'s regions with their origins, and the done areas.

    Raises:
        LabelError: as `read_annotation`.
    """
    return _parsed(load_annotation(Path(annotation.file)), annotation, row, interface)


def _parsed(
    body: Mapping[str, Any], annotation: AnnotationRow, row: ImageRow, interface: Interface
) -> ParsedAnnotation:
    parsed = from_results(
        body["result"],
        interface,
        (row.height, row.width),
        image_id=row.image_id,
        started_from=body.get("started_from", ""),
        offered=body.get("offered", ()),
    )
    if parsed.unknown_labels:
        raise LabelError(
            f"annotation {annotation.annotation_id} has the label {', '.join(parsed.unknown_labels)}; "
            f"the label config knows {', '.join(interface.labels)}: rename the region or add the label"
        )
    return parsed


def _losses(annotation: AnnotationRow, parsed: ParsedAnnotation, n_cells: int, n_offered: int) -> list[str]:
    """What an annotation lacks of what was offered; where only a part of the image is done, nothing can be said."""
    number, offered = annotation.annotation_id, f"{n_offered} cell{'s' if n_offered > 1 else ''}"
    if not n_cells:
        was = f", though {offered} were offered" if n_offered else ""
        return [f"annotation {number} has no cell{was}; read as 'none here'"]
    left = len(parsed.instances)
    if parsed.whole and 2 * left < n_offered:
        return [f"annotation {number} has {left} of the {offered} that were offered; look whether it was saved whole"]
    return []


def newest_annotations(
    annotations: Sequence[AnnotationRow], several: Literal["newest", "reviewed"]
) -> dict[str, AnnotationRow]:
    """The annotation of each image that counts, by image id; skipped ones never do.

    Args:
        annotations: of any images.
        several: `labels.several`: "newest" = the newest; "reviewed" = the newest of those that somebody starred as
            ground truth, the newest of all where nobody did.
    """
    chosen: dict[str, AnnotationRow] = {}
    for row in annotations:
        if row.cancelled:
            continue
        best = chosen.get(row.image_id)
        if best is None or _standing(row, several) > _standing(best, several):
            chosen[row.image_id] = row
    return chosen


def _standing(row: AnnotationRow, several: Literal["newest", "reviewed"]) -> tuple[bool, datetime, int]:
    return (row.reviewed and several == "reviewed", row.updated_at, row.annotation_id)
