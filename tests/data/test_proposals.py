"""Proposals on disk: what is saved is loaded, and what cannot be is refused."""

import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.proposals import ProposalStore, StoredProposal, Use, forget_versions, stored_versions
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, NonFiniteError, ShapeError
from loop.masks import to_dense
from loop.types import ImageRef

IMAGE = ImageRef("cells", Path("cells.png"), "a" * 64, 40, 56, 3)


def proposal(seed: int, n: int, *, used: bool = True) -> StoredProposal:
    rng = np.random.default_rng(seed)
    _, cells = draw_cells(rng, (40, 56), n)
    numbers = rng.random((3, n), dtype=np.float32)
    use = Use(int(rng.integers(0, 9)), numbers[0], float(rng.random())) if used else None
    scored = replace(cells, scores=numbers[1], source="pseudo", model_version="sam:vit_b")
    return StoredProposal(scored, numbers[2], use)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 6), used=st.booleans())
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, used: bool) -> None:
    store = ProposalStore(tmp_path_factory.mktemp("store"), "sam:vit_b")
    saved = proposal(seed, n, used=used)
    store.save(IMAGE, saved)
    loaded = store.load(IMAGE)
    assert loaded is not None
    assert np.array_equal(to_dense(loaded.instances), to_dense(saved.instances))
    assert np.array_equal(loaded.instances.scores, saved.instances.scores)
    assert np.array_equal(loaded.stability, saved.stability)
    assert (loaded.instances.source, loaded.instances.model_version) == ("pseudo", "sam:vit_b")
    assert (loaded.use is None) is (saved.use is None)
    if loaded.use is not None and saved.use is not None:
        assert np.array_equal(loaded.use.confidence, saved.use.confidence)
        assert (loaded.use.number, loaded.use.keep) == (saved.use.number, saved.use.keep)
        assert np.array_equal(loaded.use.taught, saved.use.confidence >= saved.use.keep)


def test_versions_of_any_name_have_a_folder_of_their_own_and_the_last_written_is_first(tmp_path: Path) -> None:
    names = ["sam:vit_b", "cyto/3", "cyto_3", "champion-v2"]
    for name in names:
        assert ProposalStore(tmp_path, name).load(IMAGE) is None
        ProposalStore(tmp_path, name).save(IMAGE, proposal(0, 1))
    assert sorted(stored_versions(tmp_path)) == sorted(names)
    assert len(list(tmp_path.iterdir())) == len(names)
    assert list(stored_versions(tmp_path / "nothing")) == []


def test_old_versions_are_forgotten(tmp_path: Path) -> None:
    for number, name in enumerate(["v1", "sam:b", "v3"]):
        ProposalStore(tmp_path, name).save(IMAGE, proposal(0, 1))
        os.utime(tmp_path / quote(name, safe=""), ns=(0, number))
    assert forget_versions(tmp_path, 1) == ["sam:b", "v1"]
    assert list(stored_versions(tmp_path)) == ["v3"]
    assert forget_versions(tmp_path, 1) == []


def test_a_truncated_file_counts_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ProposalStore(tmp_path, "v1")
    store.save(IMAGE, proposal(0, 2))
    (file,) = (tmp_path / "v1").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert store.load(IMAGE) is None
    assert "is damaged" in caplog.text


def test_numbers_that_are_none_and_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store, sound = ProposalStore(tmp_path, "v1"), proposal(0, 2)
    with pytest.raises(NonFiniteError, match="labeller v1 gave NaN or infinity for image cells"):
        store.save(IMAGE, replace(sound, stability=np.full(2, np.nan, np.float32)))
    with pytest.raises(NonFiniteError, match="cells"):
        store.save(IMAGE, replace(sound, use=Use(1, np.full(2, np.inf, np.float32), 0.5)))
    with pytest.raises(ShapeError, match=r"stability of cells is \(3,\) for 2 cells"):
        store.save(IMAGE, replace(sound, stability=np.ones(3, np.float32)))
    with pytest.raises(ImageError, match="40, 56"):
        store.save(replace(IMAGE, height=41), sound)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_any_byte_changed_counts_as_absent(tmp_path: Path) -> None:
    store = ProposalStore(tmp_path, "sam:vit_b")
    store.save(IMAGE, proposal(1, 3))
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    absent = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        absent += store.load(IMAGE) is None  # whatever zlib and zipfile make of it, it raises nothing
    assert absent > len(whole) // 6
