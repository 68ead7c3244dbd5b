"""Images as tasks of Label Studio: what a task holds, and making the tasks of images that have their display PNG."""

import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from flows.context import LoopContext
from flows.telling import Tell
from loop.adapters.index import ImageRow
from loop.labelstudio.interface import Interface
from loop.types import ImageRef


def image_row(project_id: int, image: ImageRef) -> ImageRow:
    """What the index is told of an image when it is added; nothing of its picture and its task yet."""
    return ImageRow(
        project_id=project_id,
        image_id=image.image_id,
        sha256=image.sha256,
        path=str(image.path.resolve()),
        display="",
        group=image.group,
        split=image.split,
        modality=image.modality,
        height=image.height,
        width=image.width,
    )


def display_path(context: LoopContext, image_id: str) -> Path:
    """Where the PNG lies that Label Studio shows of an image."""
    return context.workspace.display_dir / context.project_name / f"{image_id}.png"


def add_tasks(context: LoopContext, rows: Sequence[ImageRow], tell: Tell | None = None) -> list[ImageRow]:
    """The rows with the address of their picture and the number of their task; tasks that are there are kept.

    The pictures must lie at `display_path`. A Label Studio of celloop's own shows them from there, another one gets
    them sent.

    Args:
        context: the project.
        rows: images.
        tell: called as tell("tasks", done, total).
    """
    if not rows:
        return []
    project, label_studio, interface = context.project, context.label_studio, context.interface
    paths = [display_path(context, row.image_id) for row in rows]
    if context.endpoints.label_studio_managed:
        label_studio.connect_storage(project.ls_project_id, context.workspace.display_dir / project.name)
        root = context.workspace.root.resolve()
        urls = [f"/data/local-files/?d={quote(str(path.resolve().relative_to(root)))}" for path in paths]
    else:
        urls = label_studio.upload(project.ls_project_id, paths)
    shown = [replace(row, display=url) for row, url in zip(rows, urls, strict=True)]
    data = [{"data": task_data(interface, row)} for row in shown]
    ids = label_studio.import_tasks(project.ls_project_id, data)
    if tell is not None:
        tell("tasks", len(ids), len(ids))
    return [replace(row, task_id=task_id) for row, task_id in zip(shown, ids, strict=True)]


def task_data(interface: Interface, row: ImageRow) -> dict[str, object]:
    """What a task of Label Studio holds for an image: its address, and what a person may sort by."""
    return {
        interface.image_value_key: row.display,
        "celloop_id": row.image_id,
        "group": row.group,
        "modality": row.modality,
        "rank": row.rank,
        "reason": row.told,
        "annotators": row.annotators,
    }


def stop_on_full_disk(error: BaseException, directory: Path) -> None:
    """Raises the OSError behind `error`, with the directory that was written to, where the disk is full.

    Going on would leave out whatever is still to come.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(cause.errno, cause.strerror, str(directory)) from error
        cause = cause.__cause__
