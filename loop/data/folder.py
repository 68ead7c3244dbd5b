"""A folder of images, with or without labels and a manifest, as a person has it: what can be used and what cannot.

ROOT/images/STEM.png|jpg|tif|bmp     or the images in ROOT itself
ROOT/labels/STEM.png|tif             optional: label images, 0 = background; a TIFF of several pages holds overlapping
                                     cells: a value is one cell, on whichever page
ROOT/nuclei/STEM.png|tif             optional: the nuclei of the same images, in the same form
ROOT/manifest.csv                    optional: columns image, label, group, split, modality; others are kept
"""

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from loop.data.store import SUFFIXES, LayerArray, describe, label_shape, read_label_layers
from loop.errors import InputError, LabelError, LoopError
from loop.masks import from_layers
from loop.types import ImageRef, Instances, Sample

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
COLUMNS = ("image", "label", "group", "split", "modality")
TEACHING = ("", "pool", "train")
"""Splits whose images are learnt from."""
NUCLEI_KEY = "celloop:nuclei"
"""Where `open_folder` notes in ImageRef.extra which file holds an image's nuclei; absent where there is none."""

_TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".md", ".json", ".xml", ".yaml", ".yml", ".html", ".pdf")


class Problem(NamedTuple):
    """A file that was left out, or left without its label, and why; the text of `reason` names what to do."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Folder:
    """What `open_folder` found: the usable images by image_id, and every problem by path."""

    images: tuple[ImageRef, ...]
    problems: tuple[Problem, ...]


class _Row(NamedTuple):
    image: str
    label: str
    meta: dict[str, str]
    extra: dict[str, str]


def open_folder(path: Path, *, labels: bool = True, progress: Callable[[int, int], None] | None = None) -> Folder:
    """Every image of a folder, described; a file that cannot be used becomes a problem and stops nothing.

    An image whose label image is missing, broken or of another size is kept without label (label_path None, which is
    not the same as a label image without cells); likewise with nuclei, whose file stands in extra[NUCLEI_KEY]. Folders
    inside the image folder are not entered. A group that the
    manifest leaves empty is a group of its own. A group that the manifest puts into several splits is a problem, named
    once; `leaking_groups` tells which, so that nothing is learnt from them. Files are read by several threads.

    Args:
        path: the folder, see the module's text for its layout.
        labels: whether to look for label images and nuclei.
        progress: called with the number of files looked at and their total, from this thread.

    Raises:
        InputError: no such folder, a file, no usable image in it, two images, labels or nuclei of the same stem, a
            manifest that cannot be read or names an image twice.
    """
    root = Path(os.path.abspath(path))
    if not root.exists():
        raise InputError(f"{path} does not exist; give a folder with images")
    if not root.is_dir():
        raise InputError(f"{path} is a file; give the folder that holds the images")
    directory = root / "images" if (root / "images").is_dir() else root
    files, problems = _image_files(directory)
    rows = _read_manifest(root / "manifest.csv")
    by_file, more = _assign(rows, files, root, directory)
    problems += more
    found, broken = _describe_all(files, by_file, progress)
    problems += broken
    problems += [
        Problem(
            root / "manifest.csv",
            f"group {group} is in the splits {_list(sorted(splits))}; a slide, well or patient belongs to one split "
            "only, or the figures are too good: nothing is learnt from it",
        )
        for group, splits in sorted(leaking_groups(found).items())
    ]
    if not found:
        raise InputError(_nothing_usable(path, directory, problems))
    if labels:
        stems = {file.stem for file in files}
        found, more = _add_labels(found, by_file, root, stems)
        problems += more
        found, more = _add_nuclei(found, root / "nuclei", stems)
        problems += more
    return Folder(tuple(sorted(found, key=lambda ref: ref.image_id)), tuple(sorted(problems)))


def leaking_groups(images: Iterable[ImageRef]) -> dict[str, set[str]]:
    """The groups of `images` that stand in more than one split, with their splits; {} where none does.

    No split, "pool" and "train" are one: images to learn from.
    """
    splits: dict[str, set[str]] = {}
    for ref in images:
        if ref.group:
            splits.setdefault(ref.group, set()).add("pool" if ref.split in TEACHING else ref.split)
    return {group: found for group, found in splits.items() if len(found) > 1}


def read_labels(ref: ImageRef) -> Instances:
    """The cells of an image's label image, source "human"; a label image of zeros gives none.

    Cells of different pages of a TIFF may overlap.

    Raises:
        LabelError: the image has no label image, or one of another size or kind.
        ImageError: the label image cannot be read.
    """
    if ref.label_path is None:
        raise LabelError(f"{ref.path} has no label image; put labels/{ref.image_id}.png beside images/")
    return _read(ref, ref.label_path)


def read_nuclei(ref: ImageRef) -> Instances | None:
    """The nuclei of an image, source "human"; None where `open_folder` found no file of them, which is not "none here".

    Raises:
        LabelError: the file is of another size or kind.
        ImageError: the file cannot be read.
    """
    path = ref.extra.get(NUCLEI_KEY)
    return None if path is None else _read(ref, Path(path))


def read_sample(ref: ImageRef) -> Sample:
    """An image with its cells, and its nuclei where they are labelled; errors as `read_labels` and `read_nuclei`."""
    return Sample(ref, read_labels(ref), read_nuclei(ref))


def _read(ref: ImageRef, path: Path) -> Instances:
    layers: LayerArray = read_label_layers(path)
    if layers.shape[1:] != (ref.height, ref.width):
        raise LabelError(_sizes(ref, path, layers.shape[1:]))
    return from_layers(layers, image_id=ref.image_id)


def _sizes(ref: ImageRef, path: Path, shape: tuple[int, ...]) -> str:
    return (
        f"the label image {path} is {shape[0]} x {shape[1]} px, its image {ref.path.name} "
        f"{ref.height} x {ref.width} (height x width, upright); draw it on the image as it is"
    )


def _image_files(directory: Path) -> tuple[list[Path], list[Problem]]:
    files, problems = [], []
    for entry in sorted(directory.iterdir()):
        suffix = entry.suffix.lower()
        if entry.name.startswith(".") or entry.is_dir() or suffix in _TEXT_SUFFIXES:
            continue
        if suffix in SUFFIXES:
            files.append(entry)
        else:
            problems.append(Problem(entry, f"files of this kind are not read; convert it to one of {_list(SUFFIXES)}"))
    _by_stem(files, "images")
    return files, problems


def _by_stem(files: Iterable[Path], what: str) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    for file in files:
        other = stems.setdefault(file.stem, file)
        if other != file:
            raise InputError(f"two {what} have the same name but for the ending: {other} and {file}; rename one")
    return stems


def _read_manifest(path: Path) -> list[_Row]:
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns, lines = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); write it as CSV in UTF-8, separated by commas") from error
    if "image" not in columns:
        raise InputError(f"{path} has the columns {list(columns)}; expected {_list(COLUMNS)}, at least image")
    rows = []
    for number, line in enumerate(lines, start=2):
        if None in line or None in line.values():
            raise InputError(f"{path}, line {number}: {len(columns)} columns are named, this line has another number")
        cells = {name: value.strip() for name, value in line.items()}
        meta = {name: cells.get(name, "") for name in ("group", "split", "modality")}
        extra = {name: value for name, value in cells.items() if name not in COLUMNS}
        rows.append(_Row(cells["image"], cells.get("label", ""), meta, extra))
    return rows


def _assign(rows: list[_Row], files: list[Path], root: Path, directory: Path) -> tuple[dict[Path, _Row], list[Problem]]:
    """The manifest's row of each image file, and the rows and files that have no counterpart."""
    manifest = root / "manifest.csv"
    known, by_file, problems = set(files), dict[Path, _Row](), []
    for row in rows:
        places = [Path(os.path.normpath(base / row.image)) for base in (root, directory)]
        file = next((place for place in places if place in known), None)
        if file is None:
            problems.append(
                Problem(places[0], f"named in {manifest.name} but not in {directory}; restore or unlist it")
            )
        elif file in by_file:
            raise InputError(f"{manifest} names {row.image} twice; keep one line for each image")
        else:
            by_file[file] = row
    unlisted = [file.name for file in files if file not in by_file]
    if rows and unlisted:
        some = _list(unlisted[:5]) + (", ..." if len(unlisted) > 5 else "")
        reason = f"{len(unlisted)} images are not listed ({some}); they have no group, split and modality: add them"
        problems.append(Problem(manifest, reason))
    return by_file, problems


def _describe_all(
    files: list[Path], by_file: Mapping[Path, _Row], progress: Callable[[int, int], None] | None
) -> tuple[list[ImageRef], list[Problem]]:
    def one(file: Path) -> ImageRef | Problem:
        row = by_file.get(file)
        try:
            return describe(file, **row.meta, extra=row.extra) if row else describe(file)
        except LoopError as error:
            return Problem(file, str(error))

    images, problems = [], []
    with ThreadPoolExecutor() as pool:
        for done, found in enumerate(pool.map(one, files), start=1):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                images.append(found)
            if progress is not None:
                progress(done, len(files))
    return images, problems


def _add_labels(
    images: list[ImageRef], by_file: Mapping[Path, _Row], root: Path, stems: set[str]
) -> tuple[list[ImageRef], list[Problem]]:
    """The images with their label_path, where there is a sound label image of the same size."""
    by_stem, problems = _label_files(root / "labels", "label images"), []
    named: dict[str, Path] = {}
    for file, row in by_file.items():
        if not row.label:
            continue
        label = Path(os.path.normpath(root / row.label))
        if label.is_file() and label.is_relative_to(root):
            named[file.stem] = label
        else:
            problems.append(Problem(label, f"label of {file.name} in manifest.csv, but not in {root}; restore it"))
    used = {**by_stem, **named}
    taken = set(named.values())
    for stem in sorted(used.keys() - stems):
        if used[stem] not in taken:
            problems.append(Problem(used[stem], "a label with no image of that name; add the image or remove it"))
    paths = [used.get(ref.image_id) for ref in images]
    faults = _faults(images, paths)
    problems += [
        Problem(p, f"{f}; the image is kept without label") for p, f in zip(paths, faults, strict=True) if p and f
    ]
    return [replace(r, label_path=None if f else p) for r, p, f in zip(images, paths, faults, strict=True)], problems


def _add_nuclei(images: list[ImageRef], directory: Path, stems: set[str]) -> tuple[list[ImageRef], list[Problem]]:
    """The images with their file of nuclei in `extra`, where there is a sound one of the same size."""
    files = _label_files(directory, "nuclei")
    problems = [
        Problem(files[stem], "nuclei with no image of that name; add the image or remove them")
        for stem in sorted(files.keys() - stems)
    ]
    paths = [files.get(ref.image_id) for ref in images]
    results = []
    for ref, path, fault in zip(images, paths, _faults(images, paths), strict=True):
        if path and fault:
            problems.append(Problem(path, f"{fault}; the image is kept without nuclei"))
        elif path:
            ref = replace(ref, extra={**ref.extra, NUCLEI_KEY: str(path)})
        results.append(ref)
    return results, problems


def _label_files(directory: Path, what: str) -> dict[str, Path]:
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    return _by_stem([e for e in entries if e.suffix.lower() in LABEL_SUFFIXES and not e.name.startswith(".")], what)


def _faults(images: Sequence[ImageRef], paths: Sequence[Path | None]) -> list[str]:
    """Why each label file cannot be used with its image, "" where it can or where there is none."""

    def one(ref: ImageRef, path: Path | None) -> str:
        if path is None:
            return ""
        try:
            shape = label_shape(path)
        except LoopError as error:
            return str(error)
        return _sizes(ref, path, shape) if shape != (ref.height, ref.width) else ""

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, images, paths))


def _nothing_usable(path: Path, directory: Path, problems: list[Problem]) -> str:
    inner = [entry for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    hint = f" (folders inside it, such as {inner[0].name}, are not entered)" if inner else ""
    reasons = "".join(f"; {problem.reason}" for problem in problems[:3])
    return f"no usable image in {path}{hint}: expected {_list(SUFFIXES)} in it or in its folder images{reasons}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
