from pathlib import Path

import pytest

from loop.data.text_file import write_text


def test_text_replaces_text_in_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    for text in ("first, longer", "zweites: ü"):
        assert write_text(path, text) == path
        assert path.read_bytes() == text.encode()
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "x.txt", "old")

    def full(self: Path, text: str, encoding: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_bytes() == b"old"
