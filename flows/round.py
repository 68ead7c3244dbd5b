"""Once round the loop: sync, snapshot, train, gate, predict, select, publish, report.

Every step can be killed and run again. An unfinished round is resumed under its number; a finished one is not made
again while nothing has changed.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.context import BusyError, LoopContext, group_of, image_ref, open_context, project_lock
from flows.freeze import Frozen, freeze
from flows.gate import Decision, gate
from flows.local.workspace import Workspace
from flows.predict import forget_old, predict_images
from flows.prefect_api import connected
from flows.publish import publish
from flows.report import write_report
from flows.retrain import challenger, recipe_id
from flows.select import select
from flows.sync import sync
from flows.telling import Tell, quiet, telling_training
from loop.adapters.mlflow_registry import ModelVersion

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class RoundReport:
    """What one round did; `made` is False where nothing had changed since the last one."""

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
        before = _nothing_new(context, frozen)
        if before is not None:
            return before
        row = context.index.open_round(context.project_name)
        decision = Decision("none", "nothing is labelled yet; the first batch is drawn at random")
        if frozen.train and frozen.holdout:
            decision = _learn(context, row.number, frozen, tell)
        elif frozen.snapshot.samples:
            decision = Decision("none", _what_is_missing(context, frozen))
        champion = context.registry.champion()
        published = _serve(context, row.number, champion, tell)
        return _finish(context, row.number, frozen, decision=decision, champion=champion, published=published)


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
    waiting = [row for row in context.index.images(context.project_name) if row.state == "open"]
    unserved = any(row.score is None for row in waiting) or (waiting and all(row.rank is None for row in waiting))
    recipe = {"snapshot_id": frozen.snapshot.id, "recipe_id": recipe_id(context.config)}
    untrained = frozen.train and frozen.holdout and context.registry.find_version(recipe) is None
    if context.project.published_model != label or unserved or untrained:
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
        frozen.left_out,
        frozen.suspicious,
        str(_step("report", write_report, context)),
    )


def _learn(context: LoopContext, number: int, frozen: Frozen, tell: Tell) -> Decision:
    champion = context.registry.champion()
    context.index.update_round(
        context.project_name,
        number,
        snapshot_id=frozen.snapshot.id,
        champion_before=champion.label if champion else "",
    )
    taught = {sample.image.image_id: {"taught": True} for sample in frozen.train}
    context.index.set_images(context.project_name, taught)
    log = telling_training(tell, context.config.train)
    version = _step("train", challenger, context, frozen.snapshot.id, log)
    decision = _step("gate", gate, context, version, frozen.holdout)
    context.index.update_round(
        context.project_name,
        number,
        challenger=version.label,
        decision=decision.outcome,
        reason=decision.reason,
        metrics=decision.metrics,
    )
    return decision


def _serve(context: LoopContext, number: int, champion: ModelVersion | None, tell: Tell) -> str:
    images = [image_ref(row) for row in context.index.images(context.project_name) if row.state != "gone"]
    predictions = {}
    if champion is not None:

        def told(done: int, total: int) -> None:
            tell("predict", done, total)

        predictions = dict(_step("predict", predict_images, context, champion, images, told))
    selections = _step("select", select, context, number, predictions)
    _step("sync", sync, context)

    def shown(done: int, total: int) -> None:
        tell("publish", done, total)

    return _step("publish", publish, context, number, champion, selections, predictions, progress=shown)


def _finish(
    context: LoopContext,
    number: int,
    frozen: Frozen,
    *,
    decision: Decision,
    champion: ModelVersion | None,
    published: str,
) -> RoundReport:
    name = context.project_name
    rows = context.index.annotations(name)
    seen = [row.annotation_id for row in rows if (row.annotation_id, row.updated_at) in frozen.seen]
    context.index.set_used(name, seen, number)
    context.index.update_round(
        name,
        number,
        status="done",
        snapshot_id=frozen.snapshot.id,
        decision=decision.outcome,
        reason=decision.reason,
        published_version=published,
        finished_at=datetime.now(UTC),
    )
    page = _step("report", write_report, context)
    if champion is not None:
        forget_old(context, {champion.label})
    return RoundReport(
        name,
        number,
        True,
        decision.outcome,
        decision.reason,
        champion.label if champion else "",
        published,
        len(frozen.train),
        len(frozen.holdout),
        decision.metrics,
        frozen.left_out,
        frozen.suspicious,
        str(page),
    )


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
