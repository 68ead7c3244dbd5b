import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from loop.data.embeddings import EmbeddingStore, to_encode

MODEL = "vit_b-0123abcd"


def _sha(i):
    return f"{i:064x}"


def is_kept(store, sha256, model):
    """Whether there is a file, without asking for it."""
    return store._path(sha256, model).is_file()


def _arrays(value=0.0, floats=100):
    return {"features": np.full((1, floats), value, np.float16), "shape": np.array([7, 9])}


def _age(directory, i, seconds, model=MODEL):
    path = directory / model / f"{_sha(i)}.safetensors"
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8),
        arrays_of.arrays(
            st.sampled_from([np.float16, np.float32, np.int64, np.uint8]),
            arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        ),
        max_size=3,
    ),
    st.text(st.sampled_from("ab/.:% é"), min_size=1, max_size=6).filter(lambda name: name.strip(".")),
)
def test_what_is_put_comes_back_bit_by_bit(tmp_path_factory, arrays, model):
    directory = tmp_path_factory.mktemp("store")
    store = EmbeddingStore(directory, 10**6)
    assert store.get(_sha(1), model) is None
    assert not is_kept(store, _sha(1), model)
    assert store.put(_sha(1), model, arrays)
    found = EmbeddingStore(directory, 10**6).get(_sha(1), model)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.writeable
    assert is_kept(store, _sha(1), model)
    assert not is_kept(store, _sha(1), model + "x")
    assert store.get(_sha(2), model) is None


def test_arrays_that_are_views_are_kept_as_they_look(tmp_path):
    store = EmbeddingStore(tmp_path, 10**6)
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    store.put(_sha(1), MODEL, {"turned": array.T, "every_second": array[:, ::2]})
    found = store.get(_sha(1), MODEL)
    np.testing.assert_array_equal(found["turned"], array.T)
    np.testing.assert_array_equal(found["every_second"], array[:, ::2])


def test_the_least_recently_used_goes_first(tmp_path):
    size = len(_one_file(tmp_path / "probe"))
    store = EmbeddingStore(tmp_path / "store", 3 * size)
    for i in range(3):
        store.put(_sha(i), MODEL, _arrays(i))
        _age(tmp_path / "store", i, 100 - i)
    assert store.get(_sha(0), MODEL) is not None  # asked for, so 1 is now the oldest
    store.put(_sha(3), "another-model", _arrays(3))
    assert [is_kept(store, _sha(i), MODEL) for i in range(3)] == [True, False, True]
    assert is_kept(store, _sha(3), "another-model")
    assert sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.safetensors")) == 3 * size


def test_replacing_does_not_count_twice(tmp_path):
    size = len(_one_file(tmp_path / "probe"))
    store = EmbeddingStore(tmp_path / "store", 2 * size)
    for value in (1.0, 2.0, 3.0):
        store.put(_sha(1), MODEL, _arrays(value))
    store.put(_sha(2), MODEL, _arrays())
    assert store.get(_sha(1), MODEL)["features"][0, 0] == 3.0
    assert is_kept(store, _sha(2), MODEL)


@pytest.mark.parametrize("limit", [0, 100])
def test_what_is_over_the_whole_limit_is_not_kept_and_drops_nothing(tmp_path, limit):
    EmbeddingStore(tmp_path, 10**6).put(_sha(1), MODEL, _arrays())
    assert EmbeddingStore(tmp_path, limit).put(_sha(2), MODEL, _arrays()) is False
    assert is_kept(EmbeddingStore(tmp_path, limit), _sha(1), MODEL)
    assert not is_kept(EmbeddingStore(tmp_path, limit), _sha(2), MODEL)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:60], lambda data: b"\xff" * 40, lambda d: d[:-1]]
)
def test_a_damaged_file_is_a_miss_and_goes(tmp_path, caplog, damage):
    store = EmbeddingStore(tmp_path, 10**6)
    store.put(_sha(1), MODEL, _arrays())
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert store.get(_sha(1), MODEL) is None
    assert not path.exists()
    assert store.get(_sha(1), MODEL) is None
    (line,) = caplog.messages
    assert path.name in line
    assert store.put(_sha(1), MODEL, _arrays(4.0))
    assert store.get(_sha(1), MODEL)["features"][0, 0] == 4.0


def test_a_disk_that_takes_nothing_is_no_failure(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert EmbeddingStore(tmp_path / "file", 10**6).put(_sha(1), MODEL, _arrays()) is False
    assert "not kept" in caplog.text


def test_what_dead_writers_left_goes_and_what_is_being_written_stays(tmp_path):
    (tmp_path / MODEL).mkdir()
    old, new = tmp_path / MODEL / "old.tmp", tmp_path / MODEL / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"x" * 50)
    os.utime(old, (time.time() - 7200,) * 2)
    EmbeddingStore(tmp_path, 10**6).put(_sha(1), MODEL, _arrays())
    assert not old.exists()
    assert new.exists()


def _one_file(directory):
    EmbeddingStore(directory, 10**6).put(_sha(0), MODEL, _arrays())
    (path,) = directory.rglob("*.safetensors")
    return path.read_bytes()


WORK = """
import sys
from pathlib import Path
import numpy as np
from loop.data.embeddings import EmbeddingStore
store = EmbeddingStore(Path(sys.argv[1]), int(sys.argv[2]))
rng = np.random.default_rng(int(sys.argv[3]))
for _ in range(150):
    i = int(rng.integers(20))
    found = store.get(f"{i:064x}", "vit_b-0123abcd")
    if found is None:
        assert store.put(f"{i:064x}", "vit_b-0123abcd", {"features": np.full((1, 100), i, np.float16)})
    else:
        assert (found["features"] == i).all()
"""


def test_threads_and_a_second_process_never_see_a_wrong_or_half_file(tmp_path, caplog):
    limit = 5 * len(_one_file(tmp_path / "probe"))
    directory = tmp_path / "store"
    faults = []

    def work(seed):
        store = EmbeddingStore(directory, limit)
        rng = np.random.default_rng(seed)
        for _ in range(150):
            i = int(rng.integers(20))
            found = store.get(_sha(i), MODEL)
            if found is None:
                store.put(_sha(i), MODEL, {"features": np.full((1, 100), i, np.float16)})
            elif not (found["features"] == i).all():
                faults.append(i)

    second = subprocess.Popen([sys.executable, "-c", WORK, str(directory), str(limit), "99"])
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert second.wait(60) == 0
    assert faults == []
    assert caplog.messages == []
    EmbeddingStore(directory, limit).put(_sha(0), MODEL, _arrays())
    assert sum(path.stat().st_size for path in directory.rglob("*.safetensors")) <= limit
    assert not list(directory.rglob("*.tmp"))


def test_what_is_encoded_is_stretched_and_keeps_its_colours():
    grey = np.linspace(100, 120, 400).astype(np.uint8).reshape(20, 20, 1)
    seen = to_encode(grey)
    assert seen.shape == (20, 20, 3)
    assert seen.min() == 0
    assert seen.max() == 255
    bright = np.full((20, 20, 3), 250, np.uint8)
    bright[:5] = (200, 10, 10)
    seen = to_encode(bright)
    assert (seen[10, 10] == 255).all()  # a bright ground stays bright
    assert seen[0, 0, 0] > seen[0, 0, 1]


@pytest.mark.parametrize("fault", [PermissionError(13, "denied"), OSError(24, "too many open files")])
def test_a_file_that_cannot_be_read_now_is_a_miss_and_stays(tmp_path, monkeypatch, caplog, fault):
    store = EmbeddingStore(tmp_path, 10**6)
    store.put(_sha(1), MODEL, _arrays(4.0))

    def refuse(path):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.read_bytes", refuse)
        assert store.get(_sha(1), MODEL) is None
    assert "cannot be read" in caplog.text
    assert store.get(_sha(1), MODEL)["features"][0, 0] == 4.0


def test_a_folder_of_another_user_is_read_all_the_same(tmp_path, monkeypatch):
    store = EmbeddingStore(tmp_path, 10**6)
    for i in range(2):
        store.put(_sha(i), MODEL, _arrays(4.0))
    damaged = next(path for path in tmp_path.rglob("*.safetensors") if path.stem == _sha(0))
    damaged.write_bytes(b"")

    def refuse(*args, **kwargs):
        raise PermissionError(1, "not yours")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert store.get(_sha(0), MODEL) is None
    assert store.get(_sha(1), MODEL)["features"][0, 0] == 4.0


def test_files_are_open_to_those_whom_the_mask_of_the_process_lets_in(tmp_path):
    before = os.umask(0o027)
    try:
        EmbeddingStore(tmp_path, 10**6).put(_sha(1), MODEL, _arrays())
    finally:
        os.umask(before)
    (path,) = tmp_path.rglob("*.safetensors")
    assert path.stat().st_mode & 0o777 == 0o640
