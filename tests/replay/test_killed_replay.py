"""Real trainings in real processes: the same again, killed or not."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from replay_stage import drawn_folder, plan

from loop.replay import jobs
from loop.replay.jobs import ReplayJob, replay

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_killed_replay import job_on
from loop.replay.jobs import replay
replay(job_on(Path({data!r})), Path({out!r}), workers=1)
"""


def job_on(data):
    return ReplayJob(data, plan(rounds=4), ("random", "entropy"), (0,))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_by_a_signal_it_leaves_no_process_and_goes_on_to_the_same_end(
    tmp_path, monkeypatch, one_thread, inline_pool
):
    splits = {**dict.fromkeys(["a", "b", "c", "d", "e", "f", "g", "h", "i"], "pool"), "x": "test", "y": "test"}
    job = job_on(drawn_folder(tmp_path / "data", splits))
    out = tmp_path / "out"
    script = SCRIPT.format(here=os.path.dirname(__file__), data=str(job.data), out=str(out))
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        until = time.monotonic() + 120
        while not list(out.glob("rounds/*/*.json")):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        workers = psutil.Process(child.pid).children(recursive=True)
        assert workers
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert alive == []
    kept = {path: path.read_text() for path in out.glob("rounds/*/*.json")}
    assert len(kept) < 9

    resumed = replay(job, out)
    assert {path: path.read_text() for path in kept} == kept
    whole = replay(job, tmp_path / "whole")
    assert resumed == whole
    assert whole["strategies"]["random"] != whole["strategies"]["entropy"]
    figures = {"ap", "macro_ap", "ap50", "ap75", "f1", "pq", "aji", "dice", "iou", "count_error"}
    assert figures | {"n_images", "n_gt", "n_pred"} <= set(whole["full"])
    assert (whole["full"]["n_images"], whole["full"]["n_gt"]) == (2, 8)

    looked = replace(job, plan=plan(rounds=2, embedding="look", passes="turns", n_passes=2, measure="bald"))
    monkeypatch.setattr(jobs, "_bench", [])
    found = replay(replace(looked, strategies=("bald", "typical")), tmp_path / "looked")
    assert [run["images"] for entry in found["strategies"].values() for run in entry["seeds"]] == [[2, 4], [2, 4]]
