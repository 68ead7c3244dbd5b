"""The most memory that a set of processes holds at once, sampled from outside while they work.

A MB here is 2**20 bytes, as in `celloop status`.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

import psutil

from flows.local.processes import marked
from flows.local.workspace import Workspace

MB = 2**20


class Share(NamedTuple):
    """What one process holds (PSS, MB), and the process that started it."""

    parent: int
    mb: float


class PeakMemory:
    """Samples from its own thread between entering and leaving a `with` block.

    `peak_mb` counts a page that several processes share once (PSS), `peak_resident_mb` once for each of them (RSS):
    the first is what the machine must have. `at_peak` tells the share of each process id when `peak_mb` was seen.
    One sample of a dozen processes costs about 0.1 s of one core.

    Args:
        processes: which processes to look at; asked anew for each sample.
        every_s: pause between two samples, s.
    """

    def __init__(self, processes: Callable[[], Sequence[psutil.Process]], every_s: float = 1.0) -> None:
        self.peak_mb = self.peak_resident_mb = 0.0
        self.at_peak: dict[int, Share] = {}
        self.samples = 0
        self._processes = processes
        self._every_s = every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self._sample()
            self._done.wait(self._every_s)

    def _sample(self) -> None:
        shares, resident = dict[int, Share](), 0.0
        for process in self._processes():
            try:
                memory, parent = process.memory_full_info(), process.ppid()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            shares[process.pid] = Share(parent, memory.pss / MB)
            resident += memory.rss / MB
        self.samples += 1
        self.peak_resident_mb = round(max(self.peak_resident_mb, resident), 1)
        total = round(sum(share.mb for share in shares.values()), 1)
        if total > self.peak_mb:
            self.peak_mb, self.at_peak = total, shares


def family(root: psutil.Process, workspace: Workspace) -> list[psutil.Process]:
    """A process, all its descendants, and the services of a workspace whoever their parent is; [] when all ended."""
    try:
        found = {process.pid: process for process in (root, *root.children(recursive=True))}
    except psutil.NoSuchProcess:
        found = {}
    state = workspace.state()
    if state is not None:
        found |= {process.pid: process for process in marked(state.run_id)}
    return list(found.values())
