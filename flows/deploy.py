"""Schedules and triggers: what Prefect runs by itself for a project.

    watch/PROJECT   every `trigger.watch_seconds`, and whenever the backend hears of an annotation
    round/PROJECT   by hand, or at the times of `trigger.cron`
    train/PROJECT   on the training pool, for a worker that has a GPU; only with `retrain.pool`

Flows are found by module path, so any worker that has celloop installed can run them.
"""

import logging
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.types.entrypoint import EntrypointType

from flows.context import LoopContext
from flows.local.services import POOL
from flows.prefect_api import connected
from flows.retrain import train_flow
from flows.round import round_flow, watch_flow

logger = logging.getLogger(__name__)


def deploy(context: LoopContext) -> list[str]:
    """Creates or updates the deployments of a project; returns their names. Safe to repeat."""
    with connected(context.endpoints):
        return _deploy(context)


def _deploy(context: LoopContext) -> list[str]:
    trigger = context.config.trigger
    every = timedelta(seconds=trigger.watch_seconds)
    made = [
        _apply(context, watch_flow, POOL, interval=every),
        _apply(context, round_flow, POOL, cron=trigger.cron),
    ]
    if context.config.retrain.pool is not None:
        made.append(_apply(context, train_flow, context.config.retrain.pool))
    logger.info("deployments of %s: %s", context.project_name, ", ".join(made))
    return made


def _apply(
    context: LoopContext,
    flow: Flow[..., Any],
    pool: str,
    *,
    interval: timedelta | None = None,
    cron: str | None = None,
) -> str:
    """One deployment; a run that would start while another of its kind works is dropped, not queued."""
    _ensure_pool(pool)
    parameters = {"workspace": str(context.workspace.root.resolve()), "project": context.project_name}
    deployment = RunnerDeployment.from_flow(
        flow,
        name=context.project_name,
        parameters=parameters,
        interval=interval,
        cron=cron,
        work_pool_name=pool,
        entrypoint_type=EntrypointType.MODULE_PATH,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
    )
    deployment.apply()
    return f"{flow.name}/{context.project_name}"


def _ensure_pool(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
