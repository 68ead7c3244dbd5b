"""Predictions of labelled images by models that learnt neither from them nor from their groups."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.predictions import CELLS, array_file, arrays_of, cells_of, read_arrays, write_arrays
from loop.data.store import read_image
from loop.errors import InputError
from loop.models.segmenter import Segmenter
from loop.training.trainer import Log, Trained, train
from loop.types import FloatArray, ImageRef, Instances, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Unseen:
    """What a model says of an image that it never learnt from.

    `instances`: its cells; `interior` (H, W) float32 in [0, 1], in steps of 1/255: how likely each pixel is inside one.
    """

    instances: Instances
    interior: FloatArray


class UnseenStore:
    """What models say of images that they never learnt from, below `root`, one .npz an image, by id and content hash.

    Writing is atomic; a file that cannot be read counts as none.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def load(self, image: ImageRef) -> Unseen | None:
        """What was stored for `image`, or None."""
        arrays = read_arrays(array_file(self._root, image), {*CELLS, "interior"})
        if arrays is None:
            return None
        cells = cells_of(arrays, image, source="model", model_version="")
        return Unseen(cells, arrays["interior"].astype(np.float32) / np.float32(255))

    def save(self, image: ImageRef, unseen: Unseen) -> None:
        """Keeps `unseen` for `image`, in place of an earlier one."""
        levels = np.round(unseen.interior * 255).astype(np.uint8)
        write_arrays(array_file(self._root, image), {**arrays_of(unseen.instances), "interior": levels})


class Train(Protocol):
    """What `loop.training.trainer.train` is to a fold."""

    def __call__(
        self,
        samples: Sequence[Sample],
        model: ModelConfig,
        config: TrainConfig,
        /,
        *,
        log: Log,
        instances: InstanceConfig | None = None,
    ) -> Trained:
        """A network trained on the samples."""


FoldDone = Callable[[int, Mapping[str, Unseen]], None]
Told = Callable[[int, int, int, dict[str, float]], None]


def folds_of(samples: Sequence[Sample], folds: int) -> list[int]:
    """The fold of each sample: whole groups, modalities spread evenly, always the same for the same samples.

    Groups are dealt out from the largest to the smallest, each into the fold that has the fewest images of its
    modality, of equals the one with the fewest images in all, then the lowest number. An image without a group is a
    group of its own; a group's modality is its most frequent one.

    Args:
        samples: N, in any order; their order does not matter.
        folds: 2 or more; where there are fewer groups there are as many folds as groups.

    Returns:
        N numbers from 0; each fold has at least one sample.

    Raises:
        InputError: `folds` < 2, fewer than two groups, or an image twice.
    """
    if folds < 2:
        raise InputError(f"folds={folds}; give 2 or more, so that a model can be asked what it has not learnt")
    members: dict[str, list[ImageRef]] = {}
    for image in sorted((sample.image for sample in samples), key=lambda image: image.image_id):
        members.setdefault(group_of(image), []).append(image)
    names = [image.image_id for images in members.values() for image in images]
    if len(set(names)) < len(names):
        raise InputError(f"{len(names)} images have {len(set(names))} different names; give each image once")
    if len(members) < 2:
        raise InputError(
            f"the {len(samples)} labelled images are of {len(members)} group; labels are checked by models that learnt "
            "from other groups, so label images of a second slide, well or patient"
        )
    folds = min(folds, len(members))
    of_kind: list[dict[str, int]] = [{} for _ in range(folds)]
    sizes = [0] * folds
    place: dict[str, int] = {}
    for name, images in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        kinds = sorted(image.modality for image in images)
        kind = max(dict.fromkeys(kinds), key=kinds.count)
        fold = min(range(folds), key=lambda k: (of_kind[k].get(kind, 0), sizes[k], k))
        of_kind[fold][kind] = of_kind[fold].get(kind, 0) + len(images)
        sizes[fold] += len(images)
        place[name] = fold
    return [place[group_of(sample.image)] for sample in samples]


def crossfit(
    samples: Sequence[Sample],
    model: ModelConfig,
    config: TrainConfig,
    instances: InstanceConfig,
    *,
    folds: int = 3,
    log: Told,
    train: Train = train,
    done: Mapping[str, Unseen] | None = None,
    fold_done: FoldDone | None = None,
) -> list[Unseen]:
    """What models say of each sample that learnt neither from it nor from an image of its group.

    As many models as folds are trained, each on all other folds, with the same settings and seed. With `max_steps` the
    same samples and machine give the same predictions.

    Args:
        samples: N labelled images; `folds_of` says which are left out together.
        model: which network.
        config: of one training, so the whole costs `folds` times its budget, and predicting each image once.
        instances: thresholds of cells.
        folds: as for `folds_of`.
        log: called as log(fold, folds, step, values) by the trainings, see `train`; `fold` counts from 0.
        train: trains a fold's network.
        done: predictions that are there already, by image id: a fold of which none is missing is not trained again.
        fold_done: called with the fold's number and its predictions by image id as soon as they are there.

    Returns:
        N predictions in the order of `samples`.

    Raises:
        InputError: see `folds_of`.
        ImageError, LabelError, ShapeError, ConfigError, NonFiniteError: as `train`.

    Source: out-of-sample probabilities by cross-validation, as confident learning takes them (Northcutt et al., JAIR
        70, 2021, section 3). Differs: whole groups are left out together.
    """
    found: dict[str, Unseen] = dict(done or {})
    place = folds_of(samples, folds)
    n_folds = max(place) + 1
    for fold in range(n_folds):
        left_out = [sample for sample, own in zip(samples, place, strict=True) if own == fold]
        if all(sample.image.image_id in found for sample in left_out):
            logger.info("fold %d of %d: predictions are there already", fold + 1, n_folds)
            continue
        taught = [sample for sample, own in zip(samples, place, strict=True) if own != fold]

        def told(step: int, values: dict[str, float], fold: int = fold) -> None:
            log(fold, n_folds, step, values)

        trained = train(taught, model, config, log=told, instances=instances)
        segmenter = Segmenter(trained.net, model, trained.instances, device=config.device, precision=config.precision)
        new = {sample.image.image_id: look(segmenter, sample.image) for sample in left_out}
        found |= new
        logger.info("fold %d of %d: %d images learnt from, %d asked", fold + 1, n_folds, len(taught), len(new))
        if fold_done is not None:
            fold_done(fold, new)
    return [found[sample.image.image_id] for sample in samples]


def look(segmenter: Segmenter, image: ImageRef) -> Unseen:
    """What a segmenter sees in an image, its cells whatever their score; the caller knows what it has learnt from.

    `min_score` is left aside: a cell of low score accuses a label less, but one that is left out accuses the label of
    lying where nothing is. A model of few steps loses two thirds of its cells to it.

    Raises:
        ImageError: the file cannot be read.
        NonFiniteError: the network gives NaN or infinity; the text names the image.
    """
    sighting = segmenter.look(read_image(image.path).pixels, image_id=image.image_id)
    whole = segmenter.instance_config.model_copy(update={"min_score": 0.0})
    interior = np.round(sighting.interior * 255).astype(np.float32) / np.float32(255)
    return Unseen(segmenter.cells(sighting, whole, image_id=image.image_id), interior)


def group_of(image: ImageRef) -> str:
    """The group of an image; one without a group is a group of its own."""
    return image.group or image.image_id
