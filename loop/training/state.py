"""A training that was killed goes on from here: what it had learnt, on disk beside its settings. No pickles."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loop.errors import CheckpointError
from loop.training.learner import Learner
from loop.types import Instances, Sample

TENSORS = "state.safetensors"
DESCRIPTION = "state.json"
COUNTS = ("seconds", "validated", "best_ap", "worse")


@dataclass
class Progress:
    """How far a training is.

    `losses` one a step, `seconds` of the budget that are spent, `validated` how many validations are done, `best_ap`
    the AP of the best of them and `best` the averaged weights then, `worse` how many came after it.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    validated: int = 0
    best_ap: float = -1.0
    worse: int = 0
    best: list[Tensor] = field(default_factory=list)


def recipe_of(settings: Sequence[BaseModel], world: int, *images: Sequence[Sample]) -> str:
    """A hash of everything that decides how a training goes: settings, number of processes, images and their cells."""
    described = [[_of_image(sample) for sample in samples] for samples in images]
    parts = [[part.model_dump(mode="json") for part in settings], world, described]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class TrainingState:
    """The state of one training in a directory; the state of any other training there is refused."""

    def __init__(self, directory: Path, recipe: str) -> None:
        """Touches nothing yet; `recipe` is what `recipe_of` gives."""
        self._directory = directory
        self._recipe = recipe

    def save(self, learner: Learner, progress: Progress) -> None:
        """Replaces what is stored; a kill in between leaves the state before.

        Raises:
            CheckpointError: the disk refuses.
        """
        tensors = f"{learner.steps}-{TENSORS}"
        description = {
            "recipe": self._recipe,
            "steps": learner.steps,
            **{name: getattr(progress, name) for name in COUNTS},
            "losses": progress.losses,
            "tensors": tensors,
        }
        best = {f"best.{i}": tensor.cpu().contiguous() for i, tensor in enumerate(progress.best)}
        scratch = [self._directory / f"{name}.part" for name in (TENSORS, DESCRIPTION)]
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            save_file({**learner.tensors(), **best}, scratch[0])
            scratch[0].replace(self._directory / tensors)
            scratch[1].write_text(json.dumps(description), encoding="utf-8")
            scratch[1].replace(self._directory / DESCRIPTION)
            for old in self._directory.glob(f"*-{TENSORS}"):
                if old.name != tensors:
                    old.unlink()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write the training's state to {self._directory}: {error}; check the disk's space and rights"
            ) from error

    def load(self, learner: Learner) -> Progress:
        """Puts the learner where the stored training was; no progress where nothing is stored.

        Raises:
            CheckpointError: what is stored is damaged, or belongs to a training on other images or with other settings.
        """
        path = self._directory / DESCRIPTION
        if not path.exists():
            return Progress()
        again = f"delete {self._directory} to start anew"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["recipe"] == self._recipe:
                return self._restore(learner, found)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the training's state in {self._directory} is damaged ({type(error).__name__}: {error}); {again}"
            ) from error
        raise CheckpointError(
            f"the state in {self._directory} is of a training on other images or with other settings; go on with "
            f"those, or {again}"
        )

    def _restore(self, learner: Learner, found: dict[str, Any]) -> Progress:
        progress = Progress([float(loss) for loss in found["losses"]], **{count: found[count] for count in COUNTS})
        if len(progress.losses) != found["steps"]:
            raise ValueError(f"{len(progress.losses)} losses of {found['steps']} steps")
        tensors = load_file(self._directory / str(found["tensors"]))
        learner.restore(tensors, int(found["steps"]))
        progress.best = [tensors[f"best.{i}"] for i in range(len(tensors)) if f"best.{i}" in tensors]
        return progress


def _of_image(sample: Sample) -> list[str]:
    drawn = [_of_cells(cells) for cells in (sample.instances, sample.nuclei) if cells is not None]
    known = [] if sample.known is None else [sha256(sample.known.tobytes()).hexdigest()]
    return [sample.image.image_id, sample.image.sha256, sample.image.modality, sample.image.group, *drawn, *known]


def _of_cells(cells: Instances) -> str:
    digest = sha256(repr(cells.shape).encode())
    for array in (cells.boxes_xyxy, cells.weights, *cells.masks):
        digest.update(array.tobytes())
    return digest.hexdigest()
