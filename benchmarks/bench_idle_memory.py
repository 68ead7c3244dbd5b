"""Memory of each service of `celloop up` when nobody works, and the seconds of the first and of the second start.

Starts its own services in a new workspace, on free ports; about two minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import psutil
from harness import report

from flows.local.launch import start_in_background, stop
from flows.local.processes import memory_bytes
from flows.local.site import UpOptions
from flows.local.status import read_status
from flows.local.workspace import Workspace


def quiet(text: str) -> None:
    """Hears nothing."""


def started(workspace: Workspace) -> float:
    """Seconds until all services are well."""
    begin = time.perf_counter()
    start_in_background(workspace, UpOptions(), quiet)
    return round(time.perf_counter() - begin, 1)


def measure(workspace: Workspace, idle_s: float) -> dict[str, float]:
    """MB (2**20 bytes) a service after `idle_s` seconds without work; shared pages are split between their users."""
    time.sleep(idle_s)
    status = read_status(workspace)
    figures = {f"{service.name}_mb": service.memory_mb or 0.0 for service in status.services}
    supervisor = psutil.Process(status.supervisor_pid)
    children = [item.pid for item in supervisor.children() if "flows.local.sentinel" in " ".join(item.cmdline())]
    own = supervisor.memory_full_info().pss + sum(memory_bytes(psutil.Process(pid)) for pid in children)
    figures["supervisor_mb"] = round(own / 2**20, 1)
    figures["total_mb"] = round(sum(figures.values()), 1)
    return figures


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to wait before measuring")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "ws")
        try:
            first_s = started(workspace)
            figures = measure(workspace, given.idle)
            stop(workspace, quiet)
            second_s = started(workspace)
        finally:
            stop(workspace, quiet)
    report("idle_memory", **figures, first_start_s=first_s, second_start_s=second_s, idle_s=given.idle)


if __name__ == "__main__":
    main()
