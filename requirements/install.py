"""Creates the two environments, `.venv` (celloop) and `.venv-labelstudio`, from their lock files; needs only Python.

    python3.11 requirements/install.py [app|labelstudio ...] [--torch auto|cpu|gpu]

An environment is made once, and again when its lock file, the Python version or the folder of the project changes.
Made in one go: one that was interrupted is made anew. A `.venv` that is a link is somebody's own and used as it is.

torch: where a GPU is at hand, pip installs torch as the lock names it, with the CUDA packages that it asks for. Without
a GPU these gigabytes would be wasted: pip is asked what it would take, and only if CUDA is in it, uv (which knows where
the CPU builds are) installs torch instead.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "1"
PIP = "pip==26.3"
UV = "uv==0.13.8"
CUDA_PACKAGE = re.compile(r"(nvidia|cuda|triton|pytorch-triton)(-|$)")
DIRECTORIES = {"app": ".venv", "labelstudio": ".venv-labelstudio"}
BUILD_TOOLS = ("setuptools", "wheel")
REMIND_S = 15.0


class InstallError(Exception):
    """The set-up cannot go on; the text says what to do."""


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"set-up: {text}\n")
    sys.stdout.flush()


def lock_path(name: str) -> Path:
    """The lock file of an environment."""
    return ROOT / "requirements" / f"{name}.lock"


def read_pins(lock: str) -> dict[str, str]:
    """Package name to "name==version" of a lock file's text."""
    return {name.lower(): f"{name}=={version}" for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)", lock)}


def fingerprint(name: str) -> str:
    """What an environment is made of; another value means that it must be made anew."""
    parts = (RECIPE, PIP, sys.version.split()[0].rpartition(".")[0], str(ROOT), lock_path(name).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def project_fingerprint() -> str:
    """What the installed commands of the project are made of."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def has_gpu() -> bool:
    """Whether nvidia-smi finds a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    reply = subprocess.run([program, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return reply.returncode == 0 and b"GPU" in reply.stdout


def cuda_packages(report: dict[str, Any]) -> list[str]:
    """The CUDA packages in a report of `pip install --report`."""
    names = [item["metadata"]["name"].lower().replace("_", "-") for item in report["install"]]
    return sorted(name for name in names if CUDA_PACKAGE.match(name))


class Environment:
    """One of the two environments."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = ROOT / DIRECTORIES[name]
        self.python = self.path / "bin" / "python"
        self.lock = lock_path(name)
        self.pins = read_pins(self.lock.read_text())
        self._stamp = self.path / "celloop-stamp.json"
        self._unfinished = self.path / "celloop-unfinished"
        self._log = self.path / "install.log"

    def stamp(self) -> dict[str, str]:
        """What the finished environment was made of; empty where there is none."""
        try:
            found: dict[str, str] = json.loads(self._stamp.read_text()) if self.python.exists() else {}
            return found
        except (OSError, ValueError):
            return {}

    def ensure(self, torch: str) -> None:
        """Makes the environment unless it is there already."""
        if self.path.is_symlink():
            say(f"{self.path.name} is a link to {self.path.readlink()}; it is used as it is")
            return
        found = self.stamp()
        wanted = {"environment": fingerprint(self.name)}
        if self.name == "app":
            wanted["project"] = project_fingerprint()
        if found == wanted:
            return
        begin = time.monotonic()
        if found.get("environment") != wanted["environment"]:
            self._begin()
            self._fill(torch)
        if self.name == "app":
            self._install_project()
        self._pip(["check"], "checking that the packages fit together")
        self._stamp.write_text(json.dumps(wanted))
        self._unfinished.unlink(missing_ok=True)
        say(f"{self.path.name} is ready after {time.monotonic() - begin:.0f} s")

    def _begin(self) -> None:
        """An empty environment; only one that this script made is thrown away."""
        if self.path.exists():
            if not (self._stamp.exists() or self._unfinished.exists()):
                raise InstallError(f"{self.path} was not made by `make`; move it away, then run this again")
            say(f"making {self.path.name} anew")
            shutil.rmtree(str(self.path))
        self.path.mkdir()
        self._unfinished.touch()
        say(f"{self.path.name}: an environment of Python {sys.version.split()[0]}")
        try:
            import ensurepip  # noqa: F401 - Debian leaves it out of python3
            import venv  # noqa: F401
        except ImportError:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise InstallError(
                "this Python cannot make environments; install its venv module, on Debian and Ubuntu with "
                f"`apt install python{version}-venv`, then run this again"
            ) from None
        self._run([sys.executable, "-m", "venv", str(self.path)], "creating it")

    def _fill(self, torch: str) -> None:
        tools = [self.pins[tool] for tool in BUILD_TOOLS if tool in self.pins]
        self._pip(["install", PIP, *tools], "pip and build tools")
        if "torch" in self.pins:
            self._install_torch(torch)
        self._pip(
            ["install", "--no-build-isolation", "-r", str(self.lock)],
            f"{len(self.pins)} packages of {self.lock.name}",
            total=len(self.pins),
        )

    def _install_torch(self, torch: str) -> None:
        pin = self.pins["torch"]
        gpu = has_gpu() if torch == "auto" else torch == "gpu"
        if gpu:
            say("torch: a GPU is wanted or at hand, so the CUDA build and its packages (some gigabytes)")
        else:
            cuda = self._cuda_in(pin)
            if cuda:
                say(f"torch: no GPU; pip would take {len(cuda)} CUDA packages, so uv installs the CPU build")
                self._pip(["install", UV], "uv")
                uv = [str(self.path / "bin" / "uv"), "pip", "install", "--python", str(self.python), "--no-deps"]
                self._run([*uv, "--torch-backend=cpu", pin], f"the CPU build of {pin}")
                return
            say("torch: no GPU; what pip takes has no CUDA packages in it")
        self._pip(["install", "-c", str(self.lock), pin], pin)

    def _cuda_in(self, pin: str) -> list[str]:
        """The CUDA packages that pip would take with torch; reads only their descriptions."""
        command = [str(self.python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", "-", pin]
        reply = subprocess.run(command, capture_output=True, text=True, check=False)
        if reply.returncode != 0:
            raise InstallError(f"pip finds no {pin}:\n{reply.stderr[-1500:]}")
        return cuda_packages(json.loads(reply.stdout))

    def _install_project(self) -> None:
        self._pip(["install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)], "celloop itself")

    def _pip(self, arguments: list[str], what: str, total: int = 0) -> None:
        quiet = ["--progress-bar", "off", "--no-input"] if arguments[0] == "install" else []
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", arguments[0], *quiet, *arguments[1:]]
        self._run(command, what, total)

    def _run(self, command: list[str], what: str, total: int = 0) -> None:
        """Runs a command into the log, and tells every now and then how far it is."""
        say(f"{self.path.name}: {what}")
        begin = time.monotonic()
        with self._log.open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=str(ROOT))
            while (code := self._ended(process)) is None:
                done = self._phase(start, total) if total else ""
                say(f"{self.path.name}: {what}, {time.monotonic() - begin:.0f} s{done}")
        if code != 0:
            end = b"\n".join(self._log.read_bytes().splitlines()[-25:]).decode(errors="replace")
            raise InstallError(f"{what} failed (exit code {code}); the end of {self._log}:\n{end}")

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> int | None:
        try:
            return process.wait(timeout=REMIND_S)
        except subprocess.TimeoutExpired:
            return None

    def _phase(self, start: int, total: int) -> str:
        """How far pip is, by what it has written since `start`."""
        written = self._log.read_bytes()[start:]
        if b"Installing collected packages" in written:
            return ", unpacking"
        return f", {written.count(b'Collecting ')} of {total} packages found"


def main(arguments: list[str]) -> int:
    """Makes the environments that were asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Creates the environments of celloop from their lock files.")
    parser.add_argument("names", nargs="*", metavar="app|labelstudio", help="default: both")
    parser.add_argument("--torch", choices=("auto", "cpu", "gpu"), default="auto", help="default: by nvidia-smi")
    given = parser.parse_args(arguments)
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is run by whatever Python there is
        raise InstallError(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]} ({sys.executable})")
    names = given.names or list(DIRECTORIES)
    unknown = [name for name in names if name not in DIRECTORIES]
    if unknown:
        raise InstallError(f"no environment is called {unknown[0]}; there are {', '.join(DIRECTORIES)}")
    lock = os.open(str(ROOT / "requirements"), os.O_RDONLY)
    try:
        wait_for_turn(lock)
        with ThreadPoolExecutor(len(names)) as pool:
            for done in [pool.submit(Environment(name).ensure, given.torch) for name in names]:
                done.result()
    finally:
        os.close(lock)
    return 0


def wait_for_turn(lock: int) -> None:
    """Takes the lock that another set-up in this folder may hold; it is free again when its file is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another set-up is running in this folder; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InstallError as error:
        sys.stderr.write(f"set-up: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("set-up: interrupted; run it again to start over\n")
        sys.exit(130)
