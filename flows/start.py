"""A project from a folder of images: tasks, storage, backend, webhook and the first, random batch."""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from flows.context import LoopContext, config_path, open_context, save_project_config
from flows.local.workspace import Workspace
from flows.tasks import add_tasks, display_path, image_row, stop_on_full_disk
from flows.telling import Tell
from flows.tiling import cut_large, to_be_cut
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import LabelStudio
from loop.config import LoopConfig, PublishConfig, load_config
from loop.data.display import write_display
from loop.data.folder import open_folder
from loop.errors import ConfigError, ImageError, InputError, RefusedError, StateError
from loop.labelstudio.interface import Interface, label_config
from loop.types import ImageRef

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,38}[a-z0-9]")


@dataclass(frozen=True)
class StartReport:
    """A project that stands: its ids, how many images it shows, and what a person should know or mend.

    Of the `images` some are `tiles`, which `cut` large images of the folder were cut into.
    """

    name: str
    label_studio_project: int
    images: int
    problems: tuple[str, ...]
    cut: int = 0
    tiles: int = 0


def start_project(
    workspace: Workspace,
    images: Path,
    name: str,
    config: LoopConfig | None,
    *,
    label_config_xml: str | None = None,
    tell: Tell | None = None,
) -> StartReport:
    """Makes a project of a folder, or adds what is new in the folder to it. Safe to repeat and to kill anywhere.

    A new image of more than `tiles.max_px` is added as tiles, each a task of its own (flows/tiling.py).

    Args:
        workspace: where the services run.
        images: the dataset folder (design: images/, optional manifest.csv; labels are not read).
        name: lower-case letters, digits and dashes, 3 to 40 characters.
        config: settings, kept beside the project and used by every later round; None = those that it has already,
            the defaults for a new project.
        label_config_xml: a label config of one's own; None = the one that the project has already, for a new project
            polygons, brush and smart tools for `publish.labels`, with `doubtful_label` and `done_label` beside them. A
            project from before there were such labels goes on without, until a person adds them in Label Studio and
            runs this again.
        tell: called as tell(step, done, total).

    Raises:
        ConfigError: the name is unusable.
        InputError: the folder holds no image that can be shown, is a file, or holds two files of one stem.
        LabelError: the label config has no control that can hold masks.
        StateError: Label Studio has a project of this name that is somebody else's, or with another label config.
        OSError: the disk is full.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"project name {name!r}: use 3 to 40 lower-case letters, digits and dashes")
    if label_config_xml is not None:
        Interface.parse(label_config_xml)
    folder = open_folder(images, labels=False)
    context = _stand(workspace, images, name, config, label_config_xml)
    index = context.index
    found, copies = _group_copies(folder.images, index.images(name))
    whole, large = to_be_cut(context, found)
    shown, failed = _display(context, whole, tell)
    rows = add_tasks(context, [image_row(context.project.id, image) for image in shown], tell)
    index.add_images(name, rows)
    tiled = cut_large(context, large, tell)
    failed += tiled.problems
    if not rows and not tiled.tiles:
        raise InputError(f"none of the {len(found)} images can be shown: {'; '.join(failed[:3])}")
    unreadable = [f"{problem.path.name}: {problem.reason}" for problem in folder.problems] + failed
    problems = (*unreadable, *copies, *_one_group(index.images(name)), *_connect(context))
    for line in problems:
        logger.warning("project %s: %s", name, line)
    n_shown = len(rows) + tiled.tiles
    return StartReport(name, context.project.ls_project_id, n_shown, problems, tiled.images, tiled.tiles)


def _stand(
    workspace: Workspace, images: Path, name: str, config: LoopConfig | None, label_config_xml: str | None
) -> LoopContext:
    """The project in Label Studio, its settings and its line in the index, made or kept; see `start_project`."""
    endpoints = workspace.endpoints()
    label_studio = LabelStudio(endpoints.label_studio_url, endpoints.label_studio_token)
    index = Index(workspace.index_url)
    edited = config_path(workspace, name)
    settings = config or load_config(edited if edited.exists() else None)
    present = _present_config(label_studio, index, name, endpoints.label_studio_managed)
    xml = label_config_xml or present or _new_config(settings.publish)
    Interface.parse(xml)
    project_id = label_studio.create_project(name, xml, f"celloop: {images.name}")
    if config is not None or not edited.exists():
        save_project_config(workspace, name, settings)
    index.add_project(name, ls_project_id=project_id, root=images.resolve(), label_config=xml)
    return open_context(workspace, name)


def _new_config(shown: PublishConfig) -> str:
    return label_config(shown.labels, doubtful=shown.doubtful_label, done=shown.done_label)


def _present_config(label_studio: LabelStudio, index: Index, name: str, managed: bool) -> str | None:
    """The label config that the project has in Label Studio, or had there; None for a new project.

    Raises:
        StateError: the project of this name in somebody's own Label Studio is not one of this workspace. In a
            Label Studio of celloop's own it can only come from an interrupted start, and is taken over.
    """
    known = next((row for row in index.projects() if row.name == name), None)
    number = label_studio.find_project(name)
    if number is None:
        return known.label_config if known else None
    if not managed and (known is None or known.ls_project_id != number):
        raise StateError(
            f"that Label Studio has a project {name!r} (number {number}) which is not of this workspace; "
            "choose another name with --name, or delete that project there if an interrupted `celloop init` left it"
        )
    return str(label_studio.project(number)["label_config"])


def _group_copies(images: Sequence[ImageRef], known: Sequence[ImageRow]) -> tuple[list[ImageRef], list[str]]:
    """The images with files of equal content in one group, and a line about each such file but the first.

    A group is never on both sides of the hold-out; without one, a model could be measured on what it learnt from.
    """
    ids = {image.image_id for image in images}
    same: dict[str, list[ImageRow | ImageRef]] = {}
    elsewhere: list[ImageRow | ImageRef] = [
        row for row in known if row.image_id not in ids and row.state != "gone" and not row.parent
    ]
    for item in (*elsewhere, *images):
        same.setdefault(item.sha256, []).append(item)
    groups: dict[str, str] = {}
    lines: list[str] = []
    for copies in same.values():
        if len(copies) < 2:
            continue
        first = copies[0]
        group = first.group or next((copy.group for copy in copies if copy.group), first.image_id)
        groups |= {copy.image_id: group for copy in copies}
        lines += [
            f"{Path(copy.path).name}: the same file as {Path(first.path).name} under another name; they are one group "
            f"({group}) now, so that the hold-out stays apart: remove one of them"
            for copy in copies[1:]
        ]
    return [replace(image, group=groups.get(image.image_id, image.group)) for image in images], lines


def _one_group(rows: Sequence[ImageRow]) -> list[str]:
    present = [row for row in rows if row.is_present]
    groups = {row.group or row.image_id for row in present}
    if len(groups) != 1:
        return []
    return [
        f"all images ({len(present)}) are of one group ({groups.pop()}): no hold-out can be drawn, and without one no "
        "model is made; add images, or name each image's slide, well or patient in the column group of manifest.csv "
        "(tiles of one image are one group)"
    ]


def _connect(context: LoopContext) -> list[str]:
    """Attaches backend and webhook; what a Label Studio elsewhere refuses becomes a line, and the project stands."""
    endpoints, number = context.endpoints, context.project.ls_project_id
    user, password = endpoints.backend_user or None, endpoints.backend_password or None
    try:
        context.label_studio.connect_backend(number, endpoints.backend_url, "celloop", user=user, password=password)
        context.label_studio.connect_webhook(number, f"{endpoints.backend_url}/webhook", endpoints.webhook_secret)
    except RefusedError as error:
        if endpoints.label_studio_managed:
            raise
        return [
            f"Label Studio did not take the backend at {endpoints.backend_url} ({error}): outlines are published all "
            "the same, but clicks draw no cell and new annotations are found by polling; make that address reachable "
            "from Label Studio's machine (README, Your own Label Studio) and run `celloop init` again"
        ]
    return []


def _display(context: LoopContext, images: Sequence[ImageRef], tell: Tell | None) -> tuple[list[ImageRef], list[str]]:
    """Writes the 8-bit PNG of each image; returns those that worked and the reasons of those that did not.

    Raises:
        OSError: the disk is full; going on would leave out every image that is still to come.
    """
    directory = context.workspace.display_dir / context.project_name
    directory.mkdir(parents=True, exist_ok=True)
    shown: list[ImageRef] = []
    failed: list[str] = []

    def write(image: ImageRef) -> ImageError | None:
        try:
            write_display(image.path, display_path(context, image.image_id), sha256=image.sha256)
        except ImageError as error:
            stop_on_full_disk(error, directory)
            return error
        return None

    with ThreadPoolExecutor(max_workers=4) as pool:
        for done, (image, error) in enumerate(zip(images, pool.map(write, images), strict=True), start=1):
            if error is None:
                shown.append(image)
            else:
                failed.append(f"{image.path.name}: {error}")
            if tell is not None:
                tell("images", done, len(images))
    return shown, failed
