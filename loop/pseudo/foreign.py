"""What the adapters of other people's packages share: how each refuses, and which weights it was given."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loop.config import PseudoConfig
from loop.data.weights import sha256_of
from loop.errors import CheckpointError, ConfigError, LoopError
from loop.pseudo.base import Proposal
from loop.types import Instances


def seen_once(instances: Instances) -> Proposal:
    """The proposal of a labeller that looks at an image once: every cell of stability 1."""
    return Proposal(instances, np.ones(len(instances), np.float32))


@contextmanager
def importing(name: str, package: str) -> Iterator[None]:
    """Inside it `package` is imported for the labeller `name`.

    Raises:
        ConfigError: the package is not there, or does not fit its neighbours (torchvision beside another torch raises
            RuntimeError, and AttributeError when it is tried again).
    """
    try:
        yield
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"the labeller {name} needs the package {package}, which cannot be imported here ({error}); run "
            f"`pip install {package}`, or leave {name} out of pseudo.labellers: the loop goes on without it"
        ) from error


@contextmanager
def loading(name: str, weights: str) -> Iterator[None]:
    """Inside it a package reads `weights` for the labeller `name`.

    Raises:
        CheckpointError: whatever the package raises, since each has its own way to refuse a file.
    """
    try:
        yield
    except LoopError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the labeller {name} cannot read the weights {weights!r} ({type(error).__name__}: {error}); set "
            f"pseudo.weights.{name} to weights that this version of the package reads, or leave {name} out of "
            "pseudo.labellers: the loop goes on without it"
        ) from error


def weights_of(config: PseudoConfig, name: str, expected: str) -> str:
    """The setting pseudo.weights.NAME.

    Raises:
        ConfigError: it is not set.
    """
    given = config.weights.get(name, "")
    if not given:
        raise ConfigError(
            f"the labeller {name} has no weights; set pseudo.weights.{name} to {expected}, or leave {name} out of "
            "pseudo.labellers: the loop goes on without it"
        )
    return given


def weights_path(config: PseudoConfig, name: str, expected: str) -> Path:
    """The setting pseudo.weights.NAME as a file or folder that is there.

    Raises:
        ConfigError: it is not set.
        CheckpointError: nothing lies there.
    """
    path = Path(weights_of(config, name, expected)).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"pseudo.weights.{name} is {str(path)!r}, where nothing lies; give {expected}, or leave {name} out of "
            "pseudo.labellers: the loop goes on without it"
        )
    return path


def version_of(name: str, path: Path) -> str:
    """The labeller's version: its name, the weights' name and the first 8 digits of their SHA-256.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return f"{name}:{path.stem}-{sha256_of(path)[:8]}"
