"""Requests to Label Studio: the token kept out of every text, and every failure named with its cure.

Label Studio's own client, the SDK, runs over the httpx client of this module. By itself it would repeat a POST whose
answer was lost (a bulk write may then be applied twice) and put response headers into its exceptions; here nothing is
ever sent twice, a failure is told in celloop's errors before the SDK sees it, and a redirect is never followed, so the
token stays with the server that it belongs to.
"""

import ipaddress
import json
import re
import time
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
from pydantic import SecretStr

from loop.errors import ConfigError, RefusedError, UnreachableError

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio

CONNECT_SECONDS = 10.0
ACCESS_TOKEN_SECONDS = 240.0
"""Label Studio's access tokens live 300 s."""

_CURES = {
    401: "give the token of Label Studio's page Account & Settings (legacy token or personal access token)",
    403: "ask the administrator of Label Studio for the right to do this",
    413: "send less in one request",
}
_LEGACY_OFF_CURE = (
    "switch legacy tokens on (Label Studio, Organization, Access Token Settings) or give a personal access token"
)
_LOCAL_ADDRESS_CURE = (
    "Label Studio blocks local addresses; start it with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false"
)
_DETAIL_CHARACTERS = 600


class Answer(NamedTuple):
    """A status and the parsed JSON body (None where there was none)."""

    status: int
    body: Any


class StatusError(RefusedError):
    """A refusal with its status and parsed JSON body, for a caller who expects one of them."""

    def __init__(self, text: str, status: int = 0, body: Any = None) -> None:
        super().__init__(text)
        self.status = status
        self.body = body


def encode(body: Any) -> bytes:
    """`body` as compact JSON. Raises ValueError on NaN and infinity, which JSON lacks."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def delete(call: Callable[[int], object], number: int) -> None:
    """Deletes by a method of the SDK, e.g. `sdk.projects.delete`; nothing happens if there is none of this number."""
    try:
        call(number)
    except StatusError as error:
        if error.status != 404:
            raise


class Connection:
    """One Label Studio server and the token to it. Safe to share between threads; `close` frees its sockets.

    Over plain http a new connection is made for each request: Label Studio's own server answers 40 ms later on one
    that is kept open (Nagle's algorithm against delayed acknowledgements; 52 ms against 8 ms for a small request).
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 120.0) -> None:
        self.url = _checked_url(url)
        self._auth = _TokenAuth(SecretStr(_checked_token(token)), self.url)
        self._client = _Client(self.url, self._auth, timeout_s)

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    def close(self) -> None:
        """Frees the sockets; the connection cannot be used afterwards."""
        self._client.close()

    @cached_property
    def sdk(self) -> "LabelStudio":
        """Label Studio's own client over this connection; each of its methods sends once and raises as `send` does."""
        from label_studio_sdk import LabelStudio  # 0.6 s of processor time, so not before there is something to ask

        # the key that it puts on each request is replaced by the token of this connection, whatever the environment has
        return LabelStudio(base_url=self.url, api_key="replaced", max_retries=0, httpx_client=self._client)

    def get(self, path: str, **params: Any) -> Any:
        """The JSON that `path` answers with. Raises like `send`."""
        return self.send("GET", path, params=params).body

    def send(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: bytes | None = None,
        files: Sequence[tuple[str, bytes]] = (),
        params: dict[str, Any] | None = None,
    ) -> Answer:
        """What the server answers to one request, which is sent exactly once; for what the SDK cannot ask.

        Args:
            method: "GET", "POST", "PATCH" or "DELETE".
            path: absolute, e.g. "/api/projects/".
            body: becomes the JSON body; None = no body.
            content: the JSON body, encoded already, in place of `body`.
            files: (name, PNG) to send as a form in place of a JSON body.
            params: the query.

        Raises:
            UnreachableError: no answer, or none in time.
            StatusError: a status outside 200..299.
            RefusedError: a redirect, or something that is no JSON.
            ValueError: NaN or infinity in `body`.
        """
        if body is not None:
            content = encode(body)
        request = self._client.build_request(
            method,
            path,
            content=content,
            files=[(name, (name, png, "image/png")) for name, png in files] or None,
            params=params or {},
            headers={} if content is None else {"Content-Type": "application/json"},
        )
        response = self._client.send(request)
        return Answer(response.status_code, self._client.parsed(response) if response.content else None)


class _Client(httpx.Client):
    """httpx with celloop's errors in place of its own and of every answer that is no success."""

    def __init__(self, url: str, auth: "_TokenAuth", timeout_s: float) -> None:
        super().__init__(
            base_url=url,
            auth=auth,
            headers={"Accept": "application/json"},
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_SECONDS, timeout_s)),
            limits=httpx.Limits(max_keepalive_connections=8 if url.startswith("https") else 0),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            trust_env=not _is_loopback(url),
        )
        self._url = url
        self._scrub = auth.scrub
        self._timeout_s = timeout_s

    def request(self, method: str, url: httpx.URL | str, **rest: Any) -> httpx.Response:
        """What the SDK sends with; refuses what is no JSON too, for the SDK's own error would hold headers."""
        response = super().request(method, url, **rest)
        if method != "DELETE":
            self.parsed(response)
        return response

    def send(self, request: httpx.Request, **rest: Any) -> httpx.Response:
        """The answer to `request`, which was a success; raises UnreachableError, StatusError or RefusedError."""
        what = self._what(request)
        try:
            response = super().send(request, **rest)
        except httpx.HTTPError as error:
            raise UnreachableError(self._scrub(_no_answer(self._url, what, error, self._timeout_s))) from error
        if response.is_redirect:
            raise RefusedError(self._scrub(_redirected(self._url, what, response)))
        if not response.is_success:
            text = self._scrub(_refused(self._url, what, response))
            raise StatusError(text, response.status_code, _json_or_none(self._scrub(response.text)))
        return response

    def parsed(self, response: httpx.Response) -> Any:
        """The JSON of an answer. Raises RefusedError if it is none."""
        try:
            return json.loads(response.content)
        except ValueError as error:
            raise RefusedError(
                f"{self._url} answered {self._what(response.request)} with "
                f"{response.headers.get('content-type', 'something')}; expected JSON. "
                "Is this the address of Label Studio?"
            ) from error

    def _what(self, request: httpx.Request) -> str:
        return f"{request.method} {request.url.path.removeprefix(httpx.URL(self._url).path.rstrip('/'))}"


class _TokenAuth(httpx.Auth):
    """Puts the token on each request; a personal access token is first traded for an access token."""

    requires_response_body = True

    def __init__(self, token: SecretStr, url: str) -> None:
        self._token = token
        self._url = url
        self._personal = token.get_secret_value().count(".") == 2
        self._access: SecretStr | None = None
        self._access_until = 0.0

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if not self._personal:
            request.headers["Authorization"] = f"Token {self._token.get_secret_value()}"
            yield request
            return
        if self._access is None or time.monotonic() > self._access_until:
            self._keep((yield self._trade(request)))
        response = yield self._bearing(request)
        if response.status_code == 401:  # ran out while this machine slept; 401 = nothing was done, so again is safe
            self._keep((yield self._trade(request)))
            yield self._bearing(request)

    def _trade(self, request: httpx.Request) -> httpx.Request:
        body = {"refresh": self._token.get_secret_value()}
        return httpx.Request("POST", f"{self._url}/api/token/refresh/", json=body, extensions=request.extensions)

    def _bearing(self, request: httpx.Request) -> httpx.Request:
        if self._access is not None:
            request.headers["Authorization"] = f"Bearer {self._access.get_secret_value()}"
        return request

    def _keep(self, response: httpx.Response) -> None:
        what = "the personal access token"
        if response.is_redirect:
            raise RefusedError(_redirected(self._url, what, response))
        if not response.is_success:
            raise RefusedError(self.scrub(_refused(self._url, what, response)))
        try:
            access = str(response.json()["access"])
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(
                f"{self._url} answered {what} without an access token; is this the address of Label Studio?"
            ) from error
        self._access = SecretStr(access)
        self._access_until = time.monotonic() + ACCESS_TOKEN_SECONDS

    def scrub(self, text: str) -> str:
        """`text` without any token in it, in case a server sends one back."""
        for secret in (self._token, self._access):
            if secret is not None:
                text = text.replace(secret.get_secret_value(), "***")
        return text


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no address of Label Studio; expected one like http://127.0.0.1:8080") from error
    if parsed.userinfo:
        raise ConfigError("the address of Label Studio holds a user or password; give it without, and the token apart")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{url!r} is no address of Label Studio; expected one like http://127.0.0.1:8080")
    return str(parsed.copy_with(query=None, fragment=None)).rstrip("/")


def _checked_token(token: str) -> str:
    stripped = token.strip()
    if not stripped:
        raise ConfigError("no token for Label Studio was given; copy it from Label Studio's page Account & Settings")
    if not re.fullmatch(r"[\x21-\x7e]+", stripped):
        raise ConfigError(
            f"the token for Label Studio ({len(stripped)} characters) holds a space, a line break or a letter that "
            "no token has; copy it again from Label Studio's page Account & Settings"
        )
    return stripped


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _no_answer(url: str, what: str, error: httpx.HTTPError, timeout_s: float) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"nothing answers at {url} ({error}); start Label Studio (`celloop up`) or give its right address"
    if isinstance(error, httpx.TimeoutException):
        return (
            f"Label Studio at {url} did not answer {what} within {timeout_s:g} s; it may still be working on it. "
            "Run this again: what is already there is not done twice"
        )
    reason = str(error) or type(error).__name__
    return f"Label Studio at {url} broke off during {what} ({reason}); see that it runs, then run this again"


def _redirected(url: str, what: str, response: httpx.Response) -> str:
    target = httpx.URL(response.headers.get("location", "")).copy_with(query=None, fragment=None, userinfo=b"")
    where = str(target) or "nowhere"
    return (
        f"{url} sent {what} on to {where} ({response.status_code}), which is not followed, for the token is meant for "
        "Label Studio alone; give the address at which Label Studio answers itself"
    )


def _refused(url: str, what: str, response: httpx.Response) -> str:
    detail = _detail(response)
    cure = _CURES.get(response.status_code, "see Label Studio's log" if response.status_code >= 500 else "")
    if response.status_code == 401 and "legacy token" in detail:
        cure = _LEGACY_OFF_CURE
    if "reserved network address" in detail:
        cure = _LOCAL_ADDRESS_CURE
    text = f"Label Studio at {url} refused {what} with {response.status_code}: {detail}"
    return f"{text}; {cure}" if cure else text


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _detail(response: httpx.Response) -> str:
    """What the answer says in one line; long ones lose their middle, because the reason stands at either end."""
    try:
        body = json.loads(response.content)
    except ValueError:
        kind = response.headers.get("content-type", "")
        text = "a web page" if "html" in kind else response.text or "no text"
    else:
        if isinstance(body, dict):
            reasons = body.get("validation_errors") or body.get("detail") or body
            text = reasons if isinstance(reasons, str) else json.dumps(reasons, ensure_ascii=False)
        else:
            text = str(body)
    text = " ".join(text.split())
    half = _DETAIL_CHARACTERS // 2
    return text if len(text) <= _DETAIL_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
