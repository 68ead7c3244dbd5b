"""What a model said about images, on disk so that no image is predicted twice by the same model."""

import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loop.errors import ImageError, NonFiniteError
from loop.types import FloatArray, ImageRef, Instances, Source

logger = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]

CELLS = frozenset(["boxes", "bits", "scores", "labels"])
"""The arrays of `arrays_of`."""


@dataclass(frozen=True, eq=False)
class StoredPrediction:
    """Cells, uncertainty (>= 0, finite) and embedding (D,) float32 of one image by one model version."""

    instances: Instances
    uncertainty: float
    embedding: FloatArray


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
        return StoredPrediction(instances, float(arrays["uncertainty"]), arrays["embedding"])

    def save(self, image: ImageRef, prediction: StoredPrediction) -> None:
        """Keeps `prediction` for `image`.

        Raises:
            NonFiniteError: the uncertainty, a score or the embedding is NaN or infinite; names the image.
            ImageError: the prediction has another size than the image.
        """
        cells = prediction.instances
        numbers = np.concatenate([[prediction.uncertainty], cells.scores, prediction.embedding])
        check_cells(cells, numbers, image, f"model {self._model_label}")
        rest: Arrays = {
            "uncertainty": np.asarray(prediction.uncertainty, np.float64),
            "embedding": prediction.embedding.astype(np.float32),
        }
        write_arrays(array_file(self._directory, image), {**arrays_of(cells), **rest})


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
