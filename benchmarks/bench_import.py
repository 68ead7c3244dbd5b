"""Import of 1,000 images of 256 x 256 px into Label Studio, as `celloop init` does it, with progress on standard error.

Draws the images, starts its own services in a new workspace, and makes one project through flows.start. The display
step (the PNG that Label Studio shows), which uses four threads, stands beside the same work done by one thread before
and after it in the same run. About three minutes.

    python benchmarks/bench_import.py --images 1000
"""

import argparse
import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from harness import report
from memory import PeakMemory, family

from flows.cli.progress import Teller, telling
from flows.local.launch import start_in_background, stop
from flows.local.site import UpOptions
from flows.local.workspace import Workspace
from flows.start import start_project
from loop.config import LoopConfig
from loop.data.display import write_display
from loop.data.folder import open_folder
from loop.data.store import write_png
from loop.data.synthetic import draw_cells

SIDE, DRAWN = 256, 16


class Clock:
    """Passes progress on and remembers when each step first and last spoke, s since the clock was made."""

    def __init__(self, teller: Teller) -> None:
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.calls = 0
        self._teller = teller
        self._start = time.perf_counter()

    def __call__(self, step: str, done: int, total: int) -> None:
        """As the teller it was made from."""
        self.first.setdefault(step, self.now())
        self.last[step] = self.now()
        self.calls += 1
        self._teller(step, done, total)

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


def quiet(text: str) -> None:
    """Hears nothing."""


@contextmanager
def running(workspace: Workspace) -> Iterator[None]:
    """The services of `workspace`, stopped at the end whatever happens."""
    try:
        start_in_background(workspace, UpOptions(), quiet)
        yield
    finally:
        stop(workspace, quiet)


def write_images(folder: Path, n: int, seed: int) -> float:
    """Writes `n` different PNGs below `folder`; a few drawn pictures, shifted, with noise of their own.

    Returns:
        Their size together, MB (1e6 bytes).
    """
    rng = np.random.default_rng(seed)
    drawn = [draw_cells(rng, shape=(SIDE, SIDE), n=12).pixels for _ in range(DRAWN)]
    for i in range(n):
        shifted = np.roll(drawn[i % DRAWN], rng.integers(0, SIDE, 2), axis=(0, 1))
        noisy = shifted + rng.normal(0, 3, shifted.shape)
        write_png(noisy.clip(0, 255).astype(np.uint8), folder / f"made-{i:05d}.png")
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1)


def one_thread_s(images: Path, target: Path) -> float:
    """Seconds in which one thread writes what Label Studio shows of each image."""
    start = time.perf_counter()
    for path in sorted(images.iterdir()):
        write_display(path, target / path.name)
    return time.perf_counter() - start


def import_s(workspace: Workspace, images: Path) -> dict[str, float]:
    """Seconds by step of one import, and how often progress was told.

    `read_s`: the folder is read and checked, the project made; `display_s`: PNGs; `tasks_s`: storage and tasks;
    `rest_s`: index, backend, webhook.
    """
    with telling() as teller:
        clock = Clock(teller)
        done = start_project(workspace, images, "bench-import", LoopConfig(), tell=clock)
        whole = clock.now()
    if done.problems:
        raise SystemExit(f"{len(done.problems)} images were left out, the first: {done.problems[0]}")
    displayed, tasks = clock.last["images"], clock.last["tasks"]
    return {
        "import_s": whole,
        "read_s": clock.first["images"],
        "display_s": displayed - clock.first["images"],
        "tasks_s": tasks - displayed,
        "rest_s": whole - tasks,
        "progress_calls": clock.calls,
    }


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.pop("CELLOOP_INDEX_URL", None)  # the index must lie in the new workspace
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder, workspace = Path(name), Workspace(Path(name) / "ws")
        images = folder / "images"
        size_mb = write_images(images, given.images, given.seed)
        with running(workspace):
            before_s = one_thread_s(images, folder / "one-thread-before")
            with PeakMemory(lambda: family(psutil.Process(), workspace)) as memory:
                steps = import_s(workspace, images)
            after_s = one_thread_s(images, folder / "one-thread-after")
            start = time.perf_counter()
            open_folder(images, labels=False)
            folder_s = time.perf_counter() - start
    one_s = (before_s + after_s) / 2
    report(
        "import",
        images=given.images,
        side_px=SIDE,
        size_mb=size_mb,
        images_per_s=round(given.images / steps["import_s"], 1),
        **{name: round(value, 3) for name, value in steps.items()},
        of_which_folder_s=round(folder_s, 3),
        display_one_thread_s=[round(before_s, 3), round(after_s, 3)],
        display_times_faster=round(one_s / steps["display_s"], 2),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        peak_with_services_mb=memory.peak_mb,
        seed=given.seed,
        load_before=round(load, 2),
    )


if __name__ == "__main__":
    main()
