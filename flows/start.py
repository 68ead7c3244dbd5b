"""A project from a folder of images: tasks, storage, backend, webhook and the first, random batch."""

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from flows.context import LoopContext, open_context, save_project_config
from flows.local.workspace import Workspace
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import LabelStudio
from loop.config import LoopConfig
from loop.data.folder import Folder, open_folder
from loop.data.store import write_display
from loop.errors import ConfigError, ImageError
from loop.labelstudio.interface import Interface, label_config
from loop.types import ImageRef

logger = logging.getLogger(__name__)

Tell = Callable[[str, int, int], None]
NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,38}[a-z0-9]")


@dataclass(frozen=True)
class StartReport:
    """A project that stands: its ids, how many images it shows, and the files that it could not read."""

    name: str
    label_studio_project: int
    images: int
    problems: tuple[str, ...]


def start_project(
    workspace: Workspace,
    images: Path,
    name: str,
    config: LoopConfig,
    *,
    label_config_xml: str | None = None,
    tell: Tell | None = None,
) -> StartReport:
    """Makes a project of a folder, or adds what is new in the folder to it. Safe to repeat and to kill anywhere.

    Args:
        workspace: where the services run.
        images: the dataset folder (design: images/, optional manifest.csv; labels are not read).
        name: lower-case letters, digits and dashes, 3 to 40 characters.
        config: settings, kept beside the project and used by every later round.
        label_config_xml: a label config of one's own; none = polygons, brush and smart tools for `publish.labels`.
        tell: called as tell(step, done, total).

    Raises:
        ConfigError: the name is unusable.
        InputError: the folder holds no image, is a file, or holds two files of one stem.
        LabelError: the label config has no control that can hold masks.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"project name {name!r}: use 3 to 40 lower-case letters, digits and dashes")
    xml = label_config_xml or label_config(config.publish.labels)
    interface = Interface.parse(xml)
    folder = open_folder(images, labels=False)
    endpoints = workspace.endpoints()
    label_studio = LabelStudio(endpoints.label_studio_url, endpoints.label_studio_token)
    project_id = label_studio.find_project(name)
    if project_id is None:
        project_id = label_studio.create_project(name, xml, f"celloop: {images.name}")
    save_project_config(workspace, name, config)
    Index(workspace.index_url).add_project(name, ls_project_id=project_id, root=images.resolve(), label_config=xml)
    context = open_context(workspace, name)
    shown, failed = _display(context, folder.images, tell)
    rows = _tasks(context, interface, shown, tell)
    context.index.add_images(name, rows)
    label_studio.connect_backend(
        project_id,
        endpoints.backend_url,
        "celloop",
        user=endpoints.backend_user or None,
        password=endpoints.backend_password or None,
    )
    label_studio.connect_webhook(project_id, f"{endpoints.backend_url}/webhook", endpoints.webhook_secret)
    problems = _problems(folder, failed)
    for line in problems:
        logger.warning("not imported: %s", line)
    return StartReport(name, project_id, len(rows), problems)


def _display(
    context: LoopContext, images: Sequence[ImageRef], tell: Tell | None
) -> tuple[list[tuple[ImageRef, Path]], list[str]]:
    """Writes the 8-bit PNG of each image; returns those that worked and the reasons of those that did not."""
    directory = context.workspace.display_dir / context.project_name
    directory.mkdir(parents=True, exist_ok=True)
    shown: list[tuple[ImageRef, Path]] = []
    failed: list[str] = []

    def write(image: ImageRef) -> ImageError | None:
        try:
            write_display(image.path, directory / f"{image.image_id}.png")
        except ImageError as error:
            return error
        return None

    with ThreadPoolExecutor(max_workers=4) as pool:
        for done, (image, error) in enumerate(zip(images, pool.map(write, images), strict=True), start=1):
            if error is None:
                shown.append((image, directory / f"{image.image_id}.png"))
            else:
                failed.append(f"{image.path.name}: {error}")
            if tell is not None:
                tell("images", done, len(images))
    return shown, failed


def _tasks(
    context: LoopContext, interface: Interface, shown: Sequence[tuple[ImageRef, Path]], tell: Tell | None
) -> list[ImageRow]:
    """Tasks in Label Studio for the images, and their rows for the index."""
    project = context.project
    label_studio = context.label_studio
    directory = context.workspace.display_dir / project.name
    if context.endpoints.label_studio_managed:
        label_studio.connect_storage(project.ls_project_id, directory)
        root = context.workspace.root.resolve()
        urls = [f"/data/local-files/?d={quote(str(path.resolve().relative_to(root)))}" for _, path in shown]
    else:
        urls = label_studio.upload(project.ls_project_id, [path for _, path in shown])
    rows = [
        ImageRow(
            project_id=project.id,
            image_id=image.image_id,
            sha256=image.sha256,
            path=str(image.path.resolve()),
            display=url,
            group=image.group,
            split=image.split,
            modality=image.modality,
            height=image.height,
            width=image.width,
        )
        for (image, _), url in zip(shown, urls, strict=True)
    ]
    data = [{"data": task_data(interface, row)} for row in rows]
    ids = label_studio.import_tasks(project.ls_project_id, data)
    if tell is not None:
        tell("tasks", len(ids), len(ids))
    return [replace(row, task_id=task_id) for row, task_id in zip(rows, ids, strict=True)]


def task_data(interface: Interface, row: ImageRow) -> dict[str, object]:
    """What a task of Label Studio holds for an image: its address, and what a person may sort by."""
    return {
        interface.image_value_key: row.display,
        "celloop_id": row.image_id,
        "group": row.group,
        "modality": row.modality,
        "rank": row.rank,
        "reason": row.reason,
    }


def _problems(folder: Folder, failed: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{problem.path.name}: {problem.reason}" for problem in folder.problems) + tuple(failed)
