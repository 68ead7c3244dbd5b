"""Puts the backend together: `create_app` builds the parts, the lifespan starts and stops their threads."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
from fastapi import FastAPI

from backend.download import LabelStudioDownloads
from backend.errors import UnknownProjectError, install_handlers
from backend.images import ImageSource
from backend.metrics import Metrics, Timing
from backend.model_slot import ModelSlot, OpenRegistry, load_segmenter
from backend.projects import ProjectIndex, Projects
from backend.routes import Parts, build_router
from backend.service import Service
from backend.settings import Settings, is_loopback
from backend.wake import SyncWaker
from loop.adapters.index import Index
from loop.adapters.mlflow_registry import Registry
from loop.errors import ConfigError


def open_mlflow(tracking_uri: str) -> OpenRegistry:
    """Project name -> its registry in MLflow.

    Raises:
        ConfigError: no address is given.
    """
    if not tracking_uri:
        raise ConfigError("the backend has no MLflow to take models from; set MLFLOW_TRACKING_URI in the environment")

    def open_registry(project: str) -> Registry:
        return Registry(tracking_uri, f"celloop-{project}", f"celloop-{project}")

    return open_registry


def open_client(url: str) -> httpx.Client:
    """A client for one service: no proxy for this machine, and a new connection for each request.

    Label Studio's own server answers 40 ms later on a connection that is kept open.
    """
    host = httpx.URL(url).host if url else ""
    return httpx.Client(trust_env=not is_loopback(host), limits=httpx.Limits(max_keepalive_connections=0))


def build_parts(
    settings: Settings, clients: tuple[httpx.Client, httpx.Client], index: ProjectIndex, registry: OpenRegistry
) -> Parts:
    """Everything behind the routes; no thread runs yet and nothing is loaded."""
    to_label_studio, to_prefect = clients
    metrics = Metrics()
    projects = Projects(index)
    slot = ModelSlot(
        index,
        registry,
        settings.models_dir,
        metrics,
        load=partial(load_segmenter, device=settings.device),
        poll_s=settings.poll_s,
        retry_s=settings.retry_s,
    )
    downloads = LabelStudioDownloads(
        settings.label_studio_url,
        settings.label_studio_token.get_secret_value(),
        to_label_studio,
        max_bytes=settings.max_image_bytes,
        timeout_s=settings.image_timeout_s,
    )
    images = ImageSource(settings.display_root, downloads, max_bytes=settings.max_image_bytes)
    service = Service(projects, slot, images, metrics, map_cache_bytes=settings.map_cache_bytes)

    def name_of(ls_project_id: int) -> str | None:
        try:
            return projects.find(ls_project_id).name
        except UnknownProjectError:
            return None

    waker = SyncWaker(
        settings.prefect_api_url,
        name_of,
        metrics,
        to_prefect,
        debounce_s=settings.debounce_s,
        limit_s=settings.debounce_limit_s,
    )
    return Parts(settings, metrics, projects, slot, service, waker)


def create_app(
    settings: Settings, *, registry: OpenRegistry | None = None, index: ProjectIndex | None = None
) -> FastAPI:
    """The application; its threads run from startup to shutdown.

    Args:
        settings: addresses, secrets, limits.
        registry: project name -> its registry; MLflow at `settings.mlflow_url` by default.
        index: the index; the one at `settings.index_url` by default.

    `app.state.parts` holds what the routes work with.

    Raises:
        ConfigError: the index's address is unusable, or there is no registry to take models from.
    """
    clients = (open_client(settings.label_studio_url), open_client(settings.prefect_api_url))
    parts = build_parts(
        settings, clients, index or Index(settings.index_url), registry or open_mlflow(settings.mlflow_url)
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts.slot.start()
        parts.waker.start()
        yield
        parts.service.stop()
        parts.waker.stop()
        parts.slot.stop()
        for pool in (parts.lookups, parts.people, parts.batches):
            pool.shutdown(wait=False, cancel_futures=True)
        for client in clients:
            client.close()

    app = FastAPI(title="celloop backend", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.metrics = parts.metrics
    app.state.parts = parts
    install_handlers(app, settings.secrets())
    app.add_middleware(Timing, metrics=parts.metrics)
    app.include_router(build_router(parts))
    return app
