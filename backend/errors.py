"""What the backend refuses, and how a refusal looks on the wire: a status and a short JSON, never a traceback.

Label Studio swallows an error status of /predict (the task opens without predictions) but hands a malformed 200 on
to the annotator as its own failure; so everything that cannot be served properly becomes an error status here.
"""

import logging

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from loop.errors import ImageError, InputError, LoopError, NonFiniteError, ServiceError, StateError

logger = logging.getLogger(__name__)

MAX_DETAIL = 600


class BadRequestError(InputError):
    """The body or a parameter of a request is not of the form that the route expects."""


class TooLargeError(InputError):
    """The body of a request is over the limit."""


class UnknownProjectError(InputError):
    """The index knows no project of this Label Studio id."""


class UnauthorizedError(LoopError):
    """No credentials, or wrong ones, where the backend asks for them."""


class NoModelError(StateError):
    """The project has no champion yet, or it is still being loaded."""


class BusyError(StateError):
    """The time for this request was over before its turn came."""


STATUS: tuple[tuple[type[LoopError], int], ...] = (
    (UnauthorizedError, 401),
    (UnknownProjectError, 404),
    (TooLargeError, 413),
    (ImageError, 422),
    (InputError, 400),
    (NoModelError, 503),
    (BusyError, 503),
    (StateError, 409),
    (ServiceError, 502),
    (NonFiniteError, 500),
    (LoopError, 500),
)


def status_of(error: LoopError) -> int:
    """The HTTP status of an error: that of the first class in STATUS which it is an instance of."""
    return next(status for kind, status in STATUS if isinstance(error, kind))


def refusal(status: int, kind: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    """The reply of a refused request: {"error": kind, "detail": what was given, expected, and what to do}."""
    body = orjson.dumps({"error": kind, "detail": detail[:MAX_DETAIL]})
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def redact(text: str, secrets: tuple[str, ...]) -> str:
    """`text` with every secret replaced by ***."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def install_handlers(app: FastAPI, secrets: tuple[str, ...]) -> None:
    """Maps LoopError and the framework's own refusals to JSON; anything else is logged and answered as a plain 500."""

    async def on_loop_error(request: Request, error: Exception) -> Response:
        status = status_of(error) if isinstance(error, LoopError) else 500
        detail = redact(str(error), secrets)
        app.state.metrics.failed(type(error).__name__)
        logger.log(
            logging.ERROR if status >= 500 and not isinstance(error, StateError) else logging.INFO,
            "%s %s refused with %d: %s",
            request.method,
            request.url.path,
            status,
            detail,
        )
        headers = {"WWW-Authenticate": 'Basic realm="celloop"'} if status == 401 else None
        return refusal(status, type(error).__name__, detail, headers)

    async def on_http_error(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return refusal(status, "HTTPError", f"{request.method} {request.url.path} is not served here")

    async def on_anything_else(request: Request, error: Exception) -> Response:
        app.state.metrics.failed(type(error).__name__)
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return refusal(500, "InternalError", "the backend failed; its log says why")

    app.add_exception_handler(LoopError, on_loop_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_anything_else)
