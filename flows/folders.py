"""Train, predict and evaluate on plain folders, without any service."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flows.finders import labeller_finder, model_finder
from flows.telling import Tell
from loop.config import LoopConfig
from loop.data import store
from loop.data.folder import LABEL_SUFFIXES, TEACHING, leaking_groups, open_folder, read_sample
from loop.data.store import read_image, read_label_layers
from loop.errors import ImageError, InputError, LabelError, OverlapError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_layers, to_coco_rle, to_label_image, to_layers
from loop.metrics.errors import error_analysis
from loop.metrics.instance import evaluate
from loop.training.checkpoint import save_checkpoint
from loop.training.distributed import is_first_process
from loop.training.trainer import Trained, train
from loop.types import ImageRef, Instances, Sample

logger = logging.getLogger(__name__)

FORMATS = ("labels", "layers", "coco", "labelstudio")
STATE = "state"
STATE_MARK = "celloop-training"


@dataclass(frozen=True)
class FolderReport:
    """What a command on folders did: how many images, where the result lies, what could not be read."""

    images: int
    out: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TrainReport(FolderReport):
    """What `train_folder` did; `images` are those learnt from.

    `validation` are the figures on the validation images; None where there are none. `device` is torch's name of it.
    """

    model: str
    device: str
    steps: int
    minutes: float
    validation_images: int
    validation: dict[str, float] | None


def train_folder(
    data: Path, out: Path, config: LoopConfig, log: Callable[[int, dict[str, float]], None], *, resume: bool = False
) -> TrainReport:
    """Trains on every labelled image of a dataset folder (its pool and train splits, where it has splits).

    Labelled images of the split val are never learnt from: the trainer fits the thresholds on them and measures. Those
    of other splits (test) are neither learnt from nor measured on. An image whose group stands in another split too is
    left out, so that nothing leaks into a measurement. While the training runs its state lies in OUT/state, which is
    gone at the end. Under `torchrun` the first process alone writes.

    Args:
        data: the dataset folder, see `loop.data.folder`.
        out: where model.safetensors and model.json go.
        config: its model, instances and train parts count.
        log: called with the step and its values as the training goes on.
        resume: goes on with the state that a killed run left in OUT/state, where there is one; else starts afresh.

    Raises:
        InputError: the folder has no labelled image to learn from, or OUT/state holds something else.
        CheckpointError: what is to be resumed is another training; see `loop.training.trainer.train` for other errors.
    """
    folder = open_folder(data)
    samples, validation = _samples(data, folder.images)
    state, first = out / STATE, is_first_process()
    if first:
        _open_state(state, resume=resume)
    trained = train(
        samples,
        config.model,
        config.train,
        instances=config.instances,
        validation=validation,
        state_dir=state,
        log=log,
    )
    if first:
        _store(out, config, trained)
        if state.exists():
            shutil.rmtree(state)
    return TrainReport(
        images=len(samples),
        out=str(out),
        problems=_problems(folder.problems),
        model=config.model.name,
        device=str(next(trained.net.parameters()).device),
        steps=trained.steps,
        minutes=trained.seconds / 60,
        validation_images=len(validation),
        validation=trained.validation,
    )


def _samples(data: Path, images: Sequence[ImageRef]) -> tuple[list[Sample], list[Sample]]:
    """What to learn from and what to validate on."""
    leaking = leaking_groups(images)
    usable = [ref for ref in images if ref.label_path is not None and ref.group not in leaking]
    samples = [read_sample(ref) for ref in usable if ref.split in TEACHING]
    if not samples:
        raise InputError(
            f"{data} has no labelled image to learn from: put 16-bit label images of the same stems into "
            f"{data / 'labels'}, split pool or train (or no split) in manifest.csv"
        )
    return samples, [read_sample(ref) for ref in usable if ref.split == "val"]


def _open_state(state: Path, *, resume: bool) -> None:
    """Makes the folder, empty unless `resume`; it is marked, so that no folder of a person's own is ever emptied."""
    if state.exists():
        if not (state / STATE_MARK).is_file():
            raise InputError(f"{state} exists and holds no training; move it away, or choose another --out")
        if not resume:
            shutil.rmtree(state)
    state.mkdir(parents=True, exist_ok=True)
    (state / STATE_MARK).touch()


def _store(out: Path, config: LoopConfig, trained: Trained) -> None:
    extra = {} if trained.validation is None else {"validation": trained.validation}
    minutes = trained.seconds / 60
    save_checkpoint(
        out, trained.net, config.model, trained.instances, minutes=minutes, steps=trained.steps, extra=extra
    )


def predict_folder(
    model: Path | None,
    images: Path,
    out: Path,
    formats: Sequence[str],
    *,
    tta: int | None = None,
    device: str = "auto",
    labellers: Sequence[str] = (),
    config: LoopConfig | None = None,
    tell: Tell | None = None,
) -> FolderReport:
    """Masks of a checkpoint, or of labellers, for every image of a folder, in the formats asked for.

    `labels`: OUT/labels/STEM.png (16-bit) and STEM.scores.json; overlapping cells: the higher score keeps the pixel.
    `layers`: OUT/layers/STEM.tif (16-bit, as many pages as keep overlapping cells whole) and STEM.scores.json.
    `coco`: OUT/coco.json with RLE masks. `labelstudio`: OUT/labelstudio.json, tasks with predictions to import.

    Args:
        model: a checkpoint directory; None where no labeller needs one.
        images: the folder.
        out: made if missing.
        formats: some of the above.
        tta: how many of the eight flips and quarter turns of an image are looked at; None = as the model was stored.
            Not with labellers, which look as `pseudo.views` says.
        device: "auto", "cpu" or "cuda".
        labellers: who proposes the masks in place of the model alone, see `flows.finders.labeller_finder`.
        config: settings of the labellers.
        tell: called as tell("predict", done, total).

    Raises:
        InputError: a format or a number of turns is unknown, the folder has no image, or a model is missing.
    """
    if tta not in (None, 1, 2, 4, 8):
        raise InputError(f"--tta {tta}; choose 1, 2, 4 or 8 flips and turns")
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise InputError(f"unknown format {', '.join(unknown)}; choose from {', '.join(FORMATS)}")
    if labellers and tta is not None:
        raise InputError(f"--tta {tta} is for a model alone; how often labellers look is pseudo.views in the settings")
    if labellers:
        find = labeller_finder(labellers, config or LoopConfig(), model=model, device=device)
    elif model is not None:
        find = model_finder(model, device=device, tta=tta)
    else:
        raise InputError("nothing to predict with; give the folder of a model, or a labeller that needs none")
    folder = open_folder(images, labels=False)
    out.mkdir(parents=True, exist_ok=True)
    found: list[tuple[ImageRef, Instances]] = []
    problems = list(_problems(folder.problems))
    for done, ref in enumerate(folder.images, start=1):
        try:
            cells = find(read_image(ref.path).pixels, ref.image_id)
        except ImageError as error:
            problems.append(f"{ref.path.name}: {error}")
            continue
        if "labels" in formats:
            write_label_image(out / "labels", ref.image_id, cells)
        if "layers" in formats:
            write_label_layers(out / "layers", ref.image_id, cells)
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


def evaluate_folders(predicted: Path, truth: Path, *, errors: bool = False) -> dict[str, Any]:
    """Metrics of label images (and scores, where there are any) in `predicted` against those in `truth`.

    `truth` is a dataset folder (images/, labels/, optional manifest.csv) or a folder of label images (PNG, TIFF, BMP);
    a TIFF of several pages holds overlapping cells. What `predict` wrote is found by its folder layers/, else labels/.
    Measured is every image that has both a prediction and a true label image; a prediction without scores counts each
    cell with score 1. An image of the truth without prediction is not measured, it is named under `missing`: only
    those of the splits that the measured images are in, because a prediction for one split says nothing of another.

    Args:
        predicted: what `predict` wrote, or a folder of label images.
        truth: see above.
        errors: adds what kinds of errors there are; takes several times as long.

    Returns:
        What `loop.metrics.instance.evaluate` returns, `missing`: {"n": int, "images": the first 10 names}, `read`:
        {"pred": folder, "gt": folder} that were compared, and with `errors` what `loop.metrics.errors.error_analysis`
        returns, under `errors`.

    Raises:
        InputError: no stem of the one folder is in the other, or two label images have one stem.
        LabelError: the label images of one stem differ in size, or a file of scores is no JSON object.
    """
    directory = _label_folder(predicted)
    stems = _label_images(directory)
    source, targets = _targets(truth)
    common = sorted(set(stems) & set(targets))
    if not common:
        raise InputError(
            f"no image of {directory} ({len(stems)} label images) is in {source} ({len(targets)}): stems must be equal"
        )
    pairs = []
    for stem in common:
        found = _read_cells(stems[stem], stem, _read_scores(directory / f"{stem}.scores.json"))
        true = _read_cells(targets[stem].path, stem, {})
        _check_sizes(stems[stem], found, targets[stem].path, true)
        pairs.append((found, true))
    splits = {targets[stem].split for stem in common}
    missing = sorted(stem for stem, target in targets.items() if stem not in stems and target.split in splits)
    modalities = [targets[stem].modality for stem in common]
    figures = evaluate(pairs, modalities=modalities if all(modalities) else None)
    document = {
        **figures,
        "missing": {"n": len(missing), "images": missing[:10]},
        "read": {"pred": str(directory), "gt": str(source)},
    }
    return {**document, "errors": error_analysis(pairs)} if errors else document


def _check_sizes(predicted: Path, found: Instances, truth: Path, true: Instances) -> None:
    if found.shape != true.shape:
        raise LabelError(
            f"{predicted} is {found.shape[0]} x {found.shape[1]} px, {truth} {true.shape[0]} x {true.shape[1]} (height "
            "x width); predict on the image that the truth was drawn on"
        )


def write_label_image(directory: Path, stem: str, cells: Instances) -> None:
    """Writes `STEM.png`, a 16-bit label image, and `STEM.scores.json`, label -> score in [0, 1].

    Raises:
        OverlapError: more than 65,535 cells, which 16 bits cannot number.
    """
    _check_number(stem, cells)
    store.write_label_image(to_label_image(cells, on_overlap="score"), directory / f"{stem}.png")
    _write_scores(directory / f"{stem}.scores.json", cells)


def write_label_layers(directory: Path, stem: str, cells: Instances) -> None:
    """Writes `STEM.tif`, 16-bit label layers that keep overlapping cells whole, and `STEM.scores.json`.

    Raises:
        OverlapError: more than 65,535 cells, which 16 bits cannot number.
    """
    _check_number(stem, cells)
    store.write_label_layers(to_layers(cells), directory / f"{stem}.tif")
    _write_scores(directory / f"{stem}.scores.json", cells)


def _check_number(stem: str, cells: Instances) -> None:
    if len(cells) > np.iinfo(np.uint16).max:
        raise OverlapError(f"{stem} has {len(cells)} cells; a 16-bit label image holds 65,535: use --format coco")


def _write_scores(path: Path, cells: Instances) -> None:
    scores = {str(i): round(float(score), 4) for i, score in enumerate(cells.scores, start=1)}
    path.write_text(json.dumps(scores), encoding="utf-8")


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


def _targets(truth: Path) -> tuple[Path, dict[str, _Target]]:
    """The true label images by stem, and the folder that they were looked for in."""
    if (truth / "images").is_dir():
        images = open_folder(truth).images
        return truth, {r.image_id: _Target(r.label_path, r.split, r.modality) for r in images if r.label_path}
    labels = _label_folder(truth)
    return labels, {stem: _Target(path) for stem, path in _label_images(labels).items()}


def _label_folder(folder: Path) -> Path:
    """Where label images lie in what `predict` wrote: layers/ before labels/; else the folder itself."""
    return next((folder / name for name in ("layers", "labels") if (folder / name).is_dir()), folder)


def _label_images(directory: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in LABEL_SUFFIXES and not path.name.startswith("."):
            other = found.setdefault(path.stem, path)
            if other != path:
                raise InputError(f"two label images have the same name but for the ending: {other} and {path}")
    return found


def _read_scores(path: Path) -> dict[str, float]:
    """The score of each label by its number as text; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        return {str(label): float(score) for label, score in scores.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise LabelError(f'{path} cannot be read ({error}); expected JSON such as {{"1": 0.93, "2": 0.5}}') from error


def _read_cells(path: Path, stem: str, scores: dict[str, float]) -> Instances:
    layers = read_label_layers(path)
    values = [int(value) for value in np.unique(layers) if value > 0]
    return from_layers(layers, image_id=stem, scores=[scores.get(str(value), 1.0) for value in values])


def _problems(problems: Sequence[Any]) -> tuple[str, ...]:
    return tuple(f"{problem.path.name}: {problem.reason}" for problem in problems)
