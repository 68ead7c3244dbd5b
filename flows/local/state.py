"""What runs in a workspace: process ids with their start times, addresses, ports; one small JSON file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.local.processes import ProcessId
from loop.errors import StateError


@dataclass(frozen=True)
class State:
    """The last `celloop up` of a workspace; ports and addresses outlive it, so that the next one takes them again.

    Attributes:
        run_id: marks every process of this run (flows/local/processes.py).
        supervisor: the process that started the others.
        ready: whether everything answered.
        started_at: ISO 8601, UTC.
        ports: service name to port.
        urls: service name to base URL, without a trailing slash.
        processes: service name to process.
        label_studio_managed: False where an existing Label Studio is used.
    """

    run_id: str
    supervisor: ProcessId
    ready: bool
    started_at: str
    ports: dict[str, int]
    urls: dict[str, str]
    processes: dict[str, ProcessId] = field(default_factory=dict)
    label_studio_managed: bool = True

    def is_running(self) -> bool:
        """Whether the supervisor that wrote this is alive."""
        return self.supervisor.is_alive()


def load_state(path: Path) -> State | None:
    """The state in `path`; None where there is no such file.

    Raises:
        StateError: the file is not what `save_state` wrote.
    """
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        processes = {name: ProcessId(**value) for name, value in given.pop("processes").items()}
        return State(supervisor=ProcessId(**given.pop("supervisor")), processes=processes, **given)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"{path} cannot be read ({type(error).__name__}); delete it when no celloop process is running"
        ) from error


def save_state(path: Path, state: State) -> None:
    """Writes `state`, whole or not at all.

    Raises:
        StateError: the disk is full or the folder is not writable.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}; make room or choose another --workspace") from error
