"""What a model said about an image, kept on disk so that no image is predicted twice by the same model."""

import logging
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loop.errors import ImageError, NonFiniteError
from loop.types import FloatArray, ImageRef, Instances

logger = logging.getLogger(__name__)


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

    def _path(self, image: ImageRef) -> Path:
        return self._directory / f"{image.image_id}-{image.sha256[:16]}.npz"

    def load(self, image: ImageRef) -> StoredPrediction | None:
        """The stored prediction of `image`, or None where there is none (or the file is damaged)."""
        path = self._path(image)
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            logger.warning("prediction file %s is damaged (%s); it is made again", path.name, error)
            return None
        masks = []
        offset = 0
        for x0, y0, x1, y1 in arrays["boxes"]:
            size = int((x1 - x0) * (y1 - y0))
            length = (size + 7) // 8
            bits = np.unpackbits(arrays["bits"][offset : offset + length], count=size)
            masks.append(bits.reshape(int(y1 - y0), int(x1 - x0)).astype(bool))
            offset += length
        instances = Instances.build(
            (image.height, image.width),
            arrays["boxes"],
            masks,
            scores=arrays["scores"],
            labels=arrays["labels"],
            image_id=image.image_id,
            source="model",
            model_version=self._model_label,
        )
        return StoredPrediction(instances, float(arrays["uncertainty"]), arrays["embedding"])

    def save(self, image: ImageRef, prediction: StoredPrediction) -> None:
        """Keeps `prediction` for `image`.

        Raises:
            NonFiniteError: the uncertainty, a score or the embedding is NaN or infinite; names the image.
            ImageError: the prediction has another size than the image.
        """
        cells = prediction.instances
        if cells.shape != (image.height, image.width):
            raise ImageError(
                f"prediction of {image.image_id} is {cells.shape}; the image is {(image.height, image.width)}"
            )
        numbers = np.concatenate([[prediction.uncertainty], cells.scores, prediction.embedding])
        if not np.isfinite(numbers).all():
            raise NonFiniteError(
                f"model {self._model_label} gave NaN or infinity for image {image.image_id}; "
                "look at the image, and at the model's training curve"
            )
        packed = [np.packbits(mask) for mask in cells.masks]
        self._directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file,
                    boxes=cells.boxes_xyxy,
                    bits=np.concatenate(packed) if packed else np.zeros(0, np.uint8),
                    scores=cells.scores,
                    labels=cells.labels,
                    uncertainty=np.float64(prediction.uncertainty),
                    embedding=prediction.embedding.astype(np.float32),
                )
            Path(temporary).replace(self._path(image))
        finally:
            Path(temporary).unlink(missing_ok=True)
