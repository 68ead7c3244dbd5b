"""Step between snapshot and training: what the labellers propose for unlabelled images, and what of it teaches.

Audit, calibrate, propose, fuse, and a second snapshot that holds people's labels and the pseudo-labels beside them.
The round's document says what came of it: whether they teach, why, how many cells, and how far the confidence is true.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from flows.audit import audit, proposal_store, proposals_dir, standings
from flows.context import LoopContext, group_of, image_ref
from flows.freeze import Frozen
from flows.labellers import CHAMPION, Panel, Seen
from loop.adapters.index import ImageRow, RoundRow
from loop.config import LoopConfig
from loop.data.proposals import StoredProposal, Use
from loop.data.snapshot import write_snapshot
from loop.data.text_file import write_text
from loop.errors import InputError
from loop.metrics.matching import iou_matrix
from loop.pseudo.base import Proposal
from loop.pseudo.calibration import Calibration, Calibrator, calibrate, judged, true_iou
from loop.pseudo.fusion import Fused
from loop.pseudo.lesson import known_ground, teach
from loop.types import FloatArray, ImageRef, Sample

logger = logging.getLogger(__name__)

Document = dict[str, Any]
Told = Callable[[int, int], None]

WORSE_ROUNDS = 2
"""Pseudo-labels pause for a round after so many rounds in a row in which they did harm."""

LEAST_SHARE = 0.1
"""Fewer sure cells than this share of people's own do not teach: half of the crops would be of a handful of cells."""


def settings_id(config: LoopConfig) -> str:
    """Hash of the settings that decide what is pseudo-labelled (16 hex digits)."""
    parts = [config.pseudo.model_dump(mode="json"), config.instances.min_area]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def pseudo(context: LoopContext, number: int, frozen: Frozen, told: Told | None = None) -> Document:
    """The round's pseudo-labels: audited, calibrated, proposed, fused and frozen; made once, then read back.

    The document is kept with the round in the index. The same labels and settings as in an earlier round give that
    round's document, so that nothing is proposed and trained anew after a rollback or a kill.

    Args:
        context: the project.
        number: the round.
        frozen: people's labels.
        told: called as told(done, total) while images are looked at.

    Returns:
        on (bool), reason, images, cells, doubtful (int), ece (float or None), audits {labeller: precision, recall,
        cells, teaches, reason}, labellers {labeller: version, trust, skipped}, missing {labeller: reason},
        calibration (figures; {} without), reliability (bins), calibrator (file name or ""), network (of the champion
        that it was fitted for), snapshot (of people's labels), mixed_snapshot ("" = none), settings.

    Raises:
        OSError: the disk is full.
        ServiceError: MLflow stopped.
    """
    settings = settings_id(context.config)
    blank = _blank(frozen.snapshot.id, settings)
    for row in reversed(context.index.rounds(context.project_name)):
        if row.pseudo.get("snapshot") == frozen.snapshot.id and row.pseudo.get("settings") == settings:
            done = {key: row.pseudo.get(key, value) for key, value in blank.items()}  # not what that round measured
            context.index.update_round(context.project_name, number, pseudo=done)
            return done
    document = blank | _make(context, number, frozen, told)
    context.index.update_round(context.project_name, number, pseudo=document)
    logger.info("pseudo-labels of %s in round %d: %s", context.project_name, number, document["reason"])
    return document


def _blank(snapshot_id: str, settings: str) -> Document:
    return {
        "on": False,
        "reason": "",
        "images": 0,
        "cells": 0,
        "doubtful": 0,
        "ece": None,
        "audits": {},
        "labellers": {},
        "missing": {},
        "calibration": {},
        "reliability": [],
        "calibrator": "",
        "network": "",
        "snapshot": snapshot_id,
        "mixed_snapshot": "",
        "settings": settings,
    }


def _make(context: LoopContext, number: int, frozen: Frozen, told: Told | None) -> Document:
    config = context.config.pseudo
    champion = context.registry.champion()
    if champion is None:
        return {"reason": "off: there is no model in service yet that could propose anything"}
    if not config.teach and set(config.labellers) <= {CHAMPION, context.config.model.name}:
        return {"reason": "off: pseudo.teach is off in the settings"}
    audit(context, number, frozen.train)
    panel = Panel(context, champion)
    said: Document = {
        "audits": {name: asdict(found) for name, found in standings(context, config.labellers).items()},
        "missing": dict(panel.crew.missing),
    }
    if not panel.crew.labellers:
        return {**said, "reason": f"off: no labeller could be built ({'; '.join(panel.crew.missing.values())})"}
    try:
        calibration = fit_confidence(context, panel, frozen.train)
    except InputError as error:
        reason = f"off: the confidence cannot be calibrated in this round: {error}"
        return {**said, "labellers": panel.document(), "reason": reason}
    name = f"calibrator-{number}.json"
    _write_calibrator(context, name, calibration.calibrator)
    figures = {key: float(value) for key, value in calibration.figures.items()}
    rows = [[row.confidence, row.correct, row.cells] for row in calibration.bins]
    said |= {"ece": figures["ece"], "calibration": figures, "reliability": rows, "calibrator": name}
    said["network"] = champion.tags.get("network", "")
    why_not = _why_not(context)
    if why_not:
        return {**said, "labellers": panel.document(), "reason": f"off: {why_not}"}

    def use(features: FloatArray) -> Use:
        return Use(number, calibration.calibrator.confidence(features), config.keep)

    drawn = _draw(context, number)
    samples = _teach(context, panel, drawn, use, told)
    said["labellers"] = panel.document()
    if panel.is_shadow:
        off = "; ".join(f"{name} {found.reason}" for name, found in panel.standings.items())
        return {**said, "reason": f"off: no labeller may teach: {off}"}
    sure, drawn_by_people = _n_sure(samples), sum(len(sample.instances) for sample in frozen.train)
    if sure < max(LEAST_SHARE * drawn_by_people, 1):
        few = f"{sure} cells in {len(drawn)} unlabelled images are sure enough to teach"
        return {**said, "reason": f"off: only {few}, fewer than {LEAST_SHARE:.0%} of the {drawn_by_people} by people"}
    return {**said, **_freeze(context, frozen, samples, drawn)}


def _why_not(context: LoopContext) -> str:
    """Why nothing is proposed to teach with in this round; "" = nothing speaks against it."""
    if not context.config.pseudo.teach:
        return "pseudo.teach is off in the settings; the labellers' cells are only shown"
    if "nuclei" in context.config.model.heads and context.config.model.name != "sparse_seu_net":
        return "the model learns nuclei too, which pseudo-labels lack"
    return paused(context.index.rounds(context.project_name))


def paused(rounds: Sequence[RoundRow]) -> str:
    """Why pseudo-labels pause after these rounds, the first one first; "" = they do not.

    They pause for one round when the mixed challenger was worse than the one without in the last two rounds that had
    both; then they are tried again. Where `pseudo.labelled_only` gave the one without less training, being worse counts
    all the same, but harm that the further training made up for stays unseen; the text says so.
    """
    learnt = [row for row in rounds if row.status == "done" and row.metrics]
    both = [row for row in learnt if "mixed_ap" in row.metrics]
    last = both[-WORSE_ROUNDS:]
    worse = [row for row in last if row.metrics["mixed_ap"] < row.metrics["labelled_ap"]]
    if len(worse) < WORSE_ROUNDS or learnt[-1].number != both[-1].number:
        return ""
    figures = ", ".join(f"{row.metrics['mixed_ap'] - row.metrics['labelled_ap']:+.3f}" for row in last)
    share = min(row.metrics.get("labelled_share", 1.0) for row in last)
    biased = f", though the one without had {share:.0%} of the training" if share < 1 else ""
    return (
        f"the model with them was worse on the hold-out in the last {WORSE_ROUNDS} rounds that compared ({figures} "
        f"AP){biased}; they are tried again next round"
    )


def _draw(context: LoopContext, number: int) -> list[ImageRow]:
    """The open images that pseudo-labels may be made of in a round, at most `pseudo.images`, drawn at random.

    None of the hold-out, of its groups or of the reserve from which later hold-out images are drawn; and none that a
    model learnt from under a person's label that is gone now.
    """
    config, project = context.config.pseudo, context.project_name
    images = context.index.images(project)
    measuring = {group_of(row) for row in images if row.role == "control"}
    allowed = [
        row
        for row in images
        if row.state == "open"
        and not row.taught
        and group_of(row) not in measuring
        and not in_reserve(project, group_of(row), config.reserve)
    ]
    seed = int.from_bytes(hashlib.sha256(f"{project}/pseudo/{number}".encode()).digest()[:8], "big")
    order = np.random.default_rng(seed).permutation(len(allowed))[: config.images]
    return [allowed[int(i)] for i in sorted(order)]


def in_reserve(project: str, group: str, share: float) -> bool:
    """Whether a group is kept from pseudo-labels, so that hold-out images can still be drawn; the same for ever."""
    drawn = int.from_bytes(hashlib.sha256(f"{project}/{group}".encode()).digest()[:8], "big")
    return drawn < share * 2**64


def _n_sure(samples: Sequence[Sample]) -> int:
    return sum(int((sample.instances.weights > 0).sum()) for sample in samples)


def _freeze(context: LoopContext, frozen: Frozen, samples: Sequence[Sample], drawn: Sequence[ImageRow]) -> Document:
    """The second snapshot; none of the images drawn for it can measure from now on.

    Nor can those in which no cell is sure: the hold-out would be drawn from the images that are hard.
    """
    together = [*frozen.snapshot.samples, *samples]
    ids = frozen.snapshot.annotation_ids
    snapshot = write_snapshot(context.workspace.snapshots_dir, together, ids, context.project_name)
    taught = {row.image_id: {"pseudo_taught": True} for row in drawn}
    context.index.set_images(context.project_name, taught)
    sure = _n_sure(samples)
    every = sum(len(sample.instances) for sample in samples)
    doubtful = every - sure
    return {
        "on": True,
        "reason": f"on: {sure} sure cells in {len(samples)} unlabelled images teach, {doubtful} doubtful ones do not",
        "images": len(samples),
        "cells": sure,
        "doubtful": doubtful,
        "mixed_snapshot": snapshot.id,
    }


def fit_confidence(context: LoopContext, panel: Panel, labelled: Sequence[Sample]) -> Calibration:
    """Confidence from the labelled images that no labeller with a say has learnt from, and how far it is true.

    Raises:
        InputError: there are too few of them, or of cells in them.
    """
    learnt = panel.learnt
    fresh = [sample for sample in labelled if sample.image.image_id not in learnt]
    if not fresh:
        raise InputError("no labelled image is new to the labellers; label the next batch")
    hints = panel.hints([sample.image for sample in fresh])
    features, iou, images = list[FloatArray](), list[FloatArray](), list[str]()
    for sample in fresh:
        seen = panel.see(sample.image, hints.get(sample.image.image_id))
        if seen is None:
            continue
        cells = np.flatnonzero(judged(seen.fused.instances, sample.known))
        features.append(seen.features[cells])
        iou.append(true_iou(seen.fused.instances.take(cells), sample.instances))
        images += [sample.image.group or sample.image.image_id] * len(cells)
    if not features:
        raise InputError("none of the labelled images that are new to the labellers can be read")
    return calibrate(np.concatenate(features), np.concatenate(iou), images, context.config.pseudo)


def _teach(
    context: LoopContext, panel: Panel, rows: Sequence[ImageRow], use: Callable[[FloatArray], Use], told: Told | None
) -> list[Sample]:
    """Pseudo-labelled samples of the images in which a cell is sure; each labeller's part is kept for the audit."""
    config = context.config.pseudo
    images = [replace(image_ref(row), split="pseudo") for row in rows]
    hints = panel.hints(images)
    samples = []
    for done, image in enumerate(images, start=1):
        seen = panel.see(image, hints.get(image.image_id))
        if seen is not None:
            used = use(seen.features)
            _keep(context, panel, image, seen, use)
            lesson = teach(seen.fused.instances, used.confidence, config)
            if (lesson.weights > 0).any():
                ground = known_ground(seen.fused.instances, used.confidence, config)
                samples.append(Sample(image, lesson, None, ground))
        if told is not None:
            told(done, len(images))
    return samples


def _keep(context: LoopContext, panel: Panel, image: ImageRef, seen: Seen, use: Callable[[FloatArray], Use]) -> None:
    """Stores each labeller's own cells with the confidence of the fused ones that they are part of.

    Those of one that is switched off are fused as if it were believed. Its cells that others found too would be right
    by their help, and it would recover however many of its own are wrong.
    """
    is_off = any(panel.trust[name] == 0 for name in seen.proposals)
    believed = panel.all_believed(seen) if is_off else seen
    for name, proposal in seen.proposals.items():
        part = believed if panel.trust[name] == 0 else seen
        used = use(part.features)
        own = replace(used, confidence=confidence_of(name, proposal, part.fused, used.confidence))
        store = proposal_store(context, name, panel.crew.versions[name])
        store.save(image, StoredProposal(proposal.instances, proposal.stability, own))


def confidence_of(name: str, proposal: Proposal, fused: Fused, confidence: FloatArray) -> FloatArray:
    """The confidence of a labeller's own cells: that of the fused cell which each is part of, 0 for the others.

    Args:
        name: the labeller, one of `fused.names`.
        proposal: its M cells.
        fused: N cells.
        confidence: (N,) of these.

    Returns:
        (M,) float32 in [0, 1].
    """
    own = np.zeros(len(proposal.instances), np.float32)
    support = fused.support[:, fused.names.index(name)]
    iou = iou_matrix(fused.instances, proposal.instances)
    for row in np.flatnonzero(support > 0):
        cell = int(np.abs(iou[row] - support[row]).argmin())
        own[cell] = max(own[cell], confidence[row])
    return own


def _write_calibrator(context: LoopContext, name: str, calibrator: Calibrator) -> None:
    write_text(proposals_dir(context) / name, json.dumps(calibrator.to_dict()))
