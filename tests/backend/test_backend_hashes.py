import hashlib
import os

import pytest

from backend import hashes as module
from backend.hashes import Hashes
from loop.errors import ImageError


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read."""
    seen = []
    read = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda path: (seen.append(path), read(path))[1])
    return seen


def _sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def settled(monkeypatch):
    """As if all files had been written long ago."""
    monkeypatch.setattr(module, "SETTLED_NS", -(10**12))


def test_a_file_is_read_once_while_it_does_not_change(tmp_path, reads, settled):
    path, known = tmp_path / "a.png", Hashes()
    path.write_bytes(b"one")
    assert [known.of(path) for _ in range(3)] == [_sha(b"one")] * 3
    assert len(reads) == 1
    path.write_bytes(b"longer")
    assert known.of(path) == _sha(b"longer")
    other = tmp_path / "b.png"
    other.write_bytes(b"second")
    other.replace(path)
    assert known.of(path) == _sha(b"second")
    assert len(reads) == 3


def test_the_same_size_at_another_time_is_another_file(tmp_path, reads, settled):
    path, known = tmp_path / "a.png", Hashes()
    path.write_bytes(b"one")
    known.of(path)
    path.write_bytes(b"two")
    os.utime(path, (1, 1))
    assert known.of(path) == _sha(b"two")


def test_a_file_that_has_just_changed_is_read_each_time(tmp_path, reads):
    path, known = tmp_path / "a.png", Hashes()
    path.write_bytes(b"one")
    known.of(path)
    path.write_bytes(b"two")  # maybe in the same tick of the clock, and of the same size
    assert known.of(path) == _sha(b"two")
    assert len(reads) == 2


def test_only_so_many_files_are_kept(tmp_path, reads, settled, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 2)
    known = Hashes()
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
        known.of(tmp_path / name)
    known.of(tmp_path / "c")
    assert len(reads) == 3
    known.of(tmp_path / "a")
    assert len(reads) == 4


def test_a_missing_file_is_named_without_its_folder(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png") as caught:
        Hashes().of(tmp_path / "gone.png")
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_goes_while_it_is_read_is_named_without_its_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    read = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda path: (path.unlink(), read(path))[1])
    with pytest.raises(ImageError, match=r"a\.png") as caught:
        Hashes().of(path)
    assert str(tmp_path) not in str(caught.value)
