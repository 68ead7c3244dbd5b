"""What labellers proposed for images, and which of it taught: the audit's evidence once people label the images."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from loop.data.predictions import CELLS, array_file, arrays_of, cells_of, check_cells, read_arrays, write_arrays
from loop.errors import ShapeError
from loop.types import BoolArray, FloatArray, ImageRef, Instances

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Use:
    """What became of a proposal in a round.

    Attributes:
        number: the round.
        confidence: (N,) float32 in [0, 1], of each proposed cell: that of the fused cell which it is part of, 0 where
            it is part of none.
        keep: the confidence from which cells taught then.
    """

    number: int
    confidence: FloatArray
    keep: float

    @property
    def taught(self) -> BoolArray:
        """(N,) bool: the cells that taught, or would have if their labeller had not been switched off."""
        return self.confidence >= self.keep


@dataclass(frozen=True, eq=False)
class StoredProposal:
    """N proposed cells, source "pseudo", their stability (N,) float32 in [0, 1], and their use; None = not used yet."""

    instances: Instances
    stability: FloatArray
    use: Use | None = None


class ProposalStore:
    """Proposals of one labeller version below `root`, one .npz an image, named by image id and content hash.

    Writing is atomic, so a killed run leaves whole files only; a file that cannot be read is made again.
    """

    def __init__(self, root: Path, version: str) -> None:
        self.version = version
        self._directory = root / quote(version, safe="")

    def load(self, image: ImageRef) -> StoredProposal | None:
        """The stored proposal for `image`, or None where there is none (or the file is damaged)."""
        arrays = read_arrays(array_file(self._directory, image), {*CELLS, "stability"})
        if arrays is None:
            return None
        instances = cells_of(arrays, image, source="pseudo", model_version=self.version)
        use = None
        if arrays.keys() >= {"confidence", "number", "keep"}:
            use = Use(int(arrays["number"]), arrays["confidence"], float(arrays["keep"]))
        return StoredProposal(instances, arrays["stability"], use)

    def save(self, image: ImageRef, proposal: StoredProposal) -> None:
        """Keeps `proposal` for `image`, in place of an earlier one.

        Raises:
            ShapeError: stability or confidence are not one number a cell.
            NonFiniteError: a score, a stability or a confidence is NaN or infinite; names the image.
            ImageError: the proposal has another size than the image.
        """
        cells, use = proposal.instances, proposal.use
        columns = {"stability": proposal.stability.astype(np.float32)}
        if use is not None:
            columns["confidence"] = use.confidence.astype(np.float32)
        for name, values in columns.items():
            if values.shape != (len(cells),):
                raise ShapeError(f"{name} of {image.image_id} is {values.shape} for {len(cells)} cells; give one each")
        check_cells(cells, np.concatenate([cells.scores, *columns.values()]), image, f"labeller {self.version}")
        rest = {} if use is None else {"number": np.asarray(use.number), "keep": np.asarray(use.keep)}
        write_arrays(array_file(self._directory, image), {**arrays_of(cells), **columns, **rest})


def stored_versions(root: Path) -> Iterator[str]:
    """The labeller versions that have proposals below `root`, the one that was written to last first."""
    folders = [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []
    for folder in sorted(folders, key=lambda folder: (folder.stat().st_mtime_ns, folder.name), reverse=True):
        yield unquote(folder.name)


def forget_versions(root: Path, keep: int) -> list[str]:
    """Deletes all but the `keep` versions below `root` that were written to last; returns those that are gone.

    A folder that cannot be deleted is named in the log.
    """
    gone = []
    for version in list(stored_versions(root))[keep:]:
        try:
            shutil.rmtree(root / quote(version, safe=""))
        except OSError as error:
            logger.warning("old proposals of %s cannot be deleted: %s", version, error)
            continue
        gone.append(version)
    return gone
