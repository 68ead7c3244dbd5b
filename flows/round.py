"""Once round the loop: sync, snapshot, pseudo-labels, train, gate, predict, select, publish, report.

Every step can be killed and run again. An unfinished round is resumed under its number; a finished one is not made
again while nothing has changed.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.absent import absent_lines
from flows.agreement import agreements, summary
from flows.audit import forget_proposals
from flows.context import BusyError, LoopContext, group_of, image_ref, open_context, project_lock
from flows.estimate import estimate
from flows.freeze import Frozen, freeze
from flows.gate import PSEUDO_FIGURES, Decision, gate
from flows.labellers import further_kinds, train_kinds
from flows.ledger import write_ledger
from flows.local.workspace import Workspace
from flows.predict import forget_old, predict_images
from flows.prefect_api import connected
from flows.prelabels import prelabels
from flows.prepare import prepare
from flows.pseudo import pseudo, settings_id
from flows.publish import publish
from flows.queue import BY_PUBLISHING, look_at_queue, verify_queue
from flows.report import write_report
from flows.retrain import PLAIN, Lesson, challenger, context_of_kind, recipe_id, shortened
from flows.select import select
from flows.sync import sync
from flows.telling import Tell, quiet, telling_training
from flows.tiling import cut_dense
from flows.typical import note_typical
from loop.adapters.index import RoundRow
from loop.adapters.mlflow_registry import ModelVersion

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NO_PSEUDO = {"on": False, "reason": "off: this round trained no model"}


@dataclass(frozen=True)
class RoundReport:
    """What one round did; `made` is False where nothing had changed since the last one.

    `pseudo` is its document of pseudo-labels (flows/pseudo.py) with what they changed on the hold-out.
    """

    project: str
    number: int
    made: bool
    outcome: str
    reason: str
    model: str
    published: str
    labelled_train: int
    labelled_holdout: int
    metrics: dict[str, Any] = field(default_factory=dict)
    pseudo: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    suspicious: tuple[str, ...] = ()
    report: str = ""


def make_round(context: LoopContext, tell: Tell = quiet) -> RoundReport:
    """One round of a project; must be called inside a Prefect flow.

    Args:
        context: the project and its services.
        tell: called as tell(step, done, total) while a step works.

    Raises:
        BusyError: another round of this project runs on this machine.
        ServiceError: a service stopped; run again to resume.
    """
    with project_lock(context.workspace, context.project_name):
        _step("sync", sync, context, thorough=True)
        frozen = _step("snapshot", freeze, context)
        note_typical(context, frozen)
        _step("ledger", write_ledger, context)
        before = _nothing_new(context, frozen)
        if before is not None:
            return before
        row = context.index.open_round(context.project_name)
        decision = Decision("none", "nothing is labelled yet; label the first batch")
        if frozen.train and frozen.holdout:
            decision = _learn(context, row.number, frozen, tell)
        elif frozen.snapshot.samples:
            decision = Decision("none", _what_is_missing(context, frozen))
        champion = context.registry.champion()
        served = _serve(context, row.number, champion, tell)
        return _finish(context, row.number, frozen, decision=decision, champion=champion, served=served)


def run_round(context: LoopContext, tell: Tell = quiet) -> RoundReport:
    """One round in this process, recorded as a run of the flow `round` in the workspace's Prefect.

    Raises:
        As `make_round`.
    """

    @flow(name="round", flow_run_name=f"{context.project_name}-by-hand", log_prints=False)
    def by_hand() -> RoundReport:
        return make_round(context, tell)

    with connected(context.endpoints):
        return by_hand()


def _step(name: str, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Runs a step as a Prefect task of that name, so that its state and log stand in Prefect."""
    wrapped = task(name=name, cache_policy=NO_CACHE, persist_result=False)(function)
    result: Result = wrapped(*args, **kwargs)
    return result


def _what_is_missing(context: LoopContext, frozen: Frozen) -> str:
    """Why no model can be trained yet, though something is labelled."""
    groups = {group_of(row) for row in context.index.images(context.project_name)}
    if len(groups) == 1:
        return (
            f"all images are of the group {groups.pop()}: no hold-out can be drawn, so no model can be trusted; give "
            "each slide, well or patient its own group in manifest.csv and run `celloop init` again"
        )
    what = "to learn from" if not frozen.train else "of the hold-out"
    return f"no labelled image {what} yet; label the next images of the queue"


def _nothing_new(context: LoopContext, frozen: Frozen) -> RoundReport | None:
    """The last round's report where a new one would do nothing: same labels, settings, images and champion."""
    rounds = context.index.rounds(context.project_name)
    if not rounds or rounds[-1].status != "done" or rounds[-1].snapshot_id != frozen.snapshot.id:
        return None
    champion = context.registry.champion()
    label = champion.label if champion else ""
    rows = context.index.images(context.project_name, state="open")
    waiting = [row for row in rows if row.task_id is not None]
    unserved = any(row.score is None for row in waiting) or (waiting and all(row.rank is None for row in waiting))
    if context.project.published_model != label or unserved or _untrained(context, frozen, rounds[-1]):
        return None
    queue = look_at_queue(context.label_studio, context.index, context.project_name)
    if any(fault.kind in BY_PUBLISHING for fault in queue.faults):
        return None
    last = rounds[-1]
    return RoundReport(
        context.project_name,
        last.number,
        False,
        last.decision,
        f"nothing new since round {last.number}; its order stands",
        label,
        last.published_version,
        len(frozen.train),
        len(frozen.holdout),
        last.metrics,
        last.pseudo or NO_PSEUDO,
        frozen.left_out + queue.lines,
        frozen.suspicious,
        str(_step("report", write_report, context)),
    )


def _untrained(context: LoopContext, frozen: Frozen, last: RoundRow) -> bool:
    """Whether the settings have changed so that another model would be trained on the same labels."""
    if not (frozen.train and frozen.holdout):
        return False
    if last.pseudo.get("settings", "") != settings_id(context.config):
        return True
    planned = _lessons(context, frozen.snapshot.id, last.pseudo)
    for snapshot_id, lesson in planned:
        tags = {"snapshot_id": snapshot_id, "recipe_id": recipe_id(context.config, lesson)}
        if context.registry.find_version(tags) is None:
            return True
    return False


def _lessons(context: LoopContext, snapshot_id: str, document: Mapping[str, Any]) -> list[tuple[str, Lesson]]:
    """What a round trains: on people's labels alone; where there are pseudo-labels, with a share, and on both."""
    mixed = document.get("mixed_snapshot", "")
    if not mixed:
        return [(snapshot_id, PLAIN)]
    alone = Lesson(share=context.config.pseudo.labelled_only)
    return [(snapshot_id, alone), (mixed, Lesson("mixed"))]


def _begun(context: LoopContext, number: int, frozen: Frozen) -> None:
    """Notes what the round learns from and who is champion; one that is resumed keeps the champion of its beginning.

    Its gate may have promoted a model before it was killed, and that one is not the champion of before.
    """
    rounds = context.index.rounds(context.project_name)
    if any(row.number == number and row.snapshot_id == frozen.snapshot.id for row in rounds):
        return
    champion = context.registry.champion()
    label = champion.label if champion else ""
    context.index.update_round(context.project_name, number, snapshot_id=frozen.snapshot.id, champion_before=label)


def _learn(context: LoopContext, number: int, frozen: Frozen, tell: Tell) -> Decision:
    project = context.project_name
    _begun(context, number, frozen)
    taught = {sample.image.image_id: {"taught": True} for sample in frozen.train}
    context.index.set_images(project, taught)

    document = _step("pseudo", pseudo, context, number, frozen, partial(tell, "pseudo-labels"))
    versions = []
    for snapshot_id, lesson in _lessons(context, frozen.snapshot.id, document):
        log = telling_training(tell, shortened(context.config, lesson.share).train)
        more = () if lesson == PLAIN else (lesson,)
        name = "train" if lesson.teaching == "labelled" else "train-mixed"
        versions.append(_step(name, challenger, context, snapshot_id, log, *more))
    decision = _step("gate", gate, context, versions[0], frozen.holdout, *versions[1:])

    now = context.registry.champion()
    told = partial(tell, "estimate")
    worth = _step("estimate", estimate, context, number, frozen, now, learnt=versions[0], progress=told)
    if further_kinds(context):
        document["kinds"] = _step("labellers", train_kinds, context, frozen.snapshot.id, frozen.holdout)
    gained = {key: decision.metrics[key] for key in PSEUDO_FIGURES if key in decision.metrics}
    context.index.update_round(
        project,
        number,
        challenger=", ".join(version.label for version in versions),
        decision=decision.outcome,
        reason=decision.reason,
        metrics={**decision.metrics, "estimate": worth, "people": summary(agreements(context))},
        pseudo={**document, **gained},
    )
    return decision


class _Served(NamedTuple):
    """The published version, a line a cause why open images could not be chosen, and a line a fault of the queue."""

    published: str
    absent: tuple[str, ...]
    faults: tuple[str, ...]


def _serve(context: LoopContext, number: int, champion: ModelVersion | None, tell: Tell) -> _Served:
    images = [image_ref(row) for row in context.index.images(context.project_name) if row.is_present]
    predictions = {}
    if champion is not None:
        told = partial(tell, "predict")
        predictions = dict(_step("predict", predict_images, context, champion, images, told))
        tiles = [image_ref(row) for row in _step("tiles", cut_dense, context, predictions)]
        if tiles:
            predictions |= _step("predict", predict_images, context, champion, tiles, told)
    absent = absent_lines(context, predictions)
    selections = _step("select", select, context, number, predictions, partial(tell, "looks"))
    calibrated = frozenset[str]()
    if champion is not None:
        told = partial(tell, "pre-labels")
        predictions, calibrated = _step("prelabels", prelabels, context, champion, predictions, selections, told)
    _step("sync", sync, context)

    published = _step(
        "publish",
        publish,
        context,
        number,
        champion,
        selections,
        predictions,
        calibrated=calibrated,
        progress=partial(tell, "publish"),
    )
    faults = _step("queue", verify_queue, context).lines
    _step("prepare", prepare, context, selections, partial(tell, "prepare"))
    return _Served(published, absent, faults)


def _finish(
    context: LoopContext,
    number: int,
    frozen: Frozen,
    *,
    decision: Decision,
    champion: ModelVersion | None,
    served: _Served,
) -> RoundReport:
    name = context.project_name
    rows = context.index.annotations(name)
    seen = [row.annotation_id for row in rows if (row.annotation_id, row.updated_at) in frozen.seen]
    context.index.set_used(name, seen, number)
    row = context.index.update_round(
        name,
        number,
        status="done",
        snapshot_id=frozen.snapshot.id,
        decision=decision.outcome,
        reason=decision.reason,
        published_version=served.published,
        finished_at=datetime.now(UTC),
    )
    page = _step("report", write_report, context)
    if champion is not None:
        forget_old(context, {champion.label} | _kinds_in_service(context))
        forget_proposals(context)
    return RoundReport(
        name,
        number,
        True,
        decision.outcome,
        decision.reason,
        champion.label if champion else "",
        served.published,
        len(frozen.train),
        len(frozen.holdout),
        decision.metrics,
        row.pseudo or NO_PSEUDO,
        frozen.left_out + served.absent + served.faults,
        frozen.suspicious,
        str(page),
    )


def _kinds_in_service(context: LoopContext) -> set[str]:
    """The models of further networks that propose pseudo-labels."""
    found = (context_of_kind(context, kind).registry.champion() for kind in further_kinds(context))
    return {version.label for version in found if version is not None}


@flow(name="round", log_prints=False)
def round_flow(workspace: str, project: str) -> dict[str, Any]:
    """One round, as a schedule, a trigger or a person starts it through Prefect."""
    report = make_round(open_context(Workspace(Path(workspace)), project))
    return {"number": report.number, "made": report.made, "outcome": report.outcome, "reason": report.reason}


@flow(name="watch", log_prints=False)
def watch_flow(workspace: str, project: str) -> dict[str, Any]:
    """Looks at Label Studio and makes a round when enough new annotations have come."""
    context = open_context(Workspace(Path(workspace)), project)
    report = _step("sync", sync, context)
    fresh = context.index.new_annotations_since_last_round(project)
    needed = context.config.trigger.new_annotations
    logger.info("project %s: %d new annotations, a round starts at %d", project, fresh, needed)
    if fresh < needed:
        return {"new": report.new, "waiting": fresh, "needed": needed, "round": None}
    try:
        made = make_round(context)
    except BusyError:
        logger.info("project %s: a round is running already", project)
        return {"new": report.new, "waiting": fresh, "needed": needed, "round": None}
    return {"new": report.new, "waiting": fresh, "needed": needed, "round": made.number}
