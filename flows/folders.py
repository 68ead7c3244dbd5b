"""Train, predict and evaluate on plain folders, without any service."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loop.config import LoopConfig
from loop.data import store
from loop.data.folder import LABEL_SUFFIXES, leaking_groups, open_folder, read_labels
from loop.data.store import read_image, read_label_image
from loop.errors import ImageError, InputError, LabelError, OverlapError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_label_image, to_coco_rle, to_label_image
from loop.metrics.instance import evaluate
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import load_checkpoint, save_checkpoint
from loop.training.trainer import train
from loop.types import ImageRef, Instances, Sample

logger = logging.getLogger(__name__)

FORMATS = ("labels", "coco", "labelstudio")
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FolderReport:
    """What a command on folders did: how many images, where the result lies, what could not be read."""

    images: int
    out: str
    problems: tuple[str, ...]


def train_folder(
    data: Path, out: Path, config: LoopConfig, log: Callable[[int, dict[str, float]], None]
) -> FolderReport:
    """Trains on every labelled image of a dataset folder (its pool and train splits, where it has splits).

    An image whose group stands in another split too is left out, so that nothing leaks into a measurement.

    Raises:
        InputError: the folder has no labelled image to learn from.
    """
    folder = open_folder(data)
    leaking = leaking_groups(folder.images)
    usable = [
        ref
        for ref in folder.images
        if ref.label_path is not None and ref.split in ("", "pool", "train") and ref.group not in leaking
    ]
    if not usable:
        raise InputError(
            f"{data} has no labelled image to learn from: put 16-bit label images of the same stems into "
            f"{data / 'labels'}, split pool or train (or no split) in manifest.csv"
        )
    samples = [Sample(ref, read_labels(ref)) for ref in usable]
    trained = train(samples, config.model, config.train, log=log)
    save_checkpoint(out, trained.net, config.model, config.instances, minutes=trained.seconds / 60, steps=trained.steps)
    return FolderReport(len(samples), str(out), _problems(folder.problems))


def predict_folder(
    model: Path, images: Path, out: Path, formats: Sequence[str], *, device: str = "auto", tell: Tell | None = None
) -> FolderReport:
    """Masks of a checkpoint for every image of a folder, in the formats asked for.

    `labels`: OUT/labels/STEM.png (16-bit) and STEM.scores.json; overlapping cells: the higher score keeps the pixel.
    `coco`: OUT/coco.json with RLE masks. `labelstudio`: OUT/labelstudio.json, tasks with predictions to import.

    Raises:
        InputError: a format is unknown, or the folder has no image.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise InputError(f"unknown format {', '.join(unknown)}; choose from {', '.join(FORMATS)}")
    checkpoint = load_checkpoint(model, device=device)
    segmenter = Segmenter(
        checkpoint.net, checkpoint.model_config, checkpoint.instance_config, device=device, model_version=model.name
    )
    folder = open_folder(images, labels=False)
    out.mkdir(parents=True, exist_ok=True)
    found: list[tuple[ImageRef, Instances]] = []
    problems = list(_problems(folder.problems))
    for done, ref in enumerate(folder.images, start=1):
        try:
            cells = segmenter.predict(read_image(ref.path).pixels, image_id=ref.image_id).instances
        except ImageError as error:
            problems.append(f"{ref.path.name}: {error}")
            continue
        if "labels" in formats:
            write_label_image(out / "labels", ref.image_id, cells)
        found.append((ref, cells))
        if tell is not None:
            tell("predict", done, len(folder.images))
    if "coco" in formats:
        (out / "coco.json").write_text(json.dumps(coco_document(found)), encoding="utf-8")
    if "labelstudio" in formats:
        (out / "labelstudio.json").write_text(json.dumps(_tasks(found)), encoding="utf-8")
    return FolderReport(len(found), str(out), tuple(problems))


class _Target(NamedTuple):
    """A true label image and what the manifest says of its image."""

    path: Path
    split: str = ""
    modality: str = ""


def evaluate_folders(predicted: Path, truth: Path) -> dict[str, Any]:
    """Metrics of label images (and scores, where there are any) in `predicted` against those in `truth`.

    `truth` is a dataset folder (images/, labels/, optional manifest.csv) or a folder of label images (PNG, TIFF, BMP).
    Measured is every image that has both a prediction and a true label image; a prediction without scores counts each
    cell with score 1. An image of the truth without prediction is not measured, it is named under `missing`: only
    those of the splits that the measured images are in, because a prediction for one split says nothing of another.

    Returns:
        What `loop.metrics.instance.evaluate` returns, and `missing`: {"n": int, "images": the first 10 names}.

    Raises:
        InputError: no stem of the one folder is in the other, or two label images have one stem.
        LabelError: the label images of one stem differ in size.
    """
    directory = predicted / "labels" if (predicted / "labels").is_dir() else predicted
    stems = _label_images(directory)
    targets = _targets(truth)
    common = sorted(set(stems) & set(targets))
    if not common:
        raise InputError(
            f"no image of {directory} ({len(stems)} label images) is in {truth} ({len(targets)}): stems must be equal"
        )
    pairs = []
    for stem in common:
        scores_file = directory / f"{stem}.scores.json"
        scores = json.loads(scores_file.read_text(encoding="utf-8")) if scores_file.exists() else {}
        found, true = _read_cells(stems[stem], stem, scores), _read_cells(targets[stem].path, stem, {})
        if found.shape != true.shape:
            raise LabelError(
                f"{stems[stem]} is {found.shape[0]} x {found.shape[1]} px, {targets[stem].path} {true.shape[0]} x "
                f"{true.shape[1]} (height x width); predict on the image that the truth was drawn on"
            )
        pairs.append((found, true))
    splits = {targets[stem].split for stem in common}
    missing = sorted(stem for stem, target in targets.items() if stem not in stems and target.split in splits)
    modalities = [targets[stem].modality for stem in common]
    figures = evaluate(pairs, modalities=modalities if all(modalities) else None)
    return {**figures, "missing": {"n": len(missing), "images": missing[:10]}}


def write_label_image(directory: Path, stem: str, cells: Instances) -> None:
    """Writes `STEM.png`, a 16-bit label image, and `STEM.scores.json`, label -> score in [0, 1].

    Raises:
        OverlapError: more than 65,535 cells, which 16 bits cannot number.
    """
    if len(cells) > np.iinfo(np.uint16).max:
        raise OverlapError(f"{stem} has {len(cells)} cells; a 16-bit label image holds 65,535: use --format coco")
    directory.mkdir(parents=True, exist_ok=True)
    store.write_label_image(to_label_image(cells, on_overlap="score"), directory / f"{stem}.png")
    scores = {str(i): round(float(score), 4) for i, score in enumerate(cells.scores, start=1)}
    (directory / f"{stem}.scores.json").write_text(json.dumps(scores), encoding="utf-8")


def coco_document(found: Sequence[tuple[ImageRef, Instances]], names: Sequence[str] = ("Cell",)) -> dict[str, Any]:
    """A COCO instances document with RLE masks (overlaps kept); category ids start at 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_number, (ref, cells) in enumerate(found, start=1):
        images.append({"id": image_number, "file_name": ref.path.name, "height": ref.height, "width": ref.width})
        for rle, box, mask, score, label in zip(
            to_coco_rle(cells), cells.boxes_xyxy, cells.masks, cells.scores, cells.labels, strict=True
        ):
            x0, y0, x1, y1 = (int(v) for v in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_number,
                    "category_id": int(label) + 1,
                    "segmentation": rle,
                    "area": int(mask.sum()),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                    "score": round(float(score), 4),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _tasks(found: Sequence[tuple[ImageRef, Instances]]) -> list[dict[str, Any]]:
    interface = Interface.parse(label_config())
    return [
        {
            "data": {interface.image_value_key: ref.path.name},
            "predictions": [{"result": to_results(cells, interface), "model_version": cells.model_version}],
        }
        for ref, cells in found
    ]


def _targets(truth: Path) -> dict[str, _Target]:
    if (truth / "images").is_dir():
        images = open_folder(truth).images
        return {r.image_id: _Target(r.label_path, r.split, r.modality) for r in images if r.label_path is not None}
    labels = truth / "labels" if (truth / "labels").is_dir() else truth
    return {stem: _Target(path) for stem, path in _label_images(labels).items()}


def _label_images(directory: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in LABEL_SUFFIXES and not path.name.startswith("."):
            other = found.setdefault(path.stem, path)
            if other != path:
                raise InputError(f"two label images have the same name but for the ending: {other} and {path}")
    return found


def _read_cells(path: Path, stem: str, scores: dict[str, float]) -> Instances:
    labels = read_label_image(path)
    values = [int(v) for v in np.unique(labels) if v > 0]
    return from_label_image(labels, image_id=stem, scores=[float(scores.get(str(v), 1.0)) for v in values])


def _problems(problems: Sequence[Any]) -> tuple[str, ...]:
    return tuple(f"{problem.path.name}: {problem.reason}" for problem in problems)
