"""The settings of a project as its person may edit them, read again when the file changes.

A file that cannot be read leaves the last good settings in force, so that a slip of the pen never stops a click.
"""

import logging
import threading
from pathlib import Path

from loop.config import LoopConfig, load_config
from loop.errors import ConfigError

logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]


class ProjectSettings:
    """Settings by project name: `directory`/PROJECT.yaml, the defaults where there is no such file or directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._default = LoopConfig()
        self._known: dict[str, tuple[_Stamp | None, LoopConfig]] = {}

    def of(self, project: str) -> LoopConfig:
        """The settings of a project now; costs one look at the file's time, size and number."""
        if self._directory is None:
            return self._default
        path = self._directory / f"{project}.yaml"
        try:
            status = path.stat()
            changed: _Stamp | None = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            changed = None
        with self._lock:
            known = self._known.get(project)
            if known is not None and known[0] == changed:
                return known[1]
            config = known[1] if known is not None else self._default
            if changed is not None:
                try:
                    config = load_config(path)
                except (ConfigError, UnicodeDecodeError) as error:
                    logger.warning("settings of %s stay as they were: %s", project, error)
            self._known[project] = (changed, config)
            return config
