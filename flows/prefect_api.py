"""Flow runs of this process reported to the workspace's Prefect server."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.local.workspace import Endpoints
from loop.errors import UnreachableError


@contextmanager
def connected(endpoints: Endpoints) -> Iterator[None]:
    """Inside, Prefect's clients and flow runs speak to the server of `endpoints`.

    Raises:
        UnreachableError: the server gives no answer, or stopped while a flow ran.
    """
    try:
        with temporary_settings({PREFECT_API_URL: endpoints.prefect_api_url}):
            yield
    except httpx.TransportError as error:
        raise UnreachableError(
            f"Prefect at {endpoints.prefect_api_url} gives no answer ({error}); start it with `celloop up`, then run "
            "the same command again: it goes on where it stopped"
        ) from error
