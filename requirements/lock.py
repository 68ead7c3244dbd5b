"""Writes the two lock files anew: the newest versions that fit together and fit pyproject.toml.

    .venv/bin/python requirements/lock.py [app|labelstudio ...]

Nothing is installed; pip is asked what it would take. torch's CUDA packages stay out: torch pins its own exactly.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from install import DIRECTORIES, ROOT, InstallError, cuda_packages, lock_path, say

WANTED = {
    "app": [f"{ROOT}[dev,postgres]", "setuptools"],
    "labelstudio": ["label-studio==1.23.2", "setuptools", "wheel"],
}
HEADER = "# Every package of {directory}, made by `make lock`; the set-up installs exactly these.\n"


def locked(name: str, report: dict[str, Any]) -> str:
    """The text of a lock file for what pip would install: sorted, without local parts such as +cpu."""
    left_out = {"celloop", *cuda_packages(report)}
    pins = {
        item["metadata"]["name"]: item["metadata"]["version"].partition("+")[0]
        for item in report["install"]
        if item["metadata"]["name"].lower().replace("_", "-") not in left_out
    }
    lines = [f"{package}=={pins[package]}\n" for package in sorted(pins, key=str.lower)]
    return HEADER.format(directory=DIRECTORIES[name]) + "".join(lines)


def resolve(wanted: list[str]) -> dict[str, Any]:
    """What pip would install for `wanted` in an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    reply = subprocess.run([*command, *wanted], stdout=subprocess.PIPE, text=True, check=False)
    if reply.returncode != 0:
        raise InstallError(f"pip found no set of packages for {wanted}")
    report: dict[str, Any] = json.loads(reply.stdout)
    return report


def main(arguments: list[str]) -> int:
    """Writes the lock files that were asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes the lock files anew.")
    parser.add_argument("names", nargs="*", metavar="app|labelstudio", help="default: both")
    parser.add_argument("--out", type=Path, help="write into this folder instead of requirements/")
    given = parser.parse_args(arguments)
    for name in given.names or WANTED:
        say(f"asking pip for the newest versions of {name}")
        path = lock_path(name) if given.out is None else given.out / f"{name}.lock"
        path.write_text(locked(name, resolve(WANTED[name])), encoding="utf-8")
        say(f"wrote {path}; read the difference, then run `make test`")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InstallError as error:
        sys.stderr.write(f"lock: {error}\n")
        sys.exit(1)
