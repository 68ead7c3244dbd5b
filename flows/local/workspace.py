"""The one folder that holds all state of an installation: databases, logs, secrets, and who runs where.

    ROOT/index.sqlite3        the index             ROOT/label-studio, mlflow, prefect   each server's own data
    ROOT/state.json           what runs now         ROOT/logs/NAME.log                   each process's output
    ROOT/secrets.json         0600                  ROOT/display/PROJECT                 what Label Studio shows

Deleting it is a clean start.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flows.local.credentials import Credentials, load_credentials
from flows.local.state import State, load_state
from loop.errors import StateError

DEFAULT_ROOT = ".celloop"
ENVIRONMENT = ("CELLOOP_LABEL_STUDIO_URL", "CELLOOP_LABEL_STUDIO_TOKEN", "MLFLOW_TRACKING_URI", "PREFECT_API_URL")


@dataclass(frozen=True)
class Endpoints:
    """Where the services answer and what they ask for; secrets are not in its repr.

    `label_studio_email` and `label_studio_password` are "" for a Label Studio that celloop did not start
    (`label_studio_managed` is False then).
    """

    label_studio_url: str
    label_studio_token: str = field(repr=False)
    label_studio_email: str
    label_studio_password: str = field(repr=False)
    mlflow_url: str
    prefect_api_url: str
    backend_url: str
    label_studio_managed: bool = True
    webhook_secret: str = field(default="", repr=False)
    backend_user: str = ""
    backend_password: str = field(default="", repr=False)
    prefect_home: str = ""


class Workspace:
    """The paths of a workspace, and the addresses of what runs in it.

    Args:
        root: the folder; it need not exist. None: $CELLOOP_WORKSPACE, or `.celloop` in the working directory.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root or os.environ.get("CELLOOP_WORKSPACE") or DEFAULT_ROOT).expanduser().resolve()

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"

    @property
    def index_url(self) -> str:
        """SQLAlchemy URL of the index: $CELLOOP_INDEX_URL, or a SQLite file in the workspace."""
        return os.environ.get("CELLOOP_INDEX_URL") or f"sqlite:///{self.root / 'index.sqlite3'}"

    @property
    def label_studio_dir(self) -> Path:
        """Label Studio's database, uploads and secret key."""
        return self.root / "label-studio"

    @property
    def mlflow_dir(self) -> Path:
        """MLflow's database and artifacts."""
        return self.root / "mlflow"

    @property
    def prefect_dir(self) -> Path:
        """PREFECT_HOME: the database of flow runs."""
        return self.root / "prefect"

    @property
    def logs_dir(self) -> Path:
        """One log a process."""
        return self.root / "logs"

    @property
    def display_dir(self) -> Path:
        """The 8-bit PNGs that Label Studio shows, a folder a project."""
        return self.root / "display"

    @property
    def annotations_dir(self) -> Path:
        """Cached annotation bodies."""
        return self.root / "annotations"

    @property
    def snapshots_dir(self) -> Path:
        """Immutable datasets, a folder each, named by the hash of their content."""
        return self.root / "snapshots"

    @property
    def predictions_dir(self) -> Path:
        """Cached predictions of model versions."""
        return self.root / "predictions"

    @property
    def training_dir(self) -> Path:
        """States of trainings under way, a folder each; gone when they end."""
        return self.root / "training"

    @property
    def models_dir(self) -> Path:
        """Downloaded model versions."""
        return self.root / "models"

    @property
    def embeddings_dir(self) -> Path:
        """Images as Segment Anything has encoded them."""
        return self.root / "embeddings"

    @property
    def tiles_dir(self) -> Path:
        """Tiles that were cut from large images, a folder a project."""
        return self.root / "tiles"

    @property
    def state_file(self) -> Path:
        """What runs, and on which ports."""
        return self.root / "state.json"

    @property
    def secrets_file(self) -> Path:
        """Passwords and tokens, readable by their owner only."""
        return self.root / "secrets.json"

    @property
    def lock_file(self) -> Path:
        """Locked by the one process that may run services in this workspace."""
        return self.root / "up.lock"

    def prepare(self) -> None:
        """Makes the folders that the services need; the root is closed to other users and ignored by git.

        Raises:
            StateError: the folder cannot be made or written.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.label_studio_dir, self.mlflow_dir, self.prefect_dir, self.logs_dir, self.display_dir):
                folder.mkdir(exist_ok=True)
            ignore = self.root / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or str(error)
            raise StateError(
                f"cannot use {self.root} as workspace: {reason}; give a folder that you may write to with --workspace"
            ) from error

    def state(self) -> State | None:
        """What the last `celloop up` wrote down, running or not; None before the first."""
        return load_state(self.state_file)

    def credentials(self) -> Credentials | None:
        """The stored secrets; None before the first `celloop up`."""
        return load_credentials(self.secrets_file)

    def endpoints(self) -> Endpoints:
        """Where the running services answer; in a container, what its environment says.

        Raises:
            StateError: nothing runs here, or it is still starting.
        """
        state, credentials = self.state(), self.credentials()
        if state is None or credentials is None or not state.is_running():
            if all(os.environ.get(name) for name in ENVIRONMENT):
                return endpoints_from_environment(os.environ)
            raise StateError(f"nothing runs in {self.root}; start the services with `celloop up`")
        if not state.ready:
            raise StateError(f"the services of {self.root} are still starting; wait for `celloop up` to say so")
        managed = state.label_studio_managed
        return Endpoints(
            label_studio_url=state.urls["label_studio"],
            label_studio_token=credentials.label_studio_token if managed else credentials.external_token,
            label_studio_email=credentials.label_studio_email if managed else "",
            label_studio_password=credentials.label_studio_password if managed else "",
            mlflow_url=state.urls["mlflow"],
            prefect_api_url=f"{state.urls['prefect']}/api",
            backend_url=state.urls["backend"],
            label_studio_managed=managed,
            webhook_secret=credentials.webhook_secret,
            prefect_home=str(self.prefect_dir),
        )


def endpoints_from_environment(environ: Mapping[str, str]) -> Endpoints:
    """Endpoints as docker-compose.yml gives them to its containers; the names in ENVIRONMENT must be set."""
    return Endpoints(
        label_studio_url=environ["CELLOOP_LABEL_STUDIO_URL"],
        label_studio_token=environ["CELLOOP_LABEL_STUDIO_TOKEN"],
        label_studio_email=environ.get("CELLOOP_LABEL_STUDIO_EMAIL", ""),
        label_studio_password=environ.get("CELLOOP_LABEL_STUDIO_PASSWORD", ""),
        mlflow_url=environ["MLFLOW_TRACKING_URI"],
        prefect_api_url=environ["PREFECT_API_URL"],
        backend_url=environ.get("CELLOOP_BACKEND_URL", ""),
        label_studio_managed=environ.get("CELLOOP_LABEL_STUDIO_MANAGED", "") == "true",
        webhook_secret=environ.get("CELLOOP_WEBHOOK_SECRET", ""),
        backend_user=environ.get("CELLOOP_BACKEND_USER", ""),
        backend_password=environ.get("CELLOOP_BACKEND_PASSWORD", ""),
        prefect_home=environ.get("PREFECT_HOME", ""),
    )
