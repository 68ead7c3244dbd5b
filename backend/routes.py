"""The six routes that Label Studio and an operator call. Each answers from memory or hands the work to a thread."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import orjson
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from backend.auth import require_user, require_webhook_secret
from backend.errors import BadRequestError, BusyError, TooLargeError
from backend.metrics import Metrics
from backend.model_slot import ModelSlot
from backend.projects import Projects, version_string
from backend.schemas import PredictRequest, SetupRequest, WebhookEvent, label_studio_id, parse
from backend.service import Service
from backend.settings import Settings
from backend.wake import SyncWaker
from loop.adapters.index import ProjectRow

Result = TypeVar("Result")


def _pool(name: str, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=f"celloop-{name}")


@dataclass(frozen=True)
class Parts:
    """What the routes work with. Three pools, so that neither clicks nor /setup queue behind batches."""

    settings: Settings
    metrics: Metrics
    projects: Projects
    slot: ModelSlot
    service: Service
    waker: SyncWaker
    lookups: ThreadPoolExecutor = field(default_factory=lambda: _pool("lookups", 4))
    people: ThreadPoolExecutor = field(default_factory=lambda: _pool("people", 8))
    batches: ThreadPoolExecutor = field(default_factory=lambda: _pool("batches", 2))


async def read_body(request: Request, limit: int) -> bytes:
    """The body, read no further than `limit` bytes.

    Raises:
        TooLargeError: it is larger, by its header or in fact.
        BadRequestError: the caller hung up.
    """
    text = f"the body is over {limit} bytes; send fewer tasks at once"
    if int(request.headers.get("content-length", 0)) > limit:
        raise TooLargeError(text)
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise TooLargeError(text)
    except ClientDisconnect as error:
        raise BadRequestError("the caller hung up before the end of the body") from error
    return bytes(body)


async def _work(pool: Executor, call: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(pool, call)


def _json(body: object) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


async def _project(parts: Parts, ls_project_id: int) -> ProjectRow:
    """The project from the index, or as it was last where the index takes longer than Label Studio waits."""
    try:
        return await asyncio.wait_for(
            _work(parts.lookups, lambda: parts.projects.find(ls_project_id)), parts.settings.lookup_s
        )
    except TimeoutError as error:
        last = parts.projects.last(ls_project_id)
        if last is None:
            raise BusyError(f"the index gave no answer within {parts.settings.lookup_s:g} s; try again") from error
        return last


def _held(parts: Parts, project: str) -> str | None:
    champion = parts.slot.get(project)
    return champion.label if champion else None


def _add_open_routes(router: APIRouter) -> None:
    @router.get("/health")
    async def health() -> Response:
        """200 while the process lives; says nothing about models, which load meanwhile."""
        return _json({"status": "UP"})


def _add_label_studio_routes(router: APIRouter, parts: Parts) -> None:
    limit = parts.settings.max_body_bytes

    @router.post("/setup")
    async def setup(request: Request) -> Response:
        """The version that the project's predictions have; loads nothing."""
        wanted = parse(SetupRequest, await read_body(request, limit))
        row = await _project(parts, wanted.project)
        return _json({"model_version": version_string(row, _held(parts, row.name))})

    @router.post("/predict")
    async def predict(request: Request) -> Response:
        """Predictions of tasks, or with a context the cell under a click."""
        deadline = time.monotonic() + parts.settings.predict_s
        wanted = parse(PredictRequest, await read_body(request, limit))
        if wanted.params.context is not None:
            body = await _work(parts.people, lambda: parts.service.click(wanted))
        else:
            pool = parts.people if len(wanted.tasks) == 1 else parts.batches
            body = await _work(pool, lambda: parts.service.predict(wanted, deadline=deadline))
        return Response(body, media_type="application/json")

    @router.get("/versions")
    async def versions(project: str = "") -> Response:
        """The versions that /setup would name: of one Label Studio project, or of all."""
        if project:
            try:
                wanted = label_studio_id(project)
            except ValueError as error:
                raise BadRequestError(f"project={project[:40]!r}: {error}") from error
            rows = [await _project(parts, wanted)]
        else:
            rows = list(await _work(parts.lookups, parts.projects.all))
        return _json({"versions": [version_string(row, _held(parts, row.name)) for row in rows]})


def _add_webhook(router: APIRouter, parts: Parts) -> None:
    @router.post("/webhook")
    async def webhook(request: Request) -> Response:
        """Notes an event of Label Studio and wakes a sync; the work is done elsewhere, later."""
        event = parse(WebhookEvent, await read_body(request, parts.settings.max_body_bytes))
        parts.metrics.event(event.action)
        waking = event.project is not None and parts.waker.event(event.project.id, event.action)
        return _json({"status": "sync" if waking else "noted"})


def _add_metrics(router: APIRouter, parts: Parts) -> None:
    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(parts.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def build_router(parts: Parts) -> APIRouter:
    """All routes; every one but /health behind its check."""
    router = APIRouter()
    _add_open_routes(router)
    guarded = APIRouter(dependencies=[Depends(require_user)])
    _add_label_studio_routes(guarded, parts)
    _add_metrics(guarded, parts)
    hook = APIRouter(dependencies=[Depends(require_webhook_secret)])
    _add_webhook(hook, parts)
    router.include_router(guarded)
    router.include_router(hook)
    return router
