"""The six routes that Label Studio and an operator call. Each answers from memory or hands the work to a thread."""

import time
from dataclasses import dataclass, field

import orjson
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from backend.ahead import Ahead
from backend.auth import require_user, require_webhook_secret
from backend.errors import BadRequestError, BusyError
from backend.limits import Bodies, ClickRate, Lane, check_predict, clicker
from backend.metrics import Metrics
from backend.model_slot import ModelSlot
from backend.projects import Projects, version_string
from backend.sam_slot import SamSlot
from backend.schemas import PredictRequest, SetupRequest, WebhookEvent, label_studio_id, parse
from backend.service import Service
from backend.settings import Settings
from backend.wake import SyncWaker
from loop.adapters.index import ProjectRow


@dataclass
class Parts:
    """What the routes work with. A lane for each kind of work: none queues behind another, a click behind nothing."""

    settings: Settings
    metrics: Metrics
    projects: Projects
    slot: ModelSlot
    service: Service
    waker: SyncWaker
    sams: SamSlot
    ahead: Ahead
    lookups: Lane = field(init=False)
    clicks: Lane = field(init=False)
    opened: Lane = field(init=False)
    batches: Lane = field(init=False)
    bodies: Bodies = field(init=False)
    rate: ClickRate = field(init=False)

    def __post_init__(self) -> None:
        limits = self.settings
        self.lookups = Lane("lookups", 4, 32)
        self.clicks = Lane("clicks", 8, limits.waiting_people)
        self.opened = Lane("opened", 4, limits.waiting_people)
        self.batches = Lane("batches", 2, limits.waiting_batches)
        self.bodies = Bodies(limits.max_body_bytes, within_s=limits.body_s, at_once=limits.max_bodies)
        self.rate = ClickRate(limits.clicks_per_s, limits.click_burst)


def _json(body: object) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


async def project_of(parts: Parts, ls_project_id: int) -> ProjectRow:
    """The project from the index, or as it was last where the index takes longer than Label Studio waits."""
    limit_s = parts.settings.lookup_s
    try:
        return await parts.lookups.run(lambda: parts.projects.find(ls_project_id), start_s=limit_s, end_s=limit_s)
    except BusyError as error:
        last = parts.projects.last(ls_project_id)
        if last is None:
            raise BusyError(f"the index gave no answer within {limit_s:g} s; try again") from error
        return last


def held(parts: Parts, project: str) -> str | None:
    """The label of the champion in service, None for none."""
    champion = parts.slot.get(project)
    return champion.label if champion else None


async def answer(parts: Parts, wanted: PredictRequest, begin: float) -> bytes:
    """The reply to /predict, from the lane that the request belongs to; `begin` is when it came (time.monotonic()).

    Raises:
        TooLargeError, TooManyClicksError, BusyError: more than the settings allow.
        LoopError: as the service says.
    """
    limits = parts.settings
    check_predict(wanted, limits)
    if wanted.params.context is not None:
        task = wanted.tasks[0]
        parts.rate.take(clicker(wanted.project, task.id, task.drafts))
        return await parts.clicks.run(lambda: parts.service.click(wanted), start_s=limits.start_s, end_s=limits.click_s)
    deadline = begin + limits.predict_s
    alone = len(wanted.tasks) == 1
    return await (parts.opened if alone else parts.batches).run(
        lambda: parts.service.predict(wanted, deadline=deadline),
        start_s=limits.start_s if alone else limits.predict_s,
        end_s=limits.reply_s,
    )


def _add_open_routes(router: APIRouter) -> None:
    @router.get("/health")
    async def health() -> Response:
        """200 while the process lives; says nothing about models, which load meanwhile."""
        return _json({"status": "UP"})


def _add_label_studio_routes(router: APIRouter, parts: Parts) -> None:
    @router.post("/setup")
    async def setup(request: Request) -> Response:
        """The version that the project's predictions have; loads nothing."""
        wanted = parse(SetupRequest, await parts.bodies.read(request))
        row = await project_of(parts, wanted.project)
        return _json({"model_version": version_string(row, held(parts, row.name))})

    @router.post("/predict")
    async def predict(request: Request) -> Response:
        """Predictions of tasks, or with a context the cell under a click."""
        begin = time.monotonic()
        wanted = parse(PredictRequest, await parts.bodies.read(request))
        return Response(await answer(parts, wanted, begin), media_type="application/json")

    @router.get("/versions")
    async def versions(project: str = "") -> Response:
        """The versions that /setup would name: of one Label Studio project, or of all."""
        if project:
            try:
                wanted = label_studio_id(project)
            except ValueError as error:
                raise BadRequestError(f"project={project[:40]!r}: {error}") from error
            rows = [await project_of(parts, wanted)]
        else:
            limit_s = parts.settings.lookup_s
            rows = list(await parts.lookups.run(parts.projects.all, start_s=limit_s, end_s=limit_s))
        return _json({"versions": [version_string(row, held(parts, row.name)) for row in rows]})


def _add_webhook(router: APIRouter, parts: Parts) -> None:
    @router.post("/webhook")
    async def webhook(request: Request) -> Response:
        """Notes an event of Label Studio and wakes a sync; the work is done elsewhere, later."""
        event = parse(WebhookEvent, await parts.bodies.read(request))
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
