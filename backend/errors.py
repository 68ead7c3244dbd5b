"""What the backend refuses, and how a refusal looks on the wire: a status and a short JSON, never a traceback.

Label Studio swallows an error status of /predict (the task opens without predictions) but hands a malformed 200 on
to the annotator as its own failure; so everything that cannot be served properly becomes an error status here.
"""

import logging
import math
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

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


class LaterError(StateError):
    """The same request may be answered later.

    Args:
        text: what was given, what was expected, what to do.
        retry_after_s: when to ask again, >= 0; the reply says it in whole seconds, at least one.
    """

    def __init__(self, text: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class NoModelError(LaterError):
    """The project has no champion yet, or it is still being loaded."""


class BusyError(LaterError):
    """There is no room for this request now, or its time was over before its turn came."""


class TooManyClicksError(LaterError):
    """One person clicks faster than the backend is set to answer."""


STATUS: tuple[tuple[type[LoopError], int], ...] = (
    (UnauthorizedError, 401),
    (UnknownProjectError, 404),
    (TooLargeError, 413),
    (ImageError, 422),
    (InputError, 400),
    (TooManyClicksError, 429),
    (LaterError, 503),
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


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` with every secret replaced by ***, also where it is quoted for an address."""
    forms = {form for secret in secrets for form in (secret, quote(secret), quote(secret, safe=""), quote_plus(secret))}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


class Redacting(logging.Formatter):
    """What another formatter writes, tracebacks too, without secrets."""

    def __init__(self, inner: logging.Formatter, secrets: Iterable[str]) -> None:
        super().__init__()
        self._inner = inner
        self._secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, or lines."""
        return redact(self._inner.format(record), self._secrets)


def redact_logs(secrets: Iterable[str]) -> None:
    """From now on the handlers that the root logger has write no secret."""
    held = tuple(secrets)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Redacting(handler.formatter or logging.Formatter(), held))


def answer_to(error: Exception, secrets: Iterable[str]) -> Response:
    """What a caller is told of an error: a LoopError in its own words without secrets, of anything else only a 500."""
    if not isinstance(error, LoopError):
        return refusal(500, "InternalError", "the backend failed; its log says why")
    status, headers = status_of(error), {}
    if isinstance(error, LaterError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="celloop"'
    return refusal(status, type(error).__name__, redact(str(error), secrets), headers)


def install_handlers(app: FastAPI, secrets: tuple[str, ...]) -> None:
    """Maps LoopError and the framework's own refusals to JSON; anything else is logged and answered as a plain 500."""

    async def on_loop_error(request: Request, error: Exception) -> Response:
        reply = answer_to(error, secrets)
        app.state.metrics.failed(type(error).__name__)
        logger.log(
            logging.ERROR if reply.status_code >= 500 and not isinstance(error, StateError) else logging.INFO,
            "%s %s refused with %d: %s",
            request.method,
            redact(request.url.path, secrets),
            reply.status_code,
            redact(str(error), secrets)[:MAX_DETAIL],
        )
        return reply

    async def on_http_error(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return refusal(status, "HTTPError", f"{request.method} {redact(request.url.path, secrets)} is not served here")

    async def on_anything_else(request: Request, error: Exception) -> Response:
        app.state.metrics.failed(type(error).__name__)
        logger.error("%s %s failed", request.method, redact(request.url.path, secrets), exc_info=error)
        return answer_to(error, secrets)

    app.add_exception_handler(LoopError, on_loop_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_anything_else)
