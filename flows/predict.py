"""Step 5: what a registered model says about images, each image once a model."""

import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from flows.context import LoopContext, registry_name
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import SelectConfig
from loop.data.predictions import PredictionStore, StoredPrediction
from loop.data.store import read_image
from loop.errors import ImageError
from loop.models.passes import look_again
from loop.models.segmenter import Segmenter
from loop.training.checkpoint import load_checkpoint
from loop.types import ImageRef
from loop.uncertainty.measures import FROM_ONE_LOOK

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
    context: LoopContext,
    version: ModelVersion,
    images: Sequence[ImageRef],
    progress: Progress | None = None,
    *,
    again: bool = True,
) -> Mapping[str, StoredPrediction]:
    """Predictions of `version` by image id; what is on disk already, with all its measures, is not made again.

    With `select.passes` "turns" or "dropout" each image is then looked at `select.n_passes` times more, for its
    measures "bald" and "disagreement".

    An image whose file cannot be read any more, or has another size than it had, is named in the log and left out; the
    others go on.

    Args:
        context: the project.
        version: the model.
        images: in any order.
        progress: called as progress(done, total) after each image.
        again: False where cells alone are wanted: images are looked at once, whatever `select.passes` says.

    Raises:
        ConfigError: `select.passes` is "dropout" and the model has none.
    """
    store = PredictionStore(context.workspace.predictions_dir, version.label)
    settings = context.config.select if again else context.config.select.model_copy(update={"passes": "once"})
    found: dict[str, StoredPrediction] = {}
    segmenter: Segmenter | None = None
    for done, image in enumerate(images, start=1):
        stored = store.load(image)
        if stored is None or _lacks_look(stored) or _lacks_looks(stored, settings):
            segmenter = segmenter or load_segmenter(context, version)
            try:
                stored = _predict_one(stored, segmenter, image, settings)
                store.save(image, stored)
            except ImageError as error:
                stored = None
                logger.warning("%s is not predicted: %s", image.image_id, error)
        if stored is not None:
            found[image.image_id] = stored
        if progress is not None:
            progress(done, len(images))
    return found


def _lacks_look(stored: StoredPrediction) -> bool:
    return not stored.measures.keys() >= set(FROM_ONE_LOOK)


def _lacks_looks(stored: StoredPrediction, settings: SelectConfig) -> bool:
    return settings.passes != "once" and stored.looks != _looks(settings)


def _looks(settings: SelectConfig) -> str:
    return f"{settings.passes} x {settings.n_passes}"


def _predict_one(
    stored: StoredPrediction | None, segmenter: Segmenter, image: ImageRef, settings: SelectConfig
) -> StoredPrediction:
    """What the model says of an image; of what is stored, only what is missing is made.

    Raises:
        ImageError: the file cannot be read, or holds another image than the one that was registered.
    """
    pixels = read_image(image.path).pixels
    if pixels.shape[:2] != (image.height, image.width):
        raise ImageError(f"{image.path} is {pixels.shape[:2]}; it was {(image.height, image.width)}: put it back")
    if stored is None or _lacks_look(stored):
        seen = segmenter.predict(pixels, image_id=image.image_id)
        stored = StoredPrediction(seen.instances, seen.uncertainty, seen.embedding, seen.measures)
    if settings.passes != "once" and _lacks_looks(stored, settings):
        measures = look_again(segmenter, pixels, settings.passes, settings.n_passes, image.image_id)
        stored = replace(stored, measures={**stored.measures, **measures}, looks=_looks(settings))
    return stored


def forget_old(context: LoopContext, keep: Collection[str]) -> list[str]:
    """Deletes the stored predictions of this project's model versions, of all its kinds, that are not in `keep`.

    They can be made again from the registered models. A folder that cannot be deleted is named in the log.

    Args:
        context: the project; other projects' predictions are left alone.
        keep: labels of the versions that are still asked for, as in `ModelVersion.label`.

    Returns:
        The labels whose predictions were deleted, sorted.
    """
    ours = re.compile(rf"{re.escape(registry_name(context.project_name))}(\.\w+)?-v\d+")
    root = context.workspace.predictions_dir
    forgotten = []
    for directory in sorted(root.iterdir()) if root.is_dir() else []:
        if directory.name in keep or not ours.fullmatch(directory.name):
            continue
        try:
            shutil.rmtree(directory)
        except OSError as error:
            logger.warning("old predictions %s cannot be deleted: %s", directory, error)
            continue
        forgotten.append(directory.name)
    return forgotten
