"""What a step of the loop works with: one project and the services that hold its parts."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from flows.local.workspace import Endpoints, Workspace
from loop.adapters.index import ImageRow, Index, ProjectRow
from loop.adapters.label_studio_api import LabelStudio
from loop.adapters.mlflow_registry import CLIENT_ENVIRONMENT, Registry
from loop.config import LoopConfig, load_config
from loop.data.text_file import write_text
from loop.errors import StateError
from loop.labelstudio.interface import Interface
from loop.types import ImageRef


@dataclass(frozen=True)
class LoopContext:
    """One project with its settings and the doors to Label Studio, MLflow and the index."""

    workspace: Workspace
    endpoints: Endpoints
    config: LoopConfig
    index: Index
    label_studio: LabelStudio
    registry: Registry
    project_name: str

    @property
    def project(self) -> ProjectRow:
        """The project as the index knows it now."""
        return self.index.project(self.project_name)

    @property
    def interface(self) -> Interface:
        """The project's label config, parsed."""
        names = self.config.publish
        return Interface.parse(self.project.label_config, doubtful=names.doubtful_label, done=names.done_label)


def config_path(workspace: Workspace, project: str) -> Path:
    """Where a project's settings lie, as a person may edit them."""
    return workspace.root / "configs" / f"{project}.yaml"


def save_project_config(workspace: Workspace, project: str, config: LoopConfig) -> Path:
    """Writes a project's settings; the file is complete, so nothing changes under a later default."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return write_text(config_path(workspace, project), text)


def registry_name(project: str) -> str:
    """The name of a project's registered model and of its MLflow experiment."""
    return f"celloop-{project}"


def open_context(workspace: Workspace, project: str) -> LoopContext:
    """A context on the running services.

    Raises:
        StateError: nothing runs in this workspace, or it has no such project.
    """
    endpoints = workspace.endpoints()
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    index = Index(workspace.index_url)
    index.project(project)
    path = config_path(workspace, project)
    return LoopContext(
        workspace=workspace,
        endpoints=endpoints,
        config=load_config(path if path.exists() else None),
        index=index,
        label_studio=LabelStudio(endpoints.label_studio_url, endpoints.label_studio_token),
        registry=Registry(endpoints.mlflow_url, registry_name(project), registry_name(project)),
        project_name=project,
    )


def only_project(workspace: Workspace, name: str | None) -> str:
    """`name`, or the workspace's single project where none was named.

    Raises:
        StateError: there is no project yet, or there are several and none was named.
    """
    if name is not None:
        return name
    if not workspace.root.is_dir():
        raise StateError(f"there is no workspace at {workspace.root}; start the services with `celloop up`")
    names = [row.name for row in Index(workspace.index_url).projects()]
    if not names:
        raise StateError("this workspace has no project; make one with `celloop init --images DIR`")
    if len(names) > 1:
        raise StateError(f"this workspace has several projects ({', '.join(names)}); name one with --project")
    return names[0]


def group_of(row: ImageRow) -> str:
    """The group of an image; one without a group is a group of its own."""
    return row.group or row.image_id


def shows_a_model(project: str, published: str) -> bool:
    """Whether what was published under this name came from a model; before there is one, it is 0 cells everywhere."""
    return bool(published) and re.fullmatch(rf"{re.escape(registry_name(project))}-r\d+", published) is None


def image_ref(row: ImageRow) -> ImageRef:
    """The index row of an image as the library's reference to it."""
    return ImageRef(
        image_id=row.image_id,
        path=Path(row.path),
        sha256=row.sha256,
        height=row.height,
        width=row.width,
        channels=3,
        group=row.group,
        split=row.split,
        modality=row.modality,
    )


class BusyError(StateError):
    """Another process is at work on the same project."""


@contextmanager
def project_lock(workspace: Workspace, project: str) -> Iterator[None]:
    """Held while a round of `project` runs on this machine; freed by the system when its holder dies.

    Raises:
        BusyError: another round of this project runs.
    """
    with _locked(workspace, project, wait=False):
        yield


@contextmanager
def sync_lock(workspace: Workspace, project: str) -> Iterator[None]:
    """Held for the seconds of one sync; another one waits for it."""
    with _locked(workspace, f"{project}.sync", wait=True):
        yield


@contextmanager
def tiles_lock(workspace: Workspace, project: str) -> Iterator[None]:
    """Held while the tasks of tiles are made, which no two may do at once; another one waits for it."""
    with _locked(workspace, f"{project}.tiles", wait=True):
        yield


@contextmanager
def _locked(workspace: Workspace, name: str, *, wait: bool) -> Iterator[None]:
    directory = workspace.root / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BusyError(f"a round of {name!r} is running already; wait for it or look at Prefect") from error
        yield
