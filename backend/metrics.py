"""What the backend counts, in a registry of its own (two apps in one process do not mix)."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = frozenset({"/health", "/setup", "/predict", "/webhook", "/versions", "/metrics"})
ACTIONS = frozenset(
    {
        "START_TRAINING",
        "PROJECT_CREATED",
        "PROJECT_UPDATED",
        "PROJECT_DELETED",
        "TASKS_CREATED",
        "TASKS_DELETED",
        "ANNOTATION_CREATED",
        "ANNOTATIONS_CREATED",
        "ANNOTATION_UPDATED",
        "ANNOTATIONS_DELETED",
        "LABEL_LINK_CREATED",
        "LABEL_LINK_UPDATED",
        "LABEL_LINK_DELETED",
    }
)
BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)


class Metrics:
    """Counters by name; every label takes a bounded set of values."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        self.requests = Counter(
            "celloop_requests", "Requests answered, by route and status", ["route", "status"], registry=of
        )
        self.seconds = Histogram(
            "celloop_request_seconds", "Time to the end of the reply", ["route"], buckets=BUCKETS, registry=of
        )
        self.predictions = Counter("celloop_predictions", "Tasks predicted in batches", ["project"], registry=of)
        self.clicks = Counter(
            "celloop_clicks",
            "Clicks by what lay under them: cell, background",
            ["project", "outcome"],
            registry=of,
        )
        self.answers = Counter(
            "celloop_click_answers", "Clicks by who answered: sam, champion", ["project", "by"], registry=of
        )
        self.maps = Counter("celloop_click_maps", "Probability maps for clicks: hit, miss", ["result"], registry=of)
        self.map_bytes = Gauge("celloop_click_map_bytes", "Size of the cached probability maps", registry=of)
        self.embeddings = Counter(
            "celloop_click_embeddings", "Encoded images for clicks: hit, disk, miss", ["result"], registry=of
        )
        self.embedding_bytes = Gauge("celloop_click_embedding_bytes", "Size of those in memory", registry=of)
        self.prepared = Counter(
            "celloop_prepared_images", "Images looked at before somebody clicked", ["project", "by"], registry=of
        )
        self.model = Gauge("celloop_model_info", "1 for the model held now", ["project", "model"], registry=of)
        self.sam = Gauge("celloop_sam_info", "1 for each SAM that is held", ["sam"], registry=of)
        self.swaps = Counter("celloop_model_swaps", "Models taken into service", ["project"], registry=of)
        self.failures = Counter("celloop_failures", "Things that failed, by kind of error", ["kind"], registry=of)
        self.webhooks = Counter("celloop_webhook_events", "Events from Label Studio", ["action"], registry=of)
        self.wakes = Counter("celloop_sync_wakes", "Syncs asked of Prefect", ["outcome"], registry=of)

    def failed(self, kind: str) -> None:
        """One more failure of this kind (an error's class name)."""
        self.failures.labels(kind).inc()

    def event(self, action: str) -> None:
        """One more webhook event; an action that Label Studio does not have counts as "other"."""
        self.webhooks.labels(action if action in ACTIONS else "other").inc()

    def holds(self, project: str, model: str, before: str | None) -> None:
        """The model of `project` is now `model`; `before` was held until now, None for the first."""
        if before is not None:
            self.model.remove(project, before)
        self.model.labels(project, model).set(1)
        self.swaps.labels(project).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class Timing:
    """ASGI middleware that counts and times every request by route; paths that are no route count as "other"."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status = 500
        begin = time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begin)
