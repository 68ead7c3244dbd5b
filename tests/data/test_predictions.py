from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.predictions import PredictionStore, StoredPrediction, candidate_of
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, InputError, NonFiniteError
from loop.masks import to_dense
from loop.types import ImageRef, Instances
from loop.uncertainty.measures import MEASURES


def image(height: int = 40, width: int = 56, sha256: str = "a" * 64) -> ImageRef:
    return ImageRef("cells", Path("cells.png"), sha256, height, width, 3)


def prediction(seed: int, n: int) -> StoredPrediction:
    rng = np.random.default_rng(seed)
    _, cells = draw_cells(rng, (40, 56), n)
    scored = replace(cells, scores=rng.random(len(cells), dtype=np.float32), source="model", model_version="m-v1")
    measures = {name: float(rng.random()) for name in MEASURES[: seed % (len(MEASURES) + 1)]}
    looks = "turns x 4" if "bald" in measures else ""
    return StoredPrediction(scored, float(rng.random()), rng.random(8, dtype=np.float32), measures, looks)


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
    assert (loaded.measures, loaded.looks) == (saved.measures, saved.looks)
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


def test_a_file_of_before_measures_were_kept_has_none_and_is_not_called_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = PredictionStore(tmp_path, "m-v1")
    store.save(image(), prediction(7, 2))
    (file,) = (tmp_path / "m-v1").iterdir()
    with np.load(file) as data:
        before = {name: data[name] for name in data.files if name not in ("measures", "measure_names", "looks")}
    np.savez_compressed(file, **before)
    loaded = store.load(image())
    assert loaded is not None
    assert (loaded.measures, loaded.looks, len(loaded.instances)) == ({}, "", 2)
    assert not caplog.records


def test_a_candidate_says_what_is_stored() -> None:
    stored = prediction(9, 4)
    got = candidate_of(stored, "cells", "slide-2", seconds=31.0)
    assert (got.image_id, got.group, got.seconds, got.n_cells) == ("cells", "slide-2", 31.0, len(stored.instances))
    assert got.uncertainty == stored.measures["entropy_cells"]
    assert got.foreground == pytest.approx(to_dense(stored.instances).any(axis=0).mean())
    assert (got.measures, got.embedding is stored.embedding) == (stored.measures, True)
    assert candidate_of(stored, "cells", "", measure="bald").uncertainty == stored.measures["bald"]


def test_a_missing_measure_is_refused_with_the_image_named() -> None:
    with pytest.raises(InputError, match=r"cells.*'bald'.*entropy_cells.*select\.passes"):
        candidate_of(prediction(7, 2), "cells", "", measure="bald")
    with pytest.raises(InputError, match=r"cells.*'entropy_cells', only none"):
        candidate_of(prediction(0, 2), "cells", "")


@pytest.mark.parametrize("broken", [{"uncertainty": float("nan")}, {"measures": {"bald": float("inf")}}])
def test_nan_is_refused_with_the_image_named(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(NonFiniteError, match="cells"):
        PredictionStore(tmp_path, "m-v1").save(image(), replace(prediction(0, 2), **broken))


def test_a_prediction_of_another_size_is_refused(tmp_path: Path) -> None:
    other = StoredPrediction(Instances.build((10, 10)), 0.1, np.zeros(4, np.float32))
    with pytest.raises(ImageError, match="10"):
        PredictionStore(tmp_path, "m-v1").save(image(), other)
