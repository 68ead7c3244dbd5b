"""A registered model version, and its checkpoint in a folder on this machine."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.errors import CheckpointError

CHECKPOINT_FILES = ("model.safetensors", "model.json")
DECISION, REASON, METRICS = "celloop.decision", "celloop.reason", "celloop.metrics"
_HASH = "celloop.sha256."


@dataclass(frozen=True)
class ModelVersion:
    """One registered model: `label` is "<name>-v<version>", `source` where MLflow keeps its files."""

    name: str
    version: int
    run_id: str
    label: str
    tags: dict[str, str]
    source: str = ""

    @property
    def decision(self) -> str:
        """What was last decided of it: "promoted", "refused", "rolled back", or "" before the gate."""
        return self.tags.get(DECISION, "")

    @property
    def reason(self) -> str:
        """Why, in words; "" before the gate."""
        return self.tags.get(REASON, "")

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures behind the gate's decision; {} before it."""
        found: dict[str, Any] = json.loads(self.tags.get(METRICS, "{}"))
        return found


def model_version(found: Any) -> ModelVersion:
    """MLflow's own object as a row of ours."""
    number = int(found.version)
    return ModelVersion(
        name=found.name,
        version=number,
        run_id=found.run_id or "",
        label=f"{found.name}-v{number}",
        tags=dict(found.tags),
        source=found.source,
    )


def version_number(version: ModelVersion | int) -> int:
    """The number of a version given either way."""
    return version if isinstance(version, int) else version.version


def hash_tags(checkpoint_dir: Path) -> dict[str, str]:
    """The tags that hold the SHA-256 of each file of a checkpoint.

    Raises:
        CheckpointError: a file is missing.
    """
    for file in CHECKPOINT_FILES:
        if not (checkpoint_dir / file).is_file():
            raise CheckpointError(f"{checkpoint_dir} has no {file}; give a folder that `celloop train` wrote")
    return {_HASH + file: _sha256(checkpoint_dir / file) for file in CHECKPOINT_FILES}


def is_intact(folder: Path, version: ModelVersion) -> bool:
    """Whether the folder holds the version's files, with the hashes of its tags where it has them."""
    for file in CHECKPOINT_FILES:
        if not (folder / file).is_file():
            return False
        expected = version.tags.get(_HASH + file)
        if expected is not None and _sha256(folder / file) != expected:
            return False
    return True


def move_into_place(fresh: Path, target: Path, version: ModelVersion) -> None:
    """Give a complete folder its final name, unless another process was quicker.

    Raises:
        OSError: it cannot be moved.
    """
    if target.exists() and not is_intact(target, version):
        shutil.rmtree(target)
    try:
        fresh.rename(target)
    except OSError:
        if not is_intact(target, version):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
