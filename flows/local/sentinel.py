"""Waits for the end of `celloop up` and clears up after it when it could not do so itself (SIGKILL, out of memory).

Started as `python -m flows.local.sentinel RUN_ID` with a pipe as standard input. The pipe closes when its parent
ends; "done" in it means that the parent has stopped everything already.
"""

import signal
import sys

from flows.local.processes import sweep


def watch(run_id: str) -> None:
    """Blocks until the parent is gone, then ends what it left behind."""
    if sys.stdin.read().strip() != "done":
        sweep(run_id)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watch(sys.argv[1])
