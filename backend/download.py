"""Image bytes from Label Studio over HTTP: only from its own address, with its token, within a size and a time."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import httpx

from loop.errors import ImageError, RefusedError, UnreachableError

ACCESS_TOKEN_S = 240.0
DEFAULT_PORTS = {"http": 80, "https": 443}


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of `url`, lower case.

    Raises:
        ImageError: it is no http(s) address, or it holds a user name.
    """
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise ImageError(f"{url!r} is no address: {error}") from error
    if scheme not in DEFAULT_PORTS or not host or parts.username is not None:
        raise ImageError(f"{url!r} is not read; expected http(s)://HOST[:PORT]/PATH without a user")
    return scheme, host, port or DEFAULT_PORTS[scheme]


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

    def url_of(self, value: str) -> str:
        """The full address of a task's image value; a path is one on Label Studio.

        Raises:
            ImageError: it leads to another host, climbs with "..", or no Label Studio is configured.
        """
        if not self._base:
            raise ImageError(f"{value!r} lies in Label Studio; start the backend with CELLOOP_LABEL_STUDIO_URL")
        url = self._base + value if value.startswith("/") and not value.startswith("//") else value
        if _origin(url) != _origin(self._base):
            raise ImageError(f"{value!r} is not on {self._base}; only images that Label Studio itself serves are read")
        if ".." in unquote(urlsplit(url).path).replace("\\", "/").split("/"):
            raise ImageError(f"{value!r} climbs out of its folder; give the path without '..'")
        return url

    def stream(self, value: str) -> Iterator[bytes]:
        """The image's bytes in pieces.

        Raises:
            ImageError: refused address, or larger than the limit.
            RefusedError: Label Studio answers with an error or with a redirect.
            UnreachableError: no answer, or not within the time.
        """
        url = self.url_of(value)
        deadline = time.monotonic() + self._timeout_s
        size = 0
        try:
            with self._open(url) as response:
                self._check(response, value)
                for piece in response.iter_bytes():
                    size += len(piece)
                    if size > self._max_bytes:
                        raise ImageError(f"{value!r} is larger than {self._max_bytes} bytes; tile it before importing")
                    if time.monotonic() > deadline:
                        raise UnreachableError(f"{value!r} did not arrive within {self._timeout_s:g} s")
                    yield piece
        except httpx.HTTPError as error:
            raise UnreachableError(f"Label Studio at {self._base}: {type(error).__name__} for {value!r}") from error

    @contextmanager
    def _open(self, url: str) -> Iterator[httpx.Response]:
        """A GET, again with a new access token where the first one has run out."""
        for fresh in (False, True):
            headers = self._authorization(url, fresh=fresh)
            with self._client.stream(
                "GET", url, headers=headers, timeout=self._timeout_s, follow_redirects=False
            ) as response:
                if response.status_code == 401 and not fresh and headers and self._is_personal():
                    continue
                yield response
                return

    def _check(self, response: httpx.Response, value: str) -> None:
        if response.is_redirect:
            raise RefusedError(f"Label Studio sends {value!r} to another address; use local files or uploads instead")
        if response.status_code == 401:
            raise RefusedError(f"Label Studio refuses the token for {value!r} (401); check CELLOOP_LABEL_STUDIO_TOKEN")
        if response.status_code != 200:
            raise RefusedError(f"Label Studio answers {response.status_code} for {value!r}; is the image there?")

    def _is_personal(self) -> bool:
        return self._token.count(".") == 2

    def _authorization(self, url: str, *, fresh: bool) -> dict[str, str]:
        """The token as a header; only for Label Studio's own data paths."""
        if not self._token or not url.startswith(f"{self._base}/data/"):
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
            access = str(reply.json()["access"])
            self._access = (access, time.monotonic() + ACCESS_TOKEN_S)
            return access
