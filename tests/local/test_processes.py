import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from flows.local.processes import (
    RUN_MARK,
    ProcessId,
    marked,
    memory_bytes,
    spawn,
    stop_groups,
    sweep,
    tail,
)

# a process that hides a child in a session of its own, as Prefect's worker does with flow runs
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def start(code: str, run_id: str, log: Path) -> subprocess.Popen[bytes]:
    process = spawn([sys.executable, "-c", code], {**os.environ, RUN_MARK: run_id}, log)
    deadline = time.monotonic() + 20
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_sweep_ends_children_in_sessions_of_their_own(tmp_path: Path) -> None:
    process = start(PARENT, "run-a", tmp_path / "log")
    child = int((tmp_path / "log").read_text())
    assert {found.pid for found in marked("run-a")} == {process.pid, child}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert {found.pid for found in marked("run-a")} == {child}
    assert sweep("run-a") == 1
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert sweep("run-a") == 0


def test_sweep_spares_a_service_but_not_what_it_started_in_another_session(tmp_path: Path) -> None:
    process = start(PARENT, "run-h", tmp_path / "log")
    child = ProcessId.of(int((tmp_path / "log").read_text()))
    try:
        assert sweep("run-h", spare_sessions=[process.pid]) == 1
        assert not child.is_alive()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_sweep_kills_what_ignores_sigterm_and_leaves_others_alone(tmp_path: Path) -> None:
    stubborn = start(STUBBORN, "run-b", tmp_path / "b.log")
    other = start(STUBBORN, "run-c", tmp_path / "c.log")
    try:
        identity = ProcessId.of(stubborn.pid)
        assert sweep("run-b", patience_s=0.3) == 1
        assert not identity.is_alive()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        stubborn.wait()


def test_stop_groups_asks_then_kills(tmp_path: Path) -> None:
    polite = start("import time; print(1, flush=True); time.sleep(600)", "run-d", tmp_path / "d.log")
    stubborn = start(STUBBORN, "run-d", tmp_path / "e.log")
    stop_groups([polite, stubborn], patience_s=0.5)
    assert (polite.returncode, stubborn.returncode) == (-signal.SIGTERM, -signal.SIGKILL)


def test_stop_groups_in_a_hurry_does_not_wait(tmp_path: Path) -> None:
    stubborn = start(STUBBORN, "run-e", tmp_path / "log")
    begin = time.monotonic()
    stop_groups([stubborn], patience_s=60, hurry=lambda: True)
    assert time.monotonic() - begin < 10


def test_a_process_is_known_by_its_start_and_a_zombie_is_dead(tmp_path: Path) -> None:
    process = start(STUBBORN, "run-f", tmp_path / "log")
    identity = ProcessId.of(process.pid)
    assert identity.is_alive()
    assert not ProcessId(process.pid, identity.create_time - 100).is_alive()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, not yet reaped
    assert not identity.is_alive()
    process.wait()
    assert not identity.is_alive()
    assert not ProcessId.of(process.pid).is_alive()


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from flows.local.processes import spawn
child = spawn([sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ), Path({str(tmp_path)!r}) / "log")
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert reply.returncode == -signal.SIGKILL, reply.stderr
    child = int(reply.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_log_of_the_run_before_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    for word in ("first", "second"):
        spawn([sys.executable, "-c", f"print({word!r})"], dict(os.environ), log).wait()
    assert (log.read_text(), (tmp_path / "x.log.1").read_text()) == ("second\n", "first\n")


def test_tail_is_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert tail(log) == ""
    log.write_bytes(b"\n".join(b"line %d" % i for i in range(10_000)) + b"\n\xff")
    assert tail(log, 2) == "line 9999\n\ufffd"


def test_memory_counts_descendants(tmp_path: Path) -> None:
    process = start(PARENT, "run-g", tmp_path / "log")
    try:
        alone = psutil.Process(int((tmp_path / "log").read_text()))
        deadline = time.monotonic() + 20
        while memory_bytes(alone) <= 2**20 and time.monotonic() < deadline:  # it may not have become Python yet
            time.sleep(0.05)
        both = memory_bytes(psutil.Process(process.pid))
        assert both > memory_bytes(alone) > 2**20
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        sweep("run-g")
