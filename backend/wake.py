"""A webhook event says "look now": asks Prefect for one sync soon after the last event of a project.

Only Prefect's REST API is spoken. Where Prefect is away or too busy (its database locked: 503) a wake is tried again a
few times; one that fails is logged and forgotten: polling finds the change anyway.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from backend.metrics import Metrics
from loop.adapters.label_studio_api import WEBHOOK_ACTIONS
from loop.errors import RefusedError, UnreachableError

logger = logging.getLogger(__name__)

WAKING = frozenset({*WEBHOOK_ACTIONS, "START_TRAINING"})
TIMEOUT_S = 10.0
RETRY_S = (0.5, 2.0, 8.0)
BUSY = frozenset({429, 502, 503, 504})
MAX_PENDING = 1000


@dataclass
class _Pending:
    first: float
    due: float
    key: str
    tries: int = 0


class SyncWaker:
    """Collects events and starts at most one run a project for a burst of them, from a thread of its own.

    Args:
        api_url: Prefect's API, e.g. http://127.0.0.1:4200/api; "" = nothing is ever woken.
        name_of: Label Studio project id -> project name, or None for an unknown one; called in the thread.
        metrics: wakes are counted there.
        client: for the two requests of a wake.
        debounce_s: quiet time after an event before the run is asked for.
        limit_s: but never later than this after the first event.
    """

    def __init__(
        self,
        api_url: str,
        name_of: Callable[[int], str | None],
        metrics: Metrics,
        client: httpx.Client,
        *,
        debounce_s: float,
        limit_s: float,
    ) -> None:
        self._api_url = api_url.rstrip("/")
        self._name_of = name_of
        self._metrics = metrics
        self._client = client
        self._debounce_s = debounce_s
        self._limit_s = limit_s
        self._changed = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to work."""
        self._thread = threading.Thread(target=self._run, name="celloop-wakes", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Ends the thread; what is pending is left to polling."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def event(self, ls_project_id: int, action: str) -> bool:
        """Notes an event and returns at once; True where the action means that a sync may find something.

        PROJECT_UPDATED is not one of them: publishing causes it, and a sync that publishes would wake itself.
        """
        if action not in WAKING or not self._api_url:
            return False
        now = time.monotonic()
        with self._changed:
            pending = self._pending.get(ls_project_id)
            if pending is None and len(self._pending) >= MAX_PENDING:
                return False
            if pending is None:
                key = f"celloop-webhook-{ls_project_id}-{time.time_ns()}"
                pending = self._pending[ls_project_id] = _Pending(now, now, key)
            pending.due = min(now + self._debounce_s, pending.first + self._limit_s)
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while (due := self._next()) is not None:
            ls_project_id, wake = due
            try:
                self._start_sync(ls_project_id, wake.key)
            except Exception as error:
                if isinstance(error, UnreachableError) and wake.tries < len(RETRY_S):
                    logger.info("sync of Label Studio project %d is asked for again soon: %s", ls_project_id, error)
                    self._again(ls_project_id, wake)
                    continue
                self._metrics.wakes.labels("failed").inc()
                self._metrics.failed(type(error).__name__)
                logger.warning(
                    "no sync started for Label Studio project %d: %s: %s; the next poll finds the change",
                    ls_project_id,
                    type(error).__name__,
                    error,
                )

    def _again(self, ls_project_id: int, wake: _Pending) -> None:
        """Puts a wake back under its key, unless a newer event waits already."""
        with self._changed:
            wake.due = time.monotonic() + RETRY_S[wake.tries]
            wake.tries += 1
            self._pending.setdefault(ls_project_id, wake)

    def _next(self) -> tuple[int, _Pending] | None:
        """Waits for the first wake that is due and takes it; None at the end."""
        with self._changed:
            while not self._stopped:
                if not self._pending:
                    self._changed.wait()
                    continue
                ls_project_id, pending = min(self._pending.items(), key=lambda item: item[1].due)
                left = pending.due - time.monotonic()
                if left <= 0:
                    del self._pending[ls_project_id]
                    return ls_project_id, pending
                self._changed.wait(left)
        return None

    def _start_sync(self, ls_project_id: int, key: str) -> None:
        project = self._name_of(ls_project_id)
        if project is None:
            self._metrics.wakes.labels("unknown").inc()
            logger.info("event of Label Studio project %d, which is none of this loop's", ls_project_id)
            return
        name = f"watch/{quote(project, safe='')}"
        deployment = self._ask("GET", f"/deployments/name/{name}")["id"]
        self._ask("POST", f"/deployments/{deployment}/create_flow_run", {"idempotency_key": key, "tags": ["webhook"]})
        self._metrics.wakes.labels("started").inc()
        logger.info("sync of %s asked of Prefect after an event in Label Studio", project)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Prefect's JSON answer to one request, sent once; UnreachableError where trying again may help."""
        try:
            answer = self._client.request(method, f"{self._api_url}{path}", json=body, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            raise UnreachableError(f"Prefect at {self._api_url} gives no answer ({type(error).__name__})") from error
        if answer.status_code in BUSY:
            raise UnreachableError(f"Prefect is too busy: it answered {method} {path} with {answer.status_code}")
        if not answer.is_success:
            raise RefusedError(f"Prefect answered {method} {path} with {answer.status_code}; does its flow runner run?")
        return answer.json()
