"""What models see in the images that people click in, computed once: from memory, from the disk, else by the model.

Everything is kept under the hash of the image's bytes and the model's name, so that nobody ever gets what was seen in
another image, or by another model.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from backend.images import ImageFile
from backend.map_cache import MapCache
from backend.metrics import Metrics
from backend.model_slot import Champion
from backend.turns import Rank, Turn, Turns
from loop.data.embeddings import EmbeddingStore, to_encode
from loop.errors import LoopError, NonFiniteError
from loop.models.click import Scene
from loop.models.sam import Embedding, Sam

logger = logging.getLogger(__name__)

MB = 10**6

Key = tuple[str, str]
"""Hash of the image's bytes, name of the model."""
Seen = TypeVar("Seen")


@dataclass
class _Flight(Generic[Seen]):
    """A computation under way: its turn, which latecomers may hurry, and what they wait for."""

    turn: Turn
    done: Future[Seen] = field(default_factory=Future)


class _Once(Generic[Seen]):
    """A cache whose values are computed once, however many ask at the same time."""

    def __init__(self, turns: Turns, limit_bytes: int) -> None:
        self.kept: MapCache[Key, Seen] = MapCache(limit_bytes)
        self._turns = turns
        self._lock = threading.Lock()
        self._flights: dict[Key, _Flight[Seen]] = {}

    def get(self, key: Key, rank: Rank, compute: Callable[[Turn], Seen]) -> tuple[Seen, bool]:
        """The value and whether it was there already; `compute` gets a turn, to be taken where it needs the model.

        Who comes while somebody else computes the same waits for him, and lends him his rank.

        Raises:
            Exception: whatever `compute` raises, to all who waited for it; the next one tries again.
        """
        with self._lock:
            kept = self.kept.get(key)
            if kept is not None:
                return kept, True
            flight = self._flights.get(key)
            is_first = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight(self._turns.take(rank))
        if not is_first:
            flight.turn.hurry(rank)
            return flight.done.result(), False
        try:
            value = compute(flight.turn)
            self.kept.put(key, value)
            flight.done.set_result(value)
            return value, False
        except BaseException as error:
            flight.done.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._flights[key]


class Sights:
    """Scenes of champions and encoded images of SAM.

    Args:
        turns: models work one at a time, those that somebody waits for first.
        metrics: hits and misses are counted there.
        scene_bytes: how much of scenes is kept in memory.
        embedding_bytes: how much of encoded images is kept in memory.
        directory: where encoded images are kept for good, None for nowhere.
    """

    def __init__(
        self, turns: Turns, metrics: Metrics, *, scene_bytes: int, embedding_bytes: int, directory: Path | None
    ) -> None:
        self._metrics = metrics
        self._directory = directory
        self._scenes: _Once[Scene] = _Once(turns, scene_bytes)
        self._embeddings: _Once[Embedding] = _Once(turns, embedding_bytes)

    def scene(self, file: ImageFile, champion: Champion, rank: Rank) -> Scene:
        """What the champion sees in an image.

        Raises:
            ImageError: the file cannot be decoded.
            NonFiniteError: the champion gives NaN for it.
        """

        def compute(turn: Turn) -> Scene:
            pixels = file.pixels()
            with turn:
                scene = champion.segmenter.scene(pixels)
            if not np.isfinite(scene.probs).all():
                raise NonFiniteError(f"{champion.label} gives NaN for {file.value!r}; train it again or go back")
            return scene

        scene, was_there = self._scenes.get((file.sha256, champion.label), rank, compute)
        self._metrics.maps.labels("hit" if was_there else "miss").inc()
        self._metrics.map_bytes.set(self._scenes.kept.size_bytes)
        return scene

    def embedding(self, file: ImageFile, sam: Sam, rank: Rank, *, store_mb: int) -> Embedding:
        """The image as SAM has encoded it; from the disk where it is there, and to the disk where it is made.

        Between the encoder's blocks those of a higher rank go first.

        Args:
            file: the image.
            sam: the model.
            rank: who waits for it.
            store_mb: encoded images of so many MB in all are kept on disk; 0 = none.

        Raises:
            ImageError: the file cannot be decoded.
            NonFiniteError: the encoder gives NaN for it.
        """
        store = self._store(store_mb)
        found = "miss"

        def compute(turn: Turn) -> Embedding:
            nonlocal found
            stored = None if store is None else _load(store, file.sha256, sam)
            if stored is not None:
                found = "disk"
                return stored
            pixels = to_encode(file.pixels())
            with turn:
                embedding = sam.encode(pixels, pause=turn.give_way)
            if store is not None:
                _save(store, file.sha256, sam, embedding)
            return embedding

        embedding, was_there = self._embeddings.get((file.sha256, sam.version), rank, compute)
        self._metrics.embeddings.labels("hit" if was_there else found).inc()
        self._metrics.embedding_bytes.set(self._embeddings.kept.size_bytes)
        return embedding

    def _store(self, store_mb: int) -> EmbeddingStore | None:
        return EmbeddingStore(self._directory, store_mb * MB) if self._directory is not None and store_mb else None


def _load(store: EmbeddingStore, sha256: str, sam: Sam) -> Embedding | None:
    """The stored embedding; None where there is none, or none that the model takes."""
    arrays = store.get(sha256, sam.version)
    try:
        return None if arrays is None else sam.embedding(arrays)
    except LoopError as error:
        logger.warning("encoded image %s is not used: %s", sha256[:16], error)
        return None


def _save(store: EmbeddingStore, sha256: str, sam: Sam, embedding: Embedding) -> None:
    """Keeps the embedding; one that half precision cannot hold stays in memory only."""
    try:
        store.put(sha256, sam.version, embedding.to_arrays())
    except NonFiniteError as error:
        logger.warning("encoded image %s is not kept on disk: %s", sha256[:16], error)
