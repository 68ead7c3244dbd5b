"""Who may call: HTTP basic auth on every route but /health, and the webhook's secret header. Constant-time compares."""

import base64
import hashlib
import hmac

from fastapi import Request

from backend.errors import UnauthorizedError
from backend.settings import Settings
from loop.adapters.label_studio_hooks import SECRET_HEADER


def _same(given: str, expected: str) -> bool:
    """Whether two texts are the same; the time it takes tells neither where they differ nor how long they are."""
    return hmac.compare_digest(*(hashlib.sha256(text.encode()).digest() for text in (given, expected)))


def basic_credentials_right(header: str | None, user: str, password: str) -> bool:
    """Whether an Authorization header holds these basic credentials; False for none and for a malformed one."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:  # no base64, letters beyond ASCII, or no UTF-8
        return False
    given_user, _, given_password = decoded.partition(":")
    user_right, password_right = _same(given_user, user), _same(given_password, password)
    return user_right and password_right


def check_user(settings: Settings, authorization: str | None) -> None:
    """Passes when no user is configured or a request's Authorization header holds the right credentials.

    Raises:
        UnauthorizedError: it does not.
    """
    password = settings.password.get_secret_value()
    if settings.user and not basic_credentials_right(authorization, settings.user, password):
        raise UnauthorizedError("user or password is missing or wrong; give those that the backend was started with")


def check_webhook(settings: Settings, authorization: str | None, given_secret: str | None) -> None:
    """Passes when the webhook's secret header is right; Label Studio's START_TRAINING may use basic auth instead.

    Where no secret is configured, the rule of every other route holds.

    Raises:
        UnauthorizedError: the secret is configured, and neither it nor the right user and password came.
    """
    secret = settings.webhook_secret.get_secret_value()
    if not secret:
        check_user(settings, authorization)
    elif not _same(given_secret or "", secret):
        password = settings.password.get_secret_value()
        if not (settings.user and basic_credentials_right(authorization, settings.user, password)):
            raise UnauthorizedError(f"the header {SECRET_HEADER} is missing or wrong; connect the webhook again")


def require_user(request: Request) -> None:
    """`check_user` of a request to the application."""
    check_user(request.app.state.settings, request.headers.get("authorization"))


def require_webhook_secret(request: Request) -> None:
    """`check_webhook` of a request to the application."""
    headers = request.headers
    check_webhook(request.app.state.settings, headers.get("authorization"), headers.get(SECRET_HEADER))
