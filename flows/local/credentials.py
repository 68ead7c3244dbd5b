"""The secrets of a workspace: made once, kept in one file that only its owner can read."""

import json
import os
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from loop.errors import StateError

EMAIL = "celloop@localhost"


@dataclass(frozen=True)
class Credentials:
    """What the local Label Studio is started with, and the token of an external one; secrets are not in its repr."""

    label_studio_email: str
    label_studio_password: str = field(repr=False)
    label_studio_token: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    external_token: str = field(default="", repr=False)

    def secrets(self) -> tuple[str, ...]:
        """Every value that must appear nowhere else."""
        held = (self.label_studio_password, self.label_studio_token, self.webhook_secret, self.external_token)
        return tuple(value for value in held if value)


def make_credentials() -> Credentials:
    """New random credentials: a password of 16 characters, a token of 40 hexadecimal digits."""
    return Credentials(
        label_studio_email=EMAIL,
        label_studio_password=secrets.token_urlsafe(12),
        label_studio_token=secrets.token_hex(20),
        webhook_secret=secrets.token_urlsafe(24),
    )


def load_credentials(path: Path) -> Credentials | None:
    """The credentials in `path`; None where there is no such file.

    Raises:
        StateError: the file is not what `save_credentials` wrote.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return Credentials(**{item.name: str(given[item.name]) for item in fields(Credentials)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path} cannot be read ({type(error).__name__}); restore it, or delete the workspace for a clean start"
        ) from error


def save_credentials(path: Path, credentials: Credentials) -> None:
    """Writes `credentials` with mode 0600, whole or not at all.

    Raises:
        StateError: the disk is full or the folder is not writable.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(credentials), file, indent=2)
        temporary.replace(path)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}; make room or choose another --workspace") from error
