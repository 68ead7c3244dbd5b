"""Processes: started so that they cannot outlive us, found again by a mark that all their children inherit.

Every process of a run carries RUN_MARK=<run id> in its environment, and its children inherit it whatever session or
parent they have. So ending a run is: ask the process groups, then end whatever still bears the mark.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

RUN_MARK = "CELLOOP_RUN_ID"
PR_SET_PDEATHSIG = 1
SAME_START_S = 0.05


@dataclass(frozen=True)
class ProcessId:
    """A process id with the time it began, since the system gives ids out again."""

    pid: int
    create_time: float

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """The identity of the running process `pid`; one that has just ended gets a start time that never matches."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return cls(pid, -1.0)

    def process(self) -> psutil.Process | None:
        """The live process, or None when it has ended, is a zombie, or its id belongs to another one now."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.create_time) < SAME_START_S
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        return self.process() is not None


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts `command` in a session of its own, without a terminal, writing to `log`; the log before it is kept as .1.

    The child gets SIGTERM when the calling thread ends, however it ends. Call it from the main thread.

    Raises:
        OSError: the program does not exist or the log cannot be written.
    """
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    with log.open("wb") as output:
        return subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_dies_with_parent(),
        )


def _dies_with_parent() -> Callable[[], None] | None:
    """What a forked child calls so that the kernel ends it with its parent; None where the kernel cannot."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def marked(run_id: str) -> list[psutil.Process]:
    """Every live process of this user that belongs to a run, ourselves left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(RUN_MARK) == run_id:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            continue
    return found


def sweep(run_id: str, *, patience_s: float = 5.0, spare_sessions: Iterable[int] = ()) -> int:
    """Ends every process of a run: SIGTERM, and SIGKILL after `patience_s`; repeated for those born meanwhile.

    Args:
        run_id: whose mark they bear.
        patience_s: how long they may take to end by themselves.
        spare_sessions: ids of the processes that `spawn` started and that are left alone, with all that is in their
            session. Prefect's worker gives each flow run a session of its own, so flow runs are not spared with it.

    Returns:
        How many processes were found.
    """
    ended = 0
    spared = set(spare_sessions)
    for wait_s in (patience_s, 1.0, 1.0):
        alive = [process for process in marked(run_id) if _session(process) not in spared]
        if not alive:
            break
        ended += len(alive)
        _signal(alive, signal.SIGTERM if wait_s == patience_s else signal.SIGKILL)
        _, left = psutil.wait_procs(alive, timeout=wait_s)
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=wait_s)
    return ended


def _session(process: psutil.Process) -> int:
    """The id of a process's session; -1 where the process has just ended."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


def _signal(processes: Iterable[psutil.Process], sign: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(sign)
        except psutil.NoSuchProcess:
            continue


def signal_group(process: subprocess.Popen[bytes], sign: signal.Signals) -> None:
    """Sends `sign` to a process that `spawn` started and to its group; nothing where all of them have ended."""
    try:
        os.killpg(process.pid, sign)
    except ProcessLookupError:
        return


def stop_groups(
    processes: Iterable[subprocess.Popen[bytes]], *, patience_s: float, hurry: Callable[[], bool] = lambda: False
) -> None:
    """Ends processes that `spawn` started, and their groups: SIGTERM, then SIGKILL after `patience_s` or on `hurry`."""
    running = list(processes)
    for process in running:
        signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while any(process.poll() is None for process in running) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    for process in running:
        signal_group(process, signal.SIGKILL)
        process.wait(timeout=10)


def memory_bytes(process: psutil.Process) -> int:
    """Memory of a process and all its descendants; pages that several share are split between them (PSS)."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += int(member.memory_full_info().pss)
        except (psutil.AccessDenied, AttributeError):
            total += int(member.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return total


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, "" where there is none; the first line names the file when lines were left out."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(text[-lines:])
