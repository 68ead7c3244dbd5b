"""Flow runs of this process reported to the workspace's Prefect server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from prefect.context import use_profile
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL, PREFECT_HOME, Profile

from flows.local.workspace import Endpoints
from loop.errors import UnreachableError


@contextmanager
def connected(endpoints: Endpoints) -> Iterator[None]:
    """Inside, Prefect's clients and flow runs speak to the server of `endpoints`.

    A person's own Prefect profile and the keys in it, or in the environment, are not used. PREFECT_HOME is that of the
    workspace while the context lasts.

    Raises:
        UnreachableError: the server gives no answer, or stopped while a flow ran.
    """
    settings: dict[Any, Any] = {
        PREFECT_API_URL: endpoints.prefect_api_url,
        PREFECT_API_KEY: None,
        PREFECT_API_AUTH_STRING: None,
    }
    if endpoints.prefect_home:
        settings[PREFECT_HOME] = endpoints.prefect_home
    profile = Profile(name="celloop", settings=settings)
    try:
        with (
            _home(endpoints.prefect_home),
            use_profile(profile, override_environment_variables=True, include_current_context=False),
        ):
            yield
    except httpx.TransportError as error:
        raise UnreachableError(
            f"Prefect at {endpoints.prefect_api_url} gives no answer ({error}); start it with `celloop up`, then run "
            "the same command again: it goes on where it stopped"
        ) from error


@contextmanager
def _home(directory: str) -> Iterator[None]:
    """PREFECT_HOME in the environment: it decides which profiles are read, before any setting does."""
    before = os.environ.get("PREFECT_HOME")
    if directory:
        os.environ["PREFECT_HOME"] = directory
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PREFECT_HOME", None)
        else:
            os.environ["PREFECT_HOME"] = before
