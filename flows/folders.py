"""Train, predict and evaluate on plain folders, without any service."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from loop.config import LoopConfig
from loop.data.folder import leaking_groups, open_folder, read_labels
from loop.data.store import read_image
from loop.errors import ImageError, InputError, OverlapError
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


def evaluate_folders(predicted: Path, truth: Path) -> dict[str, Any]:
    """Metrics of label images (and scores, where there are any) in `predicted` against those in `truth`.

    `truth` is a dataset folder or a folder of label images; only images of the prediction are measured, in the
    truth's split where it has one. A prediction without scores counts each cell with score 1.

    Raises:
        InputError: no stem of the one folder is in the other.
        LabelError: two label images of one stem differ in size.
    """
    directory = predicted / "labels" if (predicted / "labels").is_dir() else predicted
    stems = {path.stem: path for path in sorted(directory.glob("*.png"))}
    folder = open_folder(truth) if (truth / "images").is_dir() else None
    if folder is None:
        labels = truth / "labels" if (truth / "labels").is_dir() else truth
        targets = {path.stem: (path, "") for path in sorted(labels.glob("*.png"))}
    else:
        targets = {r.image_id: (r.label_path, r.modality) for r in folder.images if r.label_path is not None}
    common = sorted(set(stems) & set(targets))
    if not common:
        raise InputError(
            f"no image of {directory} ({len(stems)} label images) is in {truth} ({len(targets)}): stems must be equal"
        )
    pairs = []
    for stem in common:
        scores_file = directory / f"{stem}.scores.json"
        scores = json.loads(scores_file.read_text(encoding="utf-8")) if scores_file.exists() else {}
        pairs.append((_read_label_image(stems[stem], stem, scores), _read_label_image(targets[stem][0], stem, {})))
    modalities = [targets[stem][1] for stem in common]
    return evaluate(pairs, modalities=modalities if all(modalities) else None)


def write_label_image(directory: Path, stem: str, cells: Instances) -> None:
    """Writes `STEM.png`, a 16-bit label image, and `STEM.scores.json`, label -> score in [0, 1].

    Raises:
        OverlapError: more than 65,535 cells, which 16 bits cannot number.
    """
    if len(cells) > np.iinfo(np.uint16).max:
        raise OverlapError(f"{stem} has {len(cells)} cells; a 16-bit label image holds 65,535: use --format coco")
    directory.mkdir(parents=True, exist_ok=True)
    labels = to_label_image(cells, on_overlap="score").astype(np.uint16)
    Image.fromarray(labels).save(directory / f"{stem}.png")
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


def _read_label_image(path: Path, stem: str, scores: dict[str, float]) -> Instances:
    with Image.open(path) as picture:
        labels = np.asarray(picture).astype(np.int32)
    values = [int(v) for v in np.unique(labels) if v > 0]
    return from_label_image(labels, image_id=stem, scores=[float(scores.get(str(v), 1.0)) for v in values])


def _problems(problems: Sequence[Any]) -> tuple[str, ...]:
    return tuple(f"{problem.path.name}: {problem.reason}" for problem in problems)
