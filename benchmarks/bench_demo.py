"""`celloop demo` from start to end without a terminal: minutes, memory of everything that it starts, AP of each round.

Runs in a new workspace, which is deleted afterwards; about ten minutes. --config takes other settings than
configs/demo.yaml, for a quick trial.

    python benchmarks/bench_demo.py
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from harness import report
from memory import PeakMemory, family

from flows.cli.demo import SETTINGS
from flows.local.launch import stop
from flows.local.workspace import Workspace
from loop.config import load_config

PROGRAM = Path(sys.executable).parent / "celloop"
STOP_S = 90.0


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr)


def run_demo(workspace: Workspace, folder: Path, config: Path | None) -> tuple[dict[str, Any], float, PeakMemory, int]:
    """The demo's document, the minutes until its process had ended, its memory, and its process id."""
    command = [str(PROGRAM), "demo", "--json", "--workspace", str(workspace.root)]
    command += ["--config", str(config.resolve())] if config is not None else []
    environment = {**os.environ, "CELLOOP_DEMO_EXIT": "1"}
    environment.pop("CELLOOP_INDEX_URL", None)  # the index must lie in the new workspace
    output = folder / "demo.json"
    start = time.perf_counter()
    with output.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, cwd=folder)
    try:
        root = psutil.Process(process.pid)
        with PeakMemory(lambda: family(root, workspace)) as memory:
            code = process.wait()
        minutes = (time.perf_counter() - start) / 60
    finally:
        end(process)
        stop(workspace, say)
    text = output.read_text(encoding="utf-8")
    if code != 0:
        raise SystemExit(f"celloop demo ended with exit code {code}: {text.strip()}")
    return json.loads(text), minutes, memory, process.pid


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the demo where it still runs: as Ctrl-C does, so that it stops its services, and for good after a while."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def by_service(workspace: Workspace, memory: PeakMemory, demo: int) -> dict[str, float]:
    """MB at the peak of the demo's own process, of the supervisor, and of each service with what it started."""
    names = {demo: "demo"}
    state = workspace.state()
    if state is not None:
        names |= {state.supervisor.pid: "supervisor"}
        names |= {process.pid: name for name, process in state.processes.items()}
    figures = dict.fromkeys([*names.values(), "other"], 0.0)
    for pid, share in memory.at_peak.items():
        elder = pid
        while elder not in names and elder in memory.at_peak:
            elder = memory.at_peak[elder].parent
        figures[names.get(elder, "other")] += share.mb
    return {name: round(size, 1) for name, size in figures.items()}


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="settings instead of configs/demo.yaml")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        workspace = Workspace(Path(name) / "ws")
        document, minutes, memory, pid = run_demo(workspace, Path(name), given.config)
        sizes = by_service(workspace, memory, pid)
    rounds = document["rounds"]
    seed = load_config(given.config or SETTINGS).train.seed
    report(
        "demo",
        config=given.config.name if given.config else "demo.yaml",
        minutes=round(minutes, 2),
        minutes_until_table=round(document["minutes"], 2),
        peak_mb=memory.peak_mb,
        peak_resident_mb=memory.peak_resident_mb,
        processes_at_peak=len(memory.at_peak),
        at_peak_mb=sizes,
        samples=memory.samples,
        **{key: [line[key] for line in rounds] for key in ("round", "images_labelled", "cells_labelled")},
        hold_out_images=[line["hold_out_images"] for line in rounds],
        **{key: [round(line[key], 4) for line in rounds] for key in ("ap", "ap50")},
        champion_before_ap=[line["champion_ap"] for line in rounds],
        decision=[line["decision"] for line in rounds],
        seed=seed,
        load_before=round(load, 2),
    )


if __name__ == "__main__":
    main()
