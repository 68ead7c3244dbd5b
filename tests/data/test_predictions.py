from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.predictions import PredictionStore, StoredPrediction
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, NonFiniteError
from loop.masks import to_dense
from loop.types import ImageRef, Instances


def image(height: int = 40, width: int = 56, sha256: str = "a" * 64) -> ImageRef:
    return ImageRef("cells", Path("cells.png"), sha256, height, width, 3)


def prediction(seed: int, n: int) -> StoredPrediction:
    rng = np.random.default_rng(seed)
    _, cells = draw_cells(rng, (40, 56), n)
    scored = replace(cells, scores=rng.random(len(cells), dtype=np.float32), source="model", model_version="m-v1")
    return StoredPrediction(scored, float(rng.random()), rng.random(8, dtype=np.float32))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 6))
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, seed: int, n: int) -> None:
    store = PredictionStore(tmp_path_factory.mktemp("store"), "m-v1")
    saved = prediction(seed, n)
    store.save(image(), saved)
    loaded = store.load(image())
    assert loaded is not None
    assert np.array_equal(to_dense(loaded.instances), to_dense(saved.instances))
    assert np.array_equal(loaded.instances.scores, saved.instances.scores)
    assert np.array_equal(loaded.embedding, saved.embedding)
    assert loaded.uncertainty == saved.uncertainty
    assert loaded.instances.model_version == "m-v1"


def test_another_content_or_another_model_has_no_prediction(tmp_path: Path) -> None:
    PredictionStore(tmp_path, "m-v1").save(image(), prediction(0, 2))
    assert PredictionStore(tmp_path, "m-v1").load(image(sha256="b" * 64)) is None
    assert PredictionStore(tmp_path, "m-v2").load(image()) is None


def test_a_truncated_file_counts_as_absent(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path, "m-v1")
    store.save(image(), prediction(0, 2))
    (file,) = (tmp_path / "m-v1").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert store.load(image()) is None


def test_nan_is_refused_with_the_image_named(tmp_path: Path) -> None:
    broken = replace(prediction(0, 2), uncertainty=float("nan"))
    with pytest.raises(NonFiniteError, match="cells"):
        PredictionStore(tmp_path, "m-v1").save(image(), broken)


def test_a_prediction_of_another_size_is_refused(tmp_path: Path) -> None:
    other = StoredPrediction(Instances.build((10, 10)), 0.1, np.zeros(4, np.float32))
    with pytest.raises(ImageError, match="10"):
        PredictionStore(tmp_path, "m-v1").save(image(), other)
