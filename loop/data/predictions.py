"""What a model said about images, on disk so that no image is predicted twice by the same model."""

import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loop.errors import ImageError, InputError, NonFiniteError
from loop.types import Candidate, FloatArray, ImageRef, Instances, Source
from loop.uncertainty.aggregate import covered

logger = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]

CELLS = frozenset(["boxes", "bits", "scores", "labels"])
"""The arrays of `arrays_of`."""


@dataclass(frozen=True, eq=False)
class StoredPrediction:
    """What one model version says of one image.

    Attributes:
        instances: the cells.
        uncertainty: >= 0, finite.
        embedding: (D,) float32.
        measures: uncertainties by name (loop/uncertainty/measures.py), finite; {} where none were stored.
        looks: how the several looks were taken that "bald" and "disagreement" come from, e.g. "turns x 4"; "" = none.
    """

    instances: Instances
    uncertainty: float
    embedding: FloatArray
    measures: dict[str, float] = field(default_factory=dict)
    looks: str = ""


class PredictionStore:
    """Predictions of one model version below `root`, one .npz an image, named by image id and content hash.

    Writing is atomic, so a killed run leaves whole files only; a file that cannot be read is made again.
    """

    def __init__(self, root: Path, model_label: str) -> None:
        self._directory = root / model_label
        self._model_label = model_label

    def load(self, image: ImageRef) -> StoredPrediction | None:
        """The stored prediction of `image`, or None where there is none (or the file is damaged)."""
        arrays = read_arrays(array_file(self._directory, image), {*CELLS, "uncertainty", "embedding"})
        if arrays is None:
            return None
        instances = cells_of(arrays, image, source="model", model_version=self._model_label)
        measures, looks = _measures(arrays)
        return StoredPrediction(instances, float(arrays["uncertainty"]), arrays["embedding"], measures, looks)

    def save(self, image: ImageRef, prediction: StoredPrediction) -> None:
        """Keeps `prediction` for `image`.

        Raises:
            NonFiniteError: an uncertainty, a score or the embedding is NaN or infinite; names the image.
            ImageError: the prediction has another size than the image.
        """
        cells = prediction.instances
        measures = np.array(list(prediction.measures.values()), np.float64)
        numbers = np.concatenate([[prediction.uncertainty], measures, cells.scores, prediction.embedding])
        check_cells(cells, numbers, image, f"model {self._model_label}")
        rest: Arrays = {
            "uncertainty": np.asarray(prediction.uncertainty, np.float64),
            "embedding": prediction.embedding.astype(np.float32),
            "measures": measures,
            "measure_names": np.array(list(prediction.measures), np.str_),
            "looks": np.array(prediction.looks),
        }
        write_arrays(array_file(self._directory, image), {**arrays_of(cells), **rest})


def _measures(arrays: Arrays) -> tuple[dict[str, float], str]:
    """Measures and looks; files of before they were kept have none."""
    if not {"measures", "measure_names", "looks"} <= arrays.keys():
        return {}, ""
    names, values = arrays["measure_names"].tolist(), arrays["measures"].tolist()
    return dict(zip(names, values, strict=True)), str(arrays["looks"])


def candidate_of(
    stored: StoredPrediction, image_id: str, group: str, *, seconds: float = 0.0, measure: str = "entropy_cells"
) -> Candidate:
    """An open image as the acquisition sees it.

    Args:
        stored: what the model says of it.
        image_id: the image's stem.
        group: its slide, well or patient; "" = a group of its own.
        seconds: how long a person is expected to correct it; 0 = not known.
        measure: the name of the uncertainty that counts (`select.measure`).

    Raises:
        InputError: the prediction lacks that measure; names the image.
    """
    if measure not in stored.measures:
        known = ", ".join(sorted(stored.measures)) or "none"
        raise InputError(
            f"image {image_id} has no measure {measure!r}, only {known}; choose one of these as select.measure, or for "
            "bald and disagreement set select.passes to turns or dropout"
        )
    return Candidate(
        image_id,
        group,
        stored.measures[measure],
        stored.embedding,
        n_cells=len(stored.instances),
        foreground=float(covered(stored.instances).mean()),
        seconds=seconds,
        measures=stored.measures,
    )


def array_file(directory: Path, image: ImageRef) -> Path:
    """Where an image's arrays lie in a store: a file named by image id and content hash."""
    return directory / f"{image.image_id}-{image.sha256[:16]}.npz"


def check_cells(cells: Instances, numbers: npt.NDArray[np.floating], image: ImageRef, who: str) -> None:
    """Refuses cells that cannot be those of the image.

    Raises:
        ImageError: they have another size than the image.
        NonFiniteError: one of `numbers`, (N,), is NaN or infinite; names the image and `who` gave them.
    """
    if cells.shape != (image.height, image.width):
        raise ImageError(f"prediction of {image.image_id} is {cells.shape}; the image is {(image.height, image.width)}")
    if not np.isfinite(numbers).all():
        raise NonFiniteError(
            f"{who} gave NaN or infinity for image {image.image_id}; "
            "look at the image, and at the model's training curve"
        )


def arrays_of(cells: Instances) -> Arrays:
    """Boxes, masks (their bits one after the other), scores and labels of cells; `cells_of` is the inverse."""
    packed = [np.packbits(mask) for mask in cells.masks]
    return {
        "boxes": cells.boxes_xyxy,
        "bits": np.concatenate(packed) if packed else np.zeros(0, np.uint8),
        "scores": cells.scores,
        "labels": cells.labels,
    }


def cells_of(
    arrays: Mapping[str, npt.NDArray[Any]], image: ImageRef, *, source: Source, model_version: str
) -> Instances:
    """The cells that `arrays_of` was given."""
    masks = []
    offset = 0
    for x0, y0, x1, y1 in arrays["boxes"]:
        size = int((x1 - x0) * (y1 - y0))
        length = (size + 7) // 8
        bits = np.unpackbits(arrays["bits"][offset : offset + length], count=size)
        masks.append(bits.reshape(int(y1 - y0), int(x1 - x0)).astype(bool))
        offset += length
    return Instances.build(
        (image.height, image.width),
        arrays["boxes"],
        masks,
        scores=arrays["scores"],
        labels=arrays["labels"],
        image_id=image.image_id,
        source=source,
        model_version=model_version,
    )


def read_arrays(path: Path, names: Collection[str]) -> Arrays | None:
    """The arrays of a file, or None where there is none.

    One that is damaged, or lacks an array of those names, is named in the log and counts as none.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        logger.warning("prediction file %s is damaged (%s); it is made again", path.name, error)
        return None
    missing = sorted(set(names) - arrays.keys())
    if missing:
        logger.warning("prediction file %s is damaged (it lacks %s); it is made again", path.name, ", ".join(missing))
        return None
    return arrays


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Makes a .npz file of the arrays appear whole, in place of the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
