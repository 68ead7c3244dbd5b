"""Step 5: what a registered model says about images, each image once a model."""

import logging
from collections.abc import Callable, Mapping, Sequence

from flows.context import LoopContext
from loop.adapters.mlflow_registry import ModelVersion
from loop.data.predictions import PredictionStore, StoredPrediction
from loop.data.store import read_image
from loop.errors import ImageError
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import load_checkpoint
from loop.types import ImageRef

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def load_segmenter(context: LoopContext, version: ModelVersion) -> Segmenter:
    """The segmenter of a registered model, its weights fetched once and kept in the workspace."""
    directory = context.registry.download(version, context.workspace.models_dir)
    checkpoint = load_checkpoint(directory, device=context.config.train.device)
    return Segmenter(
        checkpoint.net,
        checkpoint.model_config,
        checkpoint.instance_config,
        device=context.config.train.device,
        precision=context.config.train.precision,
        model_version=version.label,
    )


def predict_images(
    context: LoopContext, version: ModelVersion, images: Sequence[ImageRef], progress: Progress | None = None
) -> Mapping[str, StoredPrediction]:
    """Predictions of `version` by image id; what is on disk already is not made again.

    An image whose file cannot be read any more is named in the log and left out; the others go on.
    """
    store = PredictionStore(context.workspace.predictions_dir, version.label)
    found: dict[str, StoredPrediction] = {}
    segmenter: Segmenter | None = None
    for done, image in enumerate(images, start=1):
        stored = store.load(image)
        if stored is None:
            segmenter = segmenter or load_segmenter(context, version)
            try:
                pixels = read_image(image.path).pixels
            except ImageError as error:
                logger.warning("%s is not predicted: %s", image.image_id, error)
                continue
            prediction = segmenter.predict(pixels, image_id=image.image_id)
            stored = StoredPrediction(prediction.instances, prediction.uncertainty, prediction.embedding)
            store.save(image, stored)
        found[image.image_id] = stored
        if progress is not None:
            progress(done, len(images))
    return found
