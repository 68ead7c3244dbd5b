"""Image bytes from Label Studio over HTTP: only from its own address, with its token, within a size and a time."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qsl, unquote, urlsplit

import httpx

from loop.errors import ImageError, RefusedError, UnreachableError

ACCESS_TOKEN_S = 240.0
DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_SHOWN = 200
# A packed image could unpack to any size; image formats are packed already.
AS_IT_LIES = {"Accept-Encoding": "identity"}


def shown(value: str) -> str:
    """A task's image value for a reply or a log: no user, no password, no query but Label Studio's `d`; 200 characters.

    What signs an address for its bearer (a token, a signature) is in its query.
    """
    head, _, query = value.partition("?")
    try:
        known = dict(parse_qsl(query)).get("d") if query else None
        scheme, slashes, rest = head.partition("//")
        if slashes and "@" in rest:
            head = f"{scheme}//***@{rest.rpartition('@')[2]}"
    except ValueError:
        known = None
    text = head if not query else f"{head}?d={known}" if known is not None else f"{head}?***"
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")


def _origin(url: httpx.URL, value: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address, as they will be connected to.

    Raises:
        ImageError: it is no http(s) address, or it holds a user name.
    """
    if url.scheme not in DEFAULT_PORTS or not url.host or url.userinfo:
        raise ImageError(f"{shown(value)} is not read; expected http(s)://HOST[:PORT]/PATH without a user")
    return url.scheme, url.host, url.port or DEFAULT_PORTS[url.scheme]


def _parse(url: str, value: str) -> httpx.URL:
    """The address as the client that asks for it reads it: one parser decides and connects.

    Raises:
        ImageError: it is none.
    """
    try:
        urlsplit(url)
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise ImageError(f"{shown(value)} is no address; expected http(s)://HOST[:PORT]/PATH") from error


class LabelStudioDownloads:
    """GET of images from one Label Studio; its token never leaves for another address.

    Args:
        base_url: Label Studio's address, "" where none is configured (then nothing is downloaded).
        token: legacy token (40 hex) or personal access token (a JWT, exchanged for a short-lived one), "" for none.
        client: made for this; redirects are not followed whatever the client says.
        max_bytes: a larger image is refused while it is being read.
        timeout_s: for one image, in all.
    """

    def __init__(self, base_url: str, token: str, client: httpx.Client, *, max_bytes: int, timeout_s: float) -> None:
        self._base = base_url.rstrip("/")
        self._token = token
        self._client = client
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._access: tuple[str, float] | None = None
        self._lock = threading.Lock()

    def url_of(self, value: str) -> httpx.URL:
        """The full address of a task's image value; a path is one on Label Studio.

        Raises:
            ImageError: it leads to another host, climbs with "..", or no Label Studio is configured.
        """
        if not self._base:
            raise ImageError(f"{shown(value)} lies in Label Studio; start the backend with CELLOOP_LABEL_STUDIO_URL")
        path = value.startswith("/") and not value.startswith(("//", "/\\"))
        url = _parse(self._base + value if path else value, value)
        if _origin(url, value) != _origin(_parse(self._base, self._base), self._base):
            raise ImageError(
                f"{shown(value)} is not on {self._base}; only images that Label Studio itself serves are read"
            )
        # Both, as the client has straightened a plain ".." in its own already.
        paths = (value.partition("?")[0], url.raw_path.partition(b"?")[0].decode())
        if any(".." in unquote(path).replace("\\", "/").split("/") for path in paths):
            raise ImageError(f"{shown(value)} climbs out of its folder; give the path without '..'")
        return url

    def stream(self, value: str) -> Iterator[bytes]:
        """The image's bytes in pieces.

        Raises:
            ImageError: refused address, or larger than the limit.
            RefusedError: Label Studio answers with an error, with a redirect or with compressed bytes.
            UnreachableError: no answer, or not within the time.
        """
        url = self.url_of(value)
        name = shown(value)
        deadline = time.monotonic() + self._timeout_s
        size = 0
        try:
            with self._open(url) as response:
                self._check(response, name)
                for piece in response.iter_raw():
                    size += len(piece)
                    if size > self._max_bytes:
                        raise ImageError(f"{name} is larger than {self._max_bytes} bytes; tile it before importing")
                    if time.monotonic() > deadline:
                        raise UnreachableError(f"{name} did not arrive within {self._timeout_s:g} s")
                    yield piece
        except httpx.HTTPError as error:
            raise UnreachableError(f"Label Studio at {self._base}: {type(error).__name__} for {name}") from error

    @contextmanager
    def _open(self, url: httpx.URL) -> Iterator[httpx.Response]:
        """A GET, again with a new access token where the first one has run out."""
        for fresh in (False, True):
            token = self._authorization(url, fresh=fresh)
            with self._client.stream(
                "GET", url, headers=AS_IT_LIES | token, timeout=self._timeout_s, follow_redirects=False
            ) as response:
                if response.status_code == 401 and not fresh and token and self._is_personal():
                    continue
                yield response
                return

    def _check(self, response: httpx.Response, name: str) -> None:
        if response.is_redirect:
            raise RefusedError(f"Label Studio sends {name} to another address; use local files or uploads instead")
        if response.status_code == 401:
            raise RefusedError(f"Label Studio refuses the token for {name} (401); check CELLOOP_LABEL_STUDIO_TOKEN")
        if response.status_code != 200:
            raise RefusedError(f"Label Studio answers {response.status_code} for {name}; is the image there?")
        packed = response.headers.get("content-encoding", "identity")
        if packed.lower() != "identity":
            raise RefusedError(f"Label Studio sends {name} as {packed[:40]!r}; serve images without compression")

    def _is_personal(self) -> bool:
        return self._token.count(".") == 2

    def _authorization(self, url: httpx.URL, *, fresh: bool) -> dict[str, str]:
        """The token as a header; only for Label Studio's own data paths."""
        data = httpx.URL(self._base).raw_path.rstrip(b"/") + b"/data/"
        if not self._token or not url.raw_path.startswith(data):
            return {}
        if not self._is_personal():
            return {"Authorization": f"Token {self._token}"}
        return {"Authorization": f"Bearer {self._access_token(fresh=fresh)}"}

    def _access_token(self, *, fresh: bool) -> str:
        """The short-lived token that a personal access token is exchanged for; kept while it is valid."""
        with self._lock:
            if not fresh and self._access is not None and time.monotonic() < self._access[1]:
                return self._access[0]
            reply = self._client.post(
                f"{self._base}/api/token/refresh/",
                json={"refresh": self._token},
                timeout=self._timeout_s,
                follow_redirects=False,
            )
            if reply.status_code != 200:
                raise RefusedError(
                    f"Label Studio refuses the personal access token ({reply.status_code}); "
                    "make a new one on its page Account & Settings"
                )
            access = self._granted(reply)
            self._access = (access, time.monotonic() + ACCESS_TOKEN_S)
            return access

    def _granted(self, reply: httpx.Response) -> str:
        try:
            return str(reply.json()["access"])
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(
                f"Label Studio at {self._base} gives no access token for the personal one; is the address right?"
            ) from error
