"""How large the labelled cells of a project are and of what shape, remembered for the answers to clicks."""

import logging
from typing import Any

from flows.context import LoopContext
from flows.freeze import Frozen
from loop.metrics.typical import fit_typical

logger = logging.getLogger(__name__)


def note_typical(context: LoopContext, frozen: Frozen) -> dict[str, Any]:
    """Typical cells of the labelled images, all together ("") and by modality, noted in the index.

    A modality with fewer than 10 cells has no entry, and neither has "" where there are fewer in all: clicks then take
    the answer without it. Nuclei and pseudo-labels do not count. The same snapshot gives the same document, and one
    that is noted already is not written again.

    Returns:
        What the index holds now, JSON-ready: {"": document, MODALITY: document, ...}.
    """
    samples = [sample for sample in frozen.snapshot.samples if sample.image.split != "pseudo"]
    modalities = sorted({sample.image.modality for sample in samples} - {""})
    documents: dict[str, Any] = {}
    for name in ("", *modalities):
        found = fit_typical([sample.instances for sample in samples if name in ("", sample.image.modality)])
        if found is not None:
            documents[name] = found.to_document()
    if documents != context.project.typical:
        context.index.set_typical(context.project_name, documents)
        logger.info("typical cells of %s noted: %s", context.project_name, ", ".join(map(repr, documents)) or "none")
    return documents
