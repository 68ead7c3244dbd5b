"""The backend under label-studio-ml 2.x: the same service, for people who deploy with `label-studio-ml start`.

That package builds a model object for each request, runs `fit` inside the request, writes what it knows of a project
into a database file and answers an exception with its traceback. Here the object is a thin handle on one service a
process, `fit` only wakes the sync, nothing is written, and a failure is answered as the backend itself answers it.
"""

import asyncio
import atexit
import logging
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import label_studio_ml.api
import orjson
from flask import Response, after_this_request, has_request_context, request
from label_studio_ml.model import LabelStudioMLBase
from label_studio_ml.response import ModelResponse
from label_studio_sdk.label_interface.objects import PredictionValue

from backend.app import create_app
from backend.auth import check_user, check_webhook
from backend.errors import BadRequestError, UnauthorizedError, answer_to, redact_logs
from backend.projects import version_string
from backend.routes import Parts, answer, held, project_of
from backend.schemas import PredictRequest, label_studio_id, parse
from backend.settings import Settings, is_loopback
from loop.adapters.label_studio_hooks import SECRET_HEADER
from loop.errors import LoopError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# What label-studio-ml calls it, and what Label Studio sends.
ACTIONS = {"ANNOTATION_DELETED": "ANNOTATIONS_DELETED"}


class Process:
    """The one backend of a process: the application's threads and an event loop, in a thread of its own.

    Args:
        settings: as for `python -m backend`.

    Raises:
        ConfigError: a setting is missing or unusable.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._app = create_app(settings)
        self.parts: Parts = self._app.state.parts
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._live, name="celloop-backend", daemon=True)
        self._thread.start()
        self._started.wait()
        atexit.register(self.stop)

    def ask(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What a coroutine gives in the backend's loop; called from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """Ends the threads; harmless when they have ended."""
        atexit.unregister(self.stop)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    def _live(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        async with self._app.router.lifespan_context(self._app):
            self._started.set()
            await self._end.wait()


class CelloopBackend(LabelStudioMLBase):  # type: ignore[misc]
    """What label-studio-ml asks; made anew for each request, so it holds nothing but that request.

    Without a password only callers on this machine are answered: `label-studio-ml start` listens to every address.
    """

    TRAIN_EVENTS = (*LabelStudioMLBase.TRAIN_EVENTS, *ACTIONS.values())

    _process: ClassVar[Process | None] = None
    _opening: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def process(cls) -> Process:
        """The process's service, begun by the first request: settings come from the environment.

        Raises:
            ConfigError: a setting is missing or unusable.
        """
        with cls._opening:
            if CelloopBackend._process is None:
                settings = Settings.from_environment(os.environ)
                redact_logs(settings.secrets())
                CelloopBackend._process = Process(settings)
            return CelloopBackend._process

    def setup(self) -> None:
        """Looks up the version of the project's predictions; a request that may not or cannot be served ends here."""
        self._refused = False
        try:
            process = self.process()
            if not has_request_context() and not self.project_id:  # label-studio-ml start --check
                return
            self._check_caller(process.settings)
            row = process.ask(project_of(process.parts, self._ls_project()))
            self.set("model_version", version_string(row, held(process.parts, row.name)))
        except Exception as error:
            self._refuse(error)

    def predict(
        self, tasks: Sequence[Mapping[str, Any]], context: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> ModelResponse:
        """Predictions of tasks, or with a context the cell under a click; regions keep the ids that the loop gave them.

        Args:
            tasks: as Label Studio sends them.
            context: {"result": prompts}; None or empty for a batch.
            **kwargs: login and password of the project's storage, which are not used.
        """
        begin = time.monotonic()
        results: list[Any] = []
        if not self._refused:
            try:
                process = self.process()
                wanted = parse(PredictRequest, orjson.dumps(self._document(tasks, context)))
                results = orjson.loads(process.ask(answer(process.parts, wanted, begin)))["results"]
            except Exception as error:
                self._refuse(error)
        predictions = [PredictionValue(**item) if item else [] for item in results]
        return ModelResponse(model_version=self.get("model_version"), predictions=predictions)

    def fit(self, event: str, data: Mapping[str, Any], **kwargs: Any) -> dict[str, str]:
        """Notes an event and wakes a sync; training is a flow's work and never done inside a request.

        Args:
            event: an action of Label Studio, or label-studio-ml's own name for it.
            data: the event's payload; only its project counts, which the object was made for.
            **kwargs: not used.
        """
        if self._refused:
            return {"status": "refused"}
        parts = self.process().parts
        action = ACTIONS.get(event, event)
        parts.metrics.event(action)
        return {"status": "sync" if parts.waker.event(self._ls_project(), action) else "noted"}

    def use_label_config(self, label_config: str) -> None:
        """Keeps the label config for this request; the service reads it itself."""
        self.set("label_config", label_config)

    def get(self, key: str) -> str | None:
        """What this object knows: of one request, where the base class reads a database file."""
        return self._known().get(key)

    def set(self, key: str, value: Any) -> None:
        """Keeps a value for this request."""
        self._known()[key] = value

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return key in self._known()

    def _known(self) -> dict[str, Any]:
        known: dict[str, Any] = self.__dict__.setdefault("_values", {})
        return known

    def _ls_project(self) -> int:
        try:
            return label_studio_id(self.project_id)
        except ValueError as error:
            raise BadRequestError(f"project {str(self.project_id)[:40]!r}: {error}") from error

    def _document(self, tasks: object, context: object) -> dict[str, object]:
        params = {"context": context or None}
        return {"tasks": tasks, "project": self.project_id, "label_config": self.get("label_config"), "params": params}

    def _check_caller(self, settings: Settings) -> None:
        if not has_request_context():
            return
        authorization = request.headers.get("authorization")
        if request.path == "/webhook":
            check_webhook(settings, authorization, request.headers.get(SECRET_HEADER))
        else:
            check_user(settings, authorization)
        asked = settings.user or label_studio_ml.api.BASIC_AUTH
        if not asked and not is_loopback(request.remote_addr or ""):
            raise UnauthorizedError(
                "without a password only callers on this machine are answered; set CELLOOP_BACKEND_USER and "
                "CELLOOP_BACKEND_PASSWORD, and give both to Label Studio where the backend is connected"
            )

    def _refuse(self, error: Exception) -> None:
        """Puts the backend's own refusal in place of the reply that label-studio-ml is going to make.

        Raises:
            Exception: the error itself, outside of a request.
        """
        if not has_request_context():
            raise error
        self._refused = True
        process = CelloopBackend._process
        reply = answer_to(error, process.settings.secrets() if process is not None else ())
        known = isinstance(error, LoopError)
        logger.log(logging.INFO if known else logging.ERROR, "refused: %s", error, exc_info=None if known else error)

        def in_its_place(made: Response) -> Response:
            return Response(bytes(reply.body), reply.status_code, headers=dict(reply.headers))

        after_this_request(in_its_place)
