"""Text files that are there as a whole or not at all."""

from pathlib import Path


def write_text(path: Path, text: str) -> Path:
    """Makes a UTF-8 file appear with all of its text, in place of the one that is there; returns `path`.

    Folders above it are made. A killed write leaves the old file, and NAME.tmp beside it.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)
