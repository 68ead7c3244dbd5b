"""What people say of pseudo-labels: each labeller's precision and recall on images that were labelled afterwards."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows.context import LoopContext
from loop.adapters.index import AuditRow
from loop.config import PseudoConfig
from loop.data.proposals import ProposalStore, StoredProposal, forget_versions, stored_versions
from loop.metrics.matching import iou_matrix, match
from loop.pseudo.calibration import judged
from loop.types import ImageRef, Sample

logger = logging.getLogger(__name__)

AGREED_IOU = 0.5
KEPT_VERSIONS = 6
"""Proposals of so many versions of a labeller are kept; an audit looks back no further."""


@dataclass(frozen=True)
class Standing:
    """Whether a labeller may teach, by its last audits that hold `pseudo.audit_cells` cells together.

    Attributes:
        teaches: False = switched off.
        trust: its say in the fusion, in [0, 1]: the audited precision; 1 before there are enough cells, 0 when off.
        precision: share of its `cells` audited cells that people drew too; None before any audit.
        recall: share of the people's cells in the same images that it proposed; None before any audit.
        cells: how many cells were audited.
        reason: in words.
    """

    teaches: bool
    trust: float
    precision: float | None
    recall: float | None
    cells: int
    reason: str


def proposals_dir(context: LoopContext) -> Path:
    """Where a project's proposals lie: DIR/LABELLER/VERSION."""
    return context.workspace.root / "proposals" / context.project_name


def proposal_store(context: LoopContext, labeller: str, version: str) -> ProposalStore:
    """The proposals of one labeller version."""
    return ProposalStore(proposals_dir(context) / labeller, version)


def audit(context: LoopContext, number: int, labelled: Sequence[Sample]) -> list[AuditRow]:
    """Compares what labellers taught about images with what people drew in them since; the same again when repeated.

    Each image counts once for a labeller, in the first round that sees its labels. The cells of a labeller are those of
    its own proposal, not the fused ones, that taught or would have taught had it not been switched off.

    Args:
        context: the project.
        number: the round that audits; its audits are kept in the index.
        labelled: images with a person's cells that may teach.

    Returns:
        A row for each labeller that has something to audit in this round.
    """
    root = proposals_dir(context)
    before = [row for row in context.index.audits(context.project_name) if row.number != number]
    rows = []
    for folder in sorted(root.glob("*/")):
        done = {image_id for row in before if row.labeller == folder.name for image_id in row.image_ids}
        stores = [ProposalStore(folder, version) for version in stored_versions(folder)]
        fresh = [sample for sample in labelled if sample.image.image_id not in done]
        row = _audit_one(context.project.id, number, folder.name, stores, fresh)
        if row is not None:
            rows.append(row)
            logger.info("audit of %s in round %d of %s: %s", row.labeller, number, context.project_name, row)
    context.index.put_audits(context.project_name, rows)
    return rows


def forget_proposals(context: LoopContext) -> None:
    """Deletes the proposals of labeller versions that are long out of use; they can be made again while in use."""
    for folder in sorted(proposals_dir(context).glob("*/")):
        gone = forget_versions(folder, KEPT_VERSIONS)
        if gone:
            logger.info("proposals of %s are forgotten: %s", folder.name, ", ".join(gone))


def _audit_one(
    project_id: int, number: int, labeller: str, stores: Sequence[ProposalStore], labelled: Sequence[Sample]
) -> AuditRow | None:
    cells = hits = truths = 0
    image_ids: list[str] = []
    newest, version = -1, ""
    for sample in labelled:
        found = _last_used(stores, sample.image)
        if found is None:
            continue
        proposal, used_in, taught_by = found
        taught = proposal.instances.take(_taught(proposal))
        counted = taught.take(np.flatnonzero(judged(taught, sample.known)))
        cells += len(counted)
        hits += len(match(iou_matrix(counted, sample.instances), AGREED_IOU))
        truths += len(sample.instances)
        image_ids.append(sample.image.image_id)
        if used_in > newest:
            newest, version = used_in, taught_by
    if not image_ids:
        return None
    return AuditRow(project_id, number, labeller, version, cells, hits, truths, image_ids)


def _last_used(stores: Sequence[ProposalStore], image: ImageRef) -> tuple[StoredProposal, int, str] | None:
    """The proposal for an image that was used last, with the round and the version of its labeller."""
    best: tuple[StoredProposal, int, str] | None = None
    for store in stores:
        proposal = store.load(image)
        if proposal is None or proposal.use is None:
            continue
        if best is None or proposal.use.number > best[1]:
            best = (proposal, proposal.use.number, store.version)
    return best


def _taught(proposal: StoredProposal) -> list[int]:
    return [] if proposal.use is None else np.flatnonzero(proposal.use.taught).tolist()


def standing(audits: Sequence[AuditRow], config: PseudoConfig) -> Standing:
    """What a labeller's audits, the oldest first, say of it."""
    cells = hits = truths = 0
    for row in reversed(audits):
        cells, hits, truths = cells + row.cells, hits + row.hits, truths + row.truths
        if cells >= config.audit_cells:
            break
    precision = hits / cells if cells else None
    recall = hits / truths if truths else None
    if precision is None or cells < config.audit_cells:
        reason = f"{cells} cells audited, fewer than {config.audit_cells}: believed until there are more"
        return Standing(True, 1.0, precision, recall, cells, reason)
    said = f"precision {precision:.2f} of {cells} cells, needed {config.min_precision:g}"
    if precision < config.min_precision:
        return Standing(False, 0.0, precision, recall, cells, f"switched off by the audit: {said}")
    return Standing(True, precision, precision, recall, cells, f"confirmed by the audit: {said}")


def standings(context: LoopContext, names: Sequence[str]) -> Mapping[str, Standing]:
    """The standing of each labeller of those names."""
    rows = context.index.audits(context.project_name)
    return {name: standing([row for row in rows if row.labeller == name], context.config.pseudo) for name in names}


def figures(context: LoopContext) -> dict[str, float]:
    """What is known of the pseudo-labels before they teach, as metrics.

    audit.LABELLER.precision, .recall, .cells of each audited labeller; pseudo.ece, .images, .cells, .doubtful of the
    round that is being made.
    """
    names = sorted({row.labeller for row in context.index.audits(context.project_name)})
    values: dict[str, float] = {}
    for name, found in standings(context, names).items():
        shown = {"precision": found.precision, "recall": found.recall, "cells": float(found.cells)}
        values |= {f"audit.{name}.{key}": value for key, value in shown.items() if value is not None}
    rounds = context.index.rounds(context.project_name)
    document = rounds[-1].pseudo if rounds else {}
    told = {key: document.get(key) for key in ("ece", "images", "cells", "doubtful")}
    return values | {f"pseudo.{key}": float(value) for key, value in told.items() if value is not None}
