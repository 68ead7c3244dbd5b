"""How far people agree with each other, from the images that two of them labelled: the best a model can be held to."""

import logging
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from flows.context import LoopContext
from flows.freeze import parse_annotation, split_nuclei
from loop.adapters.index import AnnotationRow, ImageRow
from loop.errors import LabelError
from loop.metrics.agreement import Agreement, agreement_of, summary_of
from loop.types import Instances

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageAgreement:
    """Two people's cells of one image; `people` are their numbers in Label Studio, the smaller one first."""

    image_id: str
    people: tuple[int, int]
    agreement: Agreement


def agreements(context: LoopContext) -> list[ImageAgreement]:
    """Every two people who labelled the same image, by image; each one's newest annotation of it.

    Skipped tasks do not count, nor do annotations whose author Label Studio does not know any more. One that covers a
    part of its image, or cannot be read, is left out with a line in the log. Of cells with nuclei the cells count.

    Raises:
        OSError: a cached annotation is away; sync restores it.
    """
    images = {row.image_id: row for row in context.index.images(context.project_name, state="labelled")}
    newest: dict[str, dict[int, AnnotationRow]] = {}
    for row in sorted(context.index.annotations(context.project_name), key=lambda r: (r.updated_at, r.annotation_id)):
        if not row.cancelled and row.completed_by is not None and row.image_id in images:
            newest.setdefault(row.image_id, {})[row.completed_by] = row
    found: list[ImageAgreement] = []
    for image_id, by_person in sorted(newest.items()):
        if len(by_person) < 2:
            continue
        drawn: dict[int, Instances] = {}
        for person, row in sorted(by_person.items()):
            cells = _cells(context, row, images[image_id])
            if cells is not None:
                drawn[person] = cells
        for one, other in combinations(drawn, 2):
            found.append(ImageAgreement(image_id, (one, other), agreement_of(drawn[one], drawn[other])))
    return found


def summary(found: list[ImageAgreement]) -> dict[str, Any]:
    """`agreements` as a round keeps it: images, people, and the figures of loop/metrics/agreement.summary_of.

    Returns:
        {"images": 0} where nobody labelled an image that another did.
    """
    return {
        "images": len({one.image_id for one in found}),
        **({"people": len({person for one in found for person in one.people})} if found else {}),
        **summary_of([one.agreement for one in found]),
    }


def _cells(context: LoopContext, row: AnnotationRow, image: ImageRow) -> Instances | None:
    try:
        parsed = parse_annotation(row, image, context.interface)
    except LabelError as error:
        logger.warning("annotation %d of %s is compared with no other: %s", row.annotation_id, image.image_id, error)
        return None
    if not parsed.whole:
        logger.info("annotation %d of %s covers a part and is not compared", row.annotation_id, image.image_id)
        return None
    return split_nuclei(parsed.instances, context.interface, context.config.publish.nucleus_label)[0]
