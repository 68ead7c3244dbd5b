"""Published weights of other people's networks: where they lie, whether they are whole, and how they get here.

They lie in CELLOOP_HOME/models, by default in ~/.cache/celloop/models. Nothing is downloaded unless `fetch_weights` is
called; a download that breaks off goes on where it stopped.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import requests

from loop.errors import CheckpointError, ConfigError, RefusedError, StateError, UnreachableError

_CHUNK = 1 << 16  # what of a chunk has come when the connection breaks is lost
_ATTEMPTS = 3


class Published(NamedTuple):
    """A file as its authors publish it: where, its SHA-256 (hex) and its size in bytes."""

    url: str
    sha256: str
    size: int


def _sam(name: str, sha256: str, size: int) -> Published:
    return Published(f"https://dl.fbaipublicfiles.com/segment_anything/{name}", sha256, size)


PUBLISHED: dict[str, Published] = {
    name: _sam(name, sha256, size)
    for name, sha256, size in (
        ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", 375_042_383),
        ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", 1_249_524_607),
        ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", 2_564_550_879),
    )
}
"""By file name. (The six characters in SAM's file names begin its MD5, not its SHA-256.)"""


def models_folder() -> Path:
    """Where weights lie: CELLOOP_HOME/models, or ~/.cache/celloop/models where CELLOOP_HOME is not set."""
    home = os.environ.get("CELLOOP_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "celloop") / "models"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hex; its bytes are read piece by piece.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error


def check_weights(path: Path, *, published: Mapping[str, Published] = PUBLISHED) -> str:
    """The SHA-256 of a file of weights (hex); one of a published name must be as published.

    Raises:
        CheckpointError: the file cannot be read, or is not what is published under its name.
    """
    found = sha256_of(path)
    wanted = published.get(path.name)
    if wanted is not None and found != wanted.sha256:
        raise CheckpointError(
            f"{path} is not what is published under this name: {path.stat().st_size} bytes with sha256 {found}, "
            f"expected {wanted.size} bytes with sha256 {wanted.sha256}; delete it and download {wanted.url} again, or "
            "give weights of your own another name"
        )
    return found


def fetch_weights(
    name: str,
    *,
    folder: Path | None = None,
    published: Mapping[str, Published] = PUBLISHED,
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float = 30.0,
) -> Path:
    """The path of published weights, downloaded if they are not there, whole and of the right checksum.

    What has arrived lies in FOLDER/NAME.part until the last byte is there and the checksum fits; a later call goes on
    from it. A server that cannot resume is asked from the start.

    Args:
        name: a key of `published`.
        folder: where to; `models_folder()` by default, made if missing.
        published: what can be had.
        progress: called with the bytes that are here and their total.
        timeout_s: how long the server may be silent.

    Raises:
        ConfigError: nothing is published under that name.
        CheckpointError: what is there or what arrived has another checksum, or cannot be written.
        UnreachableError: no connection, or it broke off again and again without a byte.
        RefusedError: the server says no.
        StateError: another process is downloading the same file.
    """
    if name not in published:
        raise ConfigError(f"no weights are published as {name!r}; known: {', '.join(sorted(published))}")
    folder = models_folder() if folder is None else folder
    path, wanted = folder / name, published[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_name(f"{name}.part")
            with _locked(part) as file:
                if not path.exists():  # another process may have finished it meanwhile
                    _fill(file, part, wanted, progress=progress, timeout_s=timeout_s)
                    part.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free some space or set CELLOOP_HOME") from error
    check_weights(path, published=published)
    return path


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"another process is downloading {part}; wait until it is done") from error
        yield file


def _fill(
    file: BinaryIO,
    part: Path,
    wanted: Published,
    *,
    progress: Callable[[int, int], None] | None,
    timeout_s: float,
) -> None:
    """Adds to `file`, which is open to append, until it is whole; empties it where its checksum is then wrong."""
    idle, most, fault = 0, file.tell(), "the connection was closed early"
    while file.tell() != wanted.size:
        try:
            _ask(file, wanted, progress=progress, timeout_s=timeout_s)
        except requests.RequestException as error:
            fault = str(error)
        file.flush()
        idle = 0 if file.tell() > most else idle + 1
        most = max(most, file.tell())
        if idle == _ATTEMPTS:
            raise UnreachableError(
                f"{wanted.url} does not answer ({fault}); {file.tell()} of {wanted.size} bytes are kept in {part}: try "
                "again later, or download the file elsewhere and put it there"
            )
    found = sha256_of(part)
    if found != wanted.sha256:
        file.truncate(0)
        raise CheckpointError(
            f"what {wanted.url} sent has sha256 {found}, expected {wanted.sha256}; it was thrown away: try again, and "
            "where that does not help something on the way changes files"
        )


def _ask(file: BinaryIO, wanted: Published, *, progress: Callable[[int, int], None] | None, timeout_s: float) -> None:
    """One request for what is missing; what arrives is appended."""
    here = file.tell()
    if here > wanted.size:
        file.truncate(0)
        here = file.seek(0)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={here}-"} if here else {})}
    with requests.get(wanted.url, headers=headers, stream=True, timeout=timeout_s) as answer:
        resumes = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {here}-")
        if answer.status_code not in (200, 206, 416):
            raise RefusedError(
                f"{wanted.url} answered {answer.status_code} {answer.reason}; download the file elsewhere, or try later"
            )
        if not resumes:
            file.truncate(0)
            here = file.seek(0)
        if answer.status_code != 200 and not resumes:
            return  # the next request asks from the start
        for chunk in answer.iter_content(_CHUNK):
            file.write(chunk)
            here += len(chunk)
            if here > wanted.size:
                raise RefusedError(f"{wanted.url} sends more than the {wanted.size} bytes that are published")
            if progress is not None:
                progress(here, wanted.size)
