"""A training that a worker of the training pool runs: started or joined, and waited for."""

import logging
import time
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from loop.errors import ServiceError, StateError

logger = logging.getLogger(__name__)

POLL_S = 2.0
REMIND_S = 30.0
NO_WORKER_S = 3600.0


def run_on_pool(name: str, parameters: dict[str, Any], key: str, *, pool: str, longest_s: float) -> FlowRun:
    """The ended run of a deployment; one with the same key that waits or works already is joined.

    Args:
        name: the deployment, FLOW/PROJECT.
        parameters: of its flow.
        key: what makes two runs the same.
        pool: whose workers can take it.
        longest_s: how long it may run.

    Raises:
        StateError: there is no such deployment.
        ServiceError: no worker took the run, or it runs for too long.
    """
    with get_client(sync_client=True) as client:
        run = _open_run(client, name, parameters, key)
        logger.info("training run %s waits for a worker of pool %s", run.name, pool)
        return _wait(client, run, pool, longest_s)


def _open_run(client: SyncPrefectClient, name: str, parameters: dict[str, Any], key: str) -> FlowRun:
    """A run that has not ended: the one of a round that was interrupted, or a new one.

    Prefect gives the run of a key back for ever, also a failed one; so the attempt's number is part of the key.
    """
    try:
        deployment = client.read_deployment_by_name(name)
    except ObjectNotFound as error:
        raise StateError(
            f"Prefect has no deployment {name}; run `celloop init` again with the same images: it makes what is missing"
        ) from error
    attempt = 1
    while True:
        run = client.create_flow_run_from_deployment(
            deployment.id, parameters=parameters, state=Scheduled(), idempotency_key=f"{key}-{attempt}"
        )
        if run.state is None or not run.state.is_final():
            return run
        attempt += 1


def _wait(client: SyncPrefectClient, run: FlowRun, pool: str, longest_s: float) -> FlowRun:
    """The run once it has ended.

    Raises:
        ServiceError: no worker took it within NO_WORKER_S, or it runs for more than `longest_s`.
    """
    address = str(client.api_url).rstrip("/")
    start = f"PREFECT_API_URL={address} prefect worker start --pool {pool} --type process"
    waited_since = reminded = time.monotonic()
    running_since: float | None = None
    while True:
        run = client.read_flow_run(run.id)
        now = time.monotonic()
        if run.state is not None and run.state.is_final():
            return run
        if run.state is not None and run.state.is_running():
            running_since = running_since or now
            if now - running_since > longest_s:
                raise ServiceError(
                    f"training run {run.name} runs for more than {longest_s / 60:.0f} min; its worker may have died: "
                    "cancel it in Prefect, then the next round trains anew"
                )
        elif now - waited_since > NO_WORKER_S:
            raise ServiceError(
                f"no worker of pool {pool} took training run {run.name} in {NO_WORKER_S / 60:.0f} min; start one with "
                f"`{start}`, or take `retrain.pool` out of the project's settings. The next round joins the run"
            )
        elif now - reminded > REMIND_S:
            reminded = now
            logger.warning("no worker of pool %s has taken training run %s; start one: `%s`", pool, run.name, start)
        time.sleep(POLL_S)
