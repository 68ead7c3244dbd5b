"""What every benchmark shares: timing after a warm-up, peak memory, and one JSON line that says where it was measured.

Run a benchmark as a script from anywhere: `python benchmarks/bench_polygons.py`.
"""

import json
import os
import platform
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


def time_ms(fn: Callable[[], Any], repeats: int, *, warmup: int = 1) -> dict[str, float]:
    """Wall-clock times of `fn`, called `warmup` times unmeasured and `repeats` times measured, ms.

    On a GPU the clock stops only when the device is idle again.

    Returns:
        {"ms_p50", "ms_p95", "repeats"}, ready for `report(what, **time_ms(...))`.
    """
    for _ in range(warmup):
        fn()
    _synchronise()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        _synchronise()
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times, [50, 95])
    return {"ms_p50": round(float(p50), 3), "ms_p95": round(float(p95), 3), "repeats": repeats}


def peak_mb(fn: Callable[[], Any]) -> float:
    """Most memory that Python and numpy hold at once while `fn` runs, beyond what they held before, MB (1e6 bytes).

    Untimed: tracing slows `fn` down. Memory inside torch, OpenCV and other libraries is not seen.
    """
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        fn()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return round((peak - before) / 1e6, 2)


def report(what: str, **figures: Any) -> None:
    """Print one JSON line: what was measured, the figures, and commit, device, versions and date of the measurement."""
    line = {
        "bench": what,
        **figures,
        "commit": commit(),
        "device": device(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    print(json.dumps(line))


def commit() -> str:
    """Short hash of the commit the code stands at, with "+changes" where files differ from it; "" outside of git."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+changes" if head and _git("status", "--porcelain") else "")


def device() -> str:
    """The GPU's name where torch sees one, else the CPU's model and the number of its cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.machine()} x{cores}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
