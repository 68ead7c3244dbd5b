"""One run in MLflow that is being written: metrics, pictures, files and tags."""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from loop.adapters.mlflow_server import Server
from loop.errors import InputError, UnreachableError
from loop.types import UInt8Array

logger = logging.getLogger(__name__)

_BATCH = 1000  # metrics a request, MLflow's limit
_FLUSH_METRICS, _FLUSH_S, _RETRY_S = 500, 5.0, 30.0


class Run:
    """A run that is being written, by one thread. Metrics are sent together every few seconds, the rest at once."""

    def __init__(self, server: Server, run_id: str) -> None:
        self.run_id = run_id
        self._server = server
        self._metrics: list[tuple[str, float, int, int]] = []
        self._due = time.monotonic() + _FLUSH_S
        self._away = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note metrics of one step; sent every few seconds, so that a step is not slowed down.

        A server that is away for a while is no reason to stop training: the metrics are kept and sent later, at the
        latest at the end of the run, which fails if they still cannot be.

        Raises:
            RefusedError: MLflow does not take a name or a value.
        """
        now = int(time.time() * 1000)
        self._metrics += [(name, float(value), now, step) for name, value in values.items()]
        full = len(self._metrics) >= _FLUSH_METRICS and not self._away
        if not full and time.monotonic() < self._due:
            return
        try:
            self.flush()
        except UnreachableError as error:
            self._away, self._due = True, time.monotonic() + _RETRY_S
            logger.warning("run %s keeps %d metrics for later: %s", self.run_id, len(self._metrics), error)

    def flush(self) -> None:
        """Send the metrics noted so far."""
        while self._metrics:
            batch = self._metrics[:_BATCH]
            self._server.log_metrics(self.run_id, batch)
            del self._metrics[: len(batch)]
        self._away, self._due = False, time.monotonic() + _FLUSH_S

    def picture(self, name: str, image: UInt8Array | Path) -> None:
        """Store a picture as pictures/NAME.png.

        Args:
            name: without the ending; may hold slashes.
            image: (H, W), (H, W, 1) or (H, W, 3) RGB uint8, or the path of a PNG file.

        Raises:
            InputError: the array is no such picture, or there is no such file.
        """
        folder, _, stem = f"pictures/{name}".rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / f"{stem}.png"
            if isinstance(image, Path):
                if not image.is_file():
                    raise InputError(f"picture {name!r}: there is no file {image}")
                shutil.copyfile(image, target)
            else:
                target.write_bytes(_png(name, image))
            self.artifact(target, folder)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Store a file, or the content of a folder, under `folder` of the run.

        Raises:
            InputError: there is nothing at `path`.
        """
        if not path.exists():
            raise InputError(f"there is no {path} to store with run {self.run_id}")
        with self._server.asking(f"store {path.name} with run {self.run_id}") as client:
            store = client.log_artifacts if path.is_dir() else client.log_artifact
            store(self.run_id, str(path), folder or None)

    def tag(self, key: str, value: object) -> None:
        """Set a tag of the run."""
        with self._server.asking(f"tag run {self.run_id}") as client:
            client.set_tag(self.run_id, key, str(value))


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and text of each setting; nested mappings become dotted names."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _png(name: str, image: UInt8Array) -> bytes:
    channels = 1 if image.ndim == 2 else image.shape[2] if image.ndim == 3 else 0
    if image.dtype != np.uint8 or channels not in (1, 3) or image.size == 0:
        raise InputError(
            f"picture {name!r} is {image.shape} {image.dtype}; expected (H, W) or (H, W, 3) uint8, not empty"
        )
    written, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if channels == 3 else image)
    if not written:
        raise InputError(f"picture {name!r}: {image.shape} cannot be written as PNG")
    return data.tobytes()
