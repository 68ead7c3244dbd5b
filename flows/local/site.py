"""The services of a workspace on this machine: which programs, which addresses, which environment."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flows.local import services
from flows.local.credentials import Credentials
from flows.local.processes import RUN_MARK
from flows.local.services import LOOPBACK, Service, Site
from flows.local.workspace import Workspace
from loop.errors import ConfigError, StateError

PASSED_ON = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
    "CELLOOP_HOME",
)
"""What a service gets of the person's environment. Not more: Label Studio reads names as plain as HOST and DEBUG."""


@dataclass(frozen=True)
class UpOptions:
    """What a person may ask of `celloop up`.

    Attributes:
        ports: service name to port; None = any.
        label_studio_url: an existing Label Studio to use instead of starting one, with its token.
    """

    ports: Mapping[str, int | None] = field(default_factory=dict)
    label_studio_url: str = ""
    label_studio_token: str = field(default="", repr=False)

    def check(self) -> None:
        """Refuses half an address.

        Raises:
            ConfigError: a URL without a token, a token without a URL, or a URL that is none.
        """
        if bool(self.label_studio_url) != bool(self.label_studio_token):
            raise ConfigError(
                "an existing Label Studio needs both --label-studio-url and --label-studio-token "
                "(or the token in CELLOOP_LABEL_STUDIO_TOKEN); give both, or neither to start one here"
            )
        if self.label_studio_url and not self.label_studio_url.startswith(("http://", "https://")):
            raise ConfigError(f"--label-studio-url {self.label_studio_url!r} must begin with http:// or https://")


def label_studio_program() -> Path:
    """What starts Label Studio: $CELLOOP_LABEL_STUDIO_BIN, or `.venv-labelstudio` beside the application's environment.

    Raises:
        StateError: it is not installed.
    """
    named = os.environ.get("CELLOOP_LABEL_STUDIO_BIN")
    places = [Path(sys.prefix).parent, Path(__file__).resolve().parents[2]]
    candidates = [Path(named)] if named else [place / ".venv-labelstudio/bin/label-studio" for place in places]
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    raise StateError(
        f"Label Studio is not installed at {candidates[0]}; run `make`, name its program in CELLOOP_LABEL_STUDIO_BIN, "
        "or use an existing server with --label-studio-url and --label-studio-token"
    )


def local_urls(ports: Mapping[str, int], options: UpOptions) -> dict[str, str]:
    """Base URL of each service that others talk to."""
    urls = {name: f"http://{LOOPBACK}:{ports[name]}" for name in ("label_studio", "mlflow", "prefect", "backend")}
    if options.label_studio_url:
        urls["label_studio"] = options.label_studio_url.rstrip("/")
    return urls


def local_services(
    workspace: Workspace, ports: Mapping[str, int], credentials: Credentials, options: UpOptions
) -> tuple[Service, ...]:
    """What `celloop up` starts, in no particular order.

    Raises:
        StateError: Label Studio is to be started and is not installed.
    """
    managed = not options.label_studio_url
    site = Site(
        host=LOOPBACK,
        root=workspace.root,
        ports=ports,
        urls=local_urls(ports, options),
        label_studio_program=str(label_studio_program()) if managed else "label-studio",
    )
    own = {
        "CELLOOP_INDEX_URL": workspace.index_url,
        "CELLOOP_LABEL_STUDIO_TOKEN": credentials.label_studio_token if managed else credentials.external_token,
        "CELLOOP_WEBHOOK_SECRET": credentials.webhook_secret,
    }
    user = {
        "LABEL_STUDIO_USERNAME": credentials.label_studio_email,
        "LABEL_STUDIO_PASSWORD": credentials.label_studio_password,
        "LABEL_STUDIO_USER_TOKEN": credentials.label_studio_token,
    }
    first = (services.label_studio(site, user),) if managed else ()
    return (
        *first,
        services.mlflow(site),
        services.prefect(site),
        services.worker(site, own),
        services.backend(site, own),
    )


def child_environment(service: Service, run_id: str) -> dict[str, str]:
    """The whole environment of a service's process, with the mark of its run."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", **service.environment, **service.secrets, RUN_MARK: run_id}
