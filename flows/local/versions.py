"""Installed packages against the committed lock files."""

import re
import subprocess
from importlib import metadata
from pathlib import Path

from flows.local.site import label_studio_program
from loop.errors import StateError

LOCKS = Path(__file__).resolve().parents[2] / "requirements"


def read_lock(path: Path) -> dict[str, str]:
    """Package name (normalised) to version of a lock file; empty where there is no such file."""
    if not path.exists():
        return {}
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {_normal(name): version for name, version in pins}


def wrong_versions(lock: Path = LOCKS / "app.lock") -> tuple[int, list[str]]:
    """How many packages of the lock are right, and "NAME 1.0 instead of 1.1" for the others.

    Builds of one version count as alike: 2.13.0+cpu is 2.13.0.
    """
    pins = read_lock(lock)
    installed = {_normal(item.metadata["Name"]): item.version for item in metadata.distributions()}
    wrong = [
        f"{name} {installed.get(name, 'missing')} instead of {version}"
        for name, version in pins.items()
        if installed.get(name, "").partition("+")[0] != version
    ]
    return len(pins) - len(wrong), wrong


def label_studio_versions(lock: Path = LOCKS / "labelstudio.lock") -> tuple[str, str]:
    """Label Studio's installed version, and the locked one ("" where there is no lock).

    Raises:
        StateError: it is not installed, or its environment is broken.
    """
    program = label_studio_program()
    code = "import importlib.metadata as m; print(m.version('label-studio'))"
    try:
        reply = subprocess.run(
            [str(program.parent / "python"), "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise StateError(f"the environment of {program} is broken ({type(error).__name__}); run `make`") from error
    return reply.stdout.strip(), read_lock(lock).get("label-studio", "")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
