"""Puts the backend together: `create_app` builds the parts, the lifespan starts and stops their threads."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
from fastapi import FastAPI

from backend.ahead import Ahead, ImageIndex
from backend.clicks import Clicks
from backend.download import LabelStudioDownloads
from backend.errors import install_handlers
from backend.images import ImageSource
from backend.metrics import Metrics, Timing
from backend.model_slot import ModelSlot, OpenRegistry, load_segmenter
from backend.project_settings import ProjectSettings
from backend.projects import Projects
from backend.routes import Parts, build_router
from backend.sam_slot import SamSlot, load_weights
from backend.service import Service
from backend.settings import Settings, is_loopback
from backend.sights import Sights
from backend.turns import Turns
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
    settings: Settings, clients: tuple[httpx.Client, httpx.Client], index: ImageIndex, registry: OpenRegistry
) -> Parts:
    """Everything behind the routes; no thread runs yet and nothing is loaded."""
    to_label_studio, to_prefect = clients
    metrics, projects, turns = Metrics(), Projects(index), Turns()
    of_projects = ProjectSettings(settings.configs_dir)
    often = {"poll_s": settings.poll_s, "retry_s": settings.retry_s}
    load_champion = partial(load_segmenter, device=settings.device)
    slot = ModelSlot(index, registry, settings.models_dir, metrics, load=load_champion, **often)
    sams = SamSlot(index, of_projects, metrics, load=partial(load_weights, device=settings.device), **often)
    images = _open_images(settings, to_label_studio)
    sights = Sights(
        turns,
        metrics,
        scene_bytes=settings.map_cache_bytes,
        embedding_bytes=settings.embedding_cache_bytes,
        directory=settings.embeddings_dir,
    )
    clicks = Clicks(
        projects, of_projects, slot=slot, sams=sams, images=images, sights=sights, turns=turns, metrics=metrics
    )
    service = Service(projects, of_projects, slot=slot, images=images, clicks=clicks, turns=turns, metrics=metrics)
    budget = min(settings.map_cache_bytes, settings.embedding_cache_bytes) // 2
    ahead = Ahead(index, of_projects, clicks=clicks, images=images, turns=turns, metrics=metrics, budget_bytes=budget)
    waker = SyncWaker(
        settings.prefect_api_url,
        projects.name_of,
        metrics,
        to_prefect,
        debounce_s=settings.debounce_s,
        limit_s=settings.debounce_limit_s,
    )
    return Parts(settings, metrics, projects, slot, service, waker, sams, ahead)


def _open_images(settings: Settings, to_label_studio: httpx.Client) -> ImageSource:
    downloads = LabelStudioDownloads(
        settings.label_studio_url,
        settings.label_studio_token.get_secret_value(),
        to_label_studio,
        max_bytes=settings.max_image_bytes,
        timeout_s=settings.image_timeout_s,
    )
    return ImageSource(
        settings.display_root, downloads, max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels
    )


def create_app(settings: Settings, *, registry: OpenRegistry | None = None, index: ImageIndex | None = None) -> FastAPI:
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
        threads = (parts.slot, parts.sams, parts.waker, parts.ahead)
        for thread in threads:
            thread.start()
        yield
        parts.service.stop()
        for thread in reversed(threads):
            thread.stop()
        for pool in (parts.lookups, parts.clicks, parts.opened, parts.batches):
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
