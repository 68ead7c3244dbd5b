"""A training that was killed goes on from here: what it had learnt, on disk beside its settings. No pickles."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loop.config import ModelConfig, TrainConfig
from loop.errors import CheckpointError
from loop.training.learner import Learner
from loop.types import Sample

TENSORS = "state.safetensors"
DESCRIPTION = "state.json"
COUNTS = ("seconds", "validated", "best_ap", "worse")


@dataclass
class Progress:
    """How far a training is.

    `losses` one a step, `seconds` of the budget that are spent, `validated` how many validations are done, `best_ap`
    the AP of the best of them and `best` the averaged weights then, `worse` how many came after it.
    """

    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    validated: int = 0
    best_ap: float = -1.0
    worse: int = 0
    best: list[Tensor] = field(default_factory=list)


class TrainingState:
    """The state of one training in a directory; the state of any other training there is refused."""

    def __init__(self, directory: Path, samples: Sequence[Sample], model: ModelConfig, config: TrainConfig) -> None:
        images = [[sample.image.image_id, sample.image.sha256, len(sample.instances)] for sample in samples]
        recipe = [model.model_dump(mode="json"), config.model_dump(mode="json"), images]
        self._recipe = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self._directory = directory

    def save(self, learner: Learner, progress: Progress) -> None:
        """Replaces what is stored; a kill in between leaves the state before.

        Raises:
            CheckpointError: the disk refuses.
        """
        name = f"{learner.steps}-{TENSORS}"
        description = {
            "recipe": self._recipe,
            "steps": learner.steps,
            **{name: getattr(progress, name) for name in COUNTS},
            "losses": list(progress.losses),
            "tensors": name,
        }
        scratch = self._directory / f"{DESCRIPTION}.part"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            best = {f"best.{i}": tensor.cpu().contiguous() for i, tensor in enumerate(progress.best)}
            save_file({**learner.tensors(), **best}, self._directory / name)
            scratch.write_text(json.dumps(description), encoding="utf-8")
            scratch.replace(self._directory / DESCRIPTION)
            for old in self._directory.glob(f"*-{TENSORS}"):
                if old.name != name:
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
            recipe, steps, name = found["recipe"], int(found["steps"]), str(found["tensors"])
            progress = Progress(tuple(found["losses"]), **{count: found[count] for count in COUNTS})
            if recipe == self._recipe:
                tensors = load_file(self._directory / name)
                learner.restore(tensors, steps)
                progress.best = [tensors[f"best.{i}"] for i in range(len(tensors)) if f"best.{i}" in tensors]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"the training's state in {self._directory} is damaged ({error}); {again}") from error
        if recipe != self._recipe:
            raise CheckpointError(
                f"the state in {self._directory} is of a training on other images or with other settings; go on with "
                f"those, or {again}"
            )
        return progress
