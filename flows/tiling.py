"""Large and crowded images as tiles, each an image and a task of its own; loop/data/tiles.py says which and how.

The rows of an image's tiles in the index are the decision to cut it, made once. What follows from them (their pictures
and tasks, the end of the image's own task) is made wherever it is missing, so a run that was killed is only repeated.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from flows.context import LoopContext, group_of, tiles_lock
from flows.tasks import add_tasks, display_path, image_row, stop_on_full_disk
from flows.telling import Tell
from loop.adapters.index import ImageRow
from loop.config import TilesConfig
from loop.data.display import write_display
from loop.data.predictions import StoredPrediction
from loop.data.preprocess import Window
from loop.data.store import naming
from loop.data.text_file import write_text
from loop.data.tiles import Tile, cut, cut_from, tile_id, write_tiles
from loop.data.windows import intensities, open_windows
from loop.errors import ImageError, InputError
from loop.types import ImageRef, Instances

logger = logging.getLogger(__name__)

SMALLEST = 256
"""No tile's own part is cut shorter to get fewer cells into it, px."""

_WRITERS = 4


@dataclass(frozen=True)
class TilingReport:
    """How many images of a folder are offered as how many tiles, and what could not be cut or shown."""

    images: int
    tiles: int
    problems: tuple[str, ...]


def to_be_cut(context: LoopContext, images: Sequence[ImageRef]) -> tuple[list[ImageRef], list[ImageRef]]:
    """The images of a folder that are shown whole, and those that are offered as tiles.

    The latter are new ones of more than `tiles.max_px`, and those that were cut before; what is known as a whole image
    stays one, whatever the settings say by now.

    Raises:
        InputError: an image has the name of a tile.
    """
    known = context.index.images(context.project_name)
    same = sorted({row.image_id for row in known if row.parent} & {image.image_id for image in images})
    if same:
        raise InputError(f"{same[0]} is the name of a tile in this project; rename that image")
    ids = {row.image_id for row in known}
    parents = {row.parent for row in known}
    settings = context.config.tiles

    def is_large(image: ImageRef) -> bool:
        if image.image_id in ids:
            return image.image_id in parents
        size = image.height * image.width
        return 0 < settings.max_px < size and max(image.height, image.width) > settings.side

    return [i for i in images if not is_large(i)], [i for i in images if is_large(i)]


def cut_large(context: LoopContext, images: Sequence[ImageRef], tell: Tell | None = None) -> TilingReport:
    """Registers images as tiles, each with its task; those that are registered get what they lack. Safe to repeat.

    Tiles of one image are one group, the image's own or else one of its name, so that none of them measures what
    another one taught. Files of tiles that are gone are cut again, tasks that were deleted are made again, and group,
    split and modality follow the folder's.

    Args:
        context: the project.
        images: as `to_be_cut` gives them.
        tell: called as tell("tiles", done, total) after each image, and for their tasks.

    Raises:
        OSError: the disk is full.
    """
    known = context.index.images(context.project_name)
    taken = {row.image_id for row in known if not row.parent}
    problems: list[str] = []
    for done, image in enumerate(images, start=1):
        tiles = [row for row in known if row.parent == image.image_id]
        try:
            if tiles:
                _renew(context, image, context.index.image(context.project_name, image.image_id), tiles)
            else:
                _register(context, image, taken)
        except InputError as error:
            stop_on_full_disk(error, _directory(context))
            problems.append(f"{image.path.name}: {error}")
        if tell is not None:
            tell("tiles", done, len(images))
    problems += settle(context, tell)
    ids = {image.image_id for image in images}
    rows = context.index.images(context.project_name)
    offered = [row for row in rows if row.parent in ids and row.task_id is not None]
    tiles = [row for row in offered if row.is_present]
    return TilingReport(len({row.parent for row in tiles}), len(tiles), tuple(problems))


def cut_dense(
    context: LoopContext,
    predictions: Mapping[str, StoredPrediction],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageRow, ...]:
    """Cuts open images in which a model finds more than `tiles.max_cells` cells into tiles that show fewer.

    Only images that nobody has seen: never chosen for a batch, and without annotation, skip or draft by anybody. Tiles
    are cut smaller until none shows more cells, down to own parts of 256 px; an image that would be one tile stays
    whole. A tile may be cut like any other image, until its own part is as small as that: its tiles are tiles of the
    same image. Safe to repeat and to kill
    anywhere; what an earlier run left undone is finished first.

    Args:
        context: the project.
        predictions: by image id.
        progress: called as progress(done, total) after each image.

    Returns:
        The new tiles, which have no prediction yet.

    Raises:
        UnreachableError: Label Studio does not answer; run the round again.
    """
    for line in settle(context):
        logger.warning("tiles of %s: %s", context.project_name, line)
    plans = _crowded(context, predictions)
    tasks = [row.task_id for row, _ in plans if row.task_id is not None]
    free = set(context.label_studio.untouched(context.project.ls_project_id, tasks)) if tasks else set()
    made: list[str] = []
    for done, (row, tiles) in enumerate(plans, start=1):
        if row.task_id in free:
            try:
                rows = _cut(context, row, tiles)
            except InputError as error:
                logger.warning("%s is not cut into tiles: %s", row.image_id, error)
            else:
                context.index.add_images(context.project_name, rows)
                made += [tile.image_id for tile in rows]
        if progress is not None:
            progress(done, len(plans))
    for line in settle(context) if made else ():
        logger.warning("tiles of %s: %s", context.project_name, line)
    fresh = [row for row in context.index.images(context.project_name) if row.image_id in set(made)]
    if made:
        parents = len({cut_from(name) for name in made})
        logger.info("%d crowded images of %s are cut into %d tiles", parents, context.project_name, len(made))
    return tuple(fresh)


def settle(context: LoopContext, tell: Tell | None = None) -> list[str]:
    """Finishes what the rows of tiles say: pictures and tasks where they are missing, no task for what was cut.

    The task of an image that was cut goes only while nobody has annotated, skipped or begun it. One process at a time:
    where a round and `celloop init` meet, the second finds done what the first did.

    Args:
        context: the project.
        tell: called as tell("tasks", done, total).

    Returns:
        A line for each tile that cannot be shown.

    Raises:
        UnreachableError: Label Studio does not answer.
    """
    with tiles_lock(context.workspace, context.project_name):
        return _settle(context, tell)


def _settle(context: LoopContext, tell: Tell | None) -> list[str]:
    name = context.project_name
    rows = context.index.images(name)
    lacking = [row for row in rows if row.parent and row.state == "open" and row.task_id is None]
    shown, problems = _show(context, lacking)
    if shown:
        context.index.add_images(name, add_tasks(context, shown, tell))
    sources = {cut_from(row.image_id) for row in rows if row.parent}
    cut_up = [row for row in rows if row.image_id in sources and row.state in ("open", "tiled")]
    context.index.set_images(name, {row.image_id: {"state": "tiled"} for row in cut_up})
    offered = {row.task_id: row.image_id for row in cut_up if row.task_id is not None}
    if offered:
        gone = context.label_studio.remove_untouched(context.project.ls_project_id, list(offered))
        context.index.set_images(name, {offered[task]: {"task_id": None} for task in gone})
    return problems


def _register(context: LoopContext, image: ImageRef, taken: set[str]) -> None:
    """A new image and its tiles into the index, as one.

    Raises:
        InputError: the image cannot be cut, or another image has the name of a tile.
    """
    parent = replace(image_row(context.project.id, image), state="tiled")
    tiles = cut((image.height, image.width), context.config.tiles.side, context.config.tiles.halo)
    same = sorted({tile_id(image.image_id, tile) for tile in tiles} & taken)
    if same:
        raise InputError(f"a tile of it would be called {same[0]}, as another image is; rename that one")
    context.index.add_images(context.project_name, [parent, *_cut(context, parent, tiles)])


def _renew(context: LoopContext, image: ImageRef, parent: ImageRow, tiles: Sequence[ImageRow]) -> None:
    """Brings an image that was cut, and its tiles, up to date with its folder; tiles that were gone lack their task.

    Raises:
        InputError: a tile's file is gone and the image is not the one that it was cut from, or cannot be read.
    """
    lost = {
        row.image_id: Window(row.top, row.left, row.top + row.height, row.left + row.width)
        for row in tiles
        if row.state != "tiled" and not Path(row.path).is_file()
    }
    changed = image.sha256 != parent.sha256
    files = write_tiles(image.path, _directory(context), lost) if lost and not changed else {}
    path, split, modality = str(image.path.resolve()), image.split, image.modality
    renewed = [replace(parent, path=path, group=image.group, split=split, modality=modality, state="tiled")]
    for row in tiles:
        tile = replace(row, group=image.group or image.image_id, split=split, modality=modality)
        if row.image_id in files:
            file = files[row.image_id]
            tile = replace(tile, path=str(file.path.resolve()), sha256=file.sha256)
        if row.state == "gone" and (row.image_id in files or row.image_id not in lost):
            tile = replace(tile, state="open", task_id=None)
        renewed.append(tile)
    back = {old.image_id for old, new in zip(tiles, renewed[1:], strict=True) if old.state != new.state}
    context.index.set_images(context.project_name, {image_id: {"task_id": None} for image_id in sorted(back)})
    context.index.add_images(context.project_name, renewed)
    if changed:
        raise InputError("it has changed since it was cut into tiles, which stay as they are; give it another name")


def _cut(context: LoopContext, row: ImageRow, tiles: Sequence[Tile]) -> list[ImageRow]:
    """Writes the files of an image's tiles; returns their rows, without tasks."""
    windows = {tile_id(row.image_id, tile): tile.window for tile in tiles}
    files = write_tiles(Path(row.path), _directory(context), windows)
    return [
        ImageRow(
            project_id=row.project_id,
            image_id=name,
            sha256=files[name].sha256,
            path=str(files[name].path.resolve()),
            display="",
            group=group_of(row),
            split=row.split,
            modality=row.modality,
            height=window.y1 - window.y0,
            width=window.x1 - window.x0,
            pseudo_taught=row.pseudo_taught,
            parent=row.parent or row.image_id,
            top=row.top + window.y0,
            left=row.left + window.x0,
        )
        for name, window in windows.items()
    ]


def _crowded(
    context: LoopContext, predictions: Mapping[str, StoredPrediction]
) -> list[tuple[ImageRow, tuple[Tile, ...]]]:
    """The images that are to be cut, each with its tiles."""
    settings = context.config.tiles
    if not settings.max_cells:
        return []
    seen = {row.image_id for row in context.index.annotations(context.project_name)}
    rows = {row.image_id: row for row in context.index.images(context.project_name)}
    plans = []
    for row in context.index.images(context.project_name, state="open", role="open"):
        found = predictions.get(row.image_id)
        if found is None or row.chosen_in is not None or row.image_id in seen:
            continue
        if row.parent and _own_side(row, rows[row.parent], settings.halo) <= min(SMALLEST, settings.side):
            continue
        tiles = crowded_tiles(found.instances, settings)
        same = sorted({tile_id(row.image_id, tile) for tile in tiles} & rows.keys())
        if same:
            logger.warning("%s is not cut into tiles: one would be called %s, as another is", row.image_id, same[0])
        elif tiles:
            plans.append((row, tiles))
    return plans


def _own_side(tile: ImageRow, whole: ImageRow, halo: int) -> int:
    """The longer side of a tile's own part, px; less by a halo where a tile of a tile shows none."""
    height = tile.height - halo * ((tile.top > 0) + (tile.top + tile.height < whole.height))
    width = tile.width - halo * ((tile.left > 0) + (tile.left + tile.width < whole.width))
    return max(height, width)


def crowded_tiles(cells: Instances, settings: TilesConfig) -> tuple[Tile, ...]:
    """The largest tiles that show at most `max_cells` of the cells each; () where the image can stay whole."""
    if len(cells) <= settings.max_cells:
        return ()
    smallest, side = min(SMALLEST, settings.side), settings.side
    while True:
        tiles = cut(cells.shape, side, settings.halo)
        if side == smallest or all(_n_shown(cells, tile.window) <= settings.max_cells for tile in tiles):
            return tiles if len(tiles) > 1 else ()
        side = max(smallest, side * 3 // 4)


def _n_shown(cells: Instances, window: Window) -> int:
    x0, y0, x1, y1 = cells.boxes_xyxy.T
    return int(((y0 < window.y1) & (y1 > window.y0) & (x0 < window.x1) & (x1 > window.x0)).sum())


def _show(context: LoopContext, rows: Sequence[ImageRow]) -> tuple[list[ImageRow], list[str]]:
    """Writes the pictures of tiles in the light of the whole image; returns those that worked, and why others did not.

    Raises:
        OSError: the disk is full.
    """
    light = {parent: _light(context, parent) for parent in sorted({row.parent for row in rows})}

    def write(row: ImageRow) -> str:
        target = display_path(context, row.image_id)
        try:
            write_display(Path(row.path), target, sha256=row.sha256, between=light[row.parent])
        except ImageError as error:
            stop_on_full_disk(error, target.parent)
            return f"{row.image_id}: {error}"
        return ""

    with ThreadPoolExecutor(max_workers=_WRITERS) as pool:
        faults = list(pool.map(write, rows))
    shown = [row for row, fault in zip(rows, faults, strict=True) if not fault]
    return shown, [fault for fault in faults if fault]


def _light(context: LoopContext, parent: str) -> tuple[float, float] | None:
    """The raw intensities of a whole image that are shown as 0 and 255, kept beside its tiles.

    None where they are not kept and the image is gone: each of its tiles is shown by its own intensities then.
    """
    kept = _directory(context) / f"{parent}.json"
    if kept.is_file():
        document = json.loads(kept.read_text(encoding="utf-8"))
        return float(document["low"]), float(document["shown"])
    row = context.index.image(context.project_name, parent)
    path = Path(row.path)
    try:
        with naming(path), open_windows(path) as image:
            found = intensities(image)
    except ImageError as error:
        logger.warning("tiles of %s are shown each in its own light: %s", parent, error)
        return None
    write_text(kept, json.dumps({"image": path.name, "sha256": row.sha256, **found._asdict()}))
    return found.low, found.shown


def _directory(context: LoopContext) -> Path:
    return context.workspace.tiles_dir / context.project_name
