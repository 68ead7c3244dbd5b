"""Which project a request means: the index is asked each time, its last answer is kept for when it is slow or away."""

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from backend.errors import UnknownProjectError
from loop.adapters.index import ProjectRow

logger = logging.getLogger(__name__)

RECENT_S = 1.0


class ProjectIndex(Protocol):
    """What the backend needs of the index (loop.adapters.index.Index)."""

    def projects(self) -> Sequence[ProjectRow]:
        """All projects."""


class Projects:
    """Projects by their id in Label Studio.

    All of them are read each time (there are few): so "unknown" is told apart from an index that fails.
    """

    def __init__(self, index: ProjectIndex) -> None:
        self._index = index
        self._last: dict[int, ProjectRow] = {}
        self._found: dict[int, float] = {}

    def recent(self, ls_project_id: int) -> ProjectRow:
        """The project as it was at most a second ago; `find` where nobody has asked since.

        Label Studio calls /setup, which always asks, before each batch: so both name the same version.

        Raises:
            UnknownProjectError: the index has no such project.
        """
        last = self._last.get(ls_project_id)
        if last is not None and time.monotonic() - self._found.get(ls_project_id, -RECENT_S) < RECENT_S:
            return last
        return self.find(ls_project_id)

    def find(self, ls_project_id: int) -> ProjectRow:
        """The project as the index has it now, or as it had it last where the index fails.

        Raises:
            UnknownProjectError: the index has no such project.
        """
        try:
            rows = self._index.projects()
        except Exception as error:
            last = self._last.get(ls_project_id)
            if last is None:
                raise
            logger.warning("index fails (%s: %s); project %s as of before", type(error).__name__, error, last.name)
            return last
        row = next((row for row in rows if row.ls_project_id == ls_project_id), None)
        if row is None:
            self._last.pop(ls_project_id, None)
            raise UnknownProjectError(
                f"Label Studio project {ls_project_id} is none of this loop's; attach this backend only to projects "
                "made by `celloop init`, or look at CELLOOP_INDEX_URL"
            )
        self._last[ls_project_id] = row
        self._found[ls_project_id] = time.monotonic()
        return row

    def name_of(self, ls_project_id: int) -> str | None:
        """The project's name, or None where the index has no such project."""
        try:
            return self.find(ls_project_id).name
        except UnknownProjectError:
            return None

    def last(self, ls_project_id: int) -> ProjectRow | None:
        """The last answer of the index for this project, without asking."""
        return self._last.get(ls_project_id)

    def all(self) -> Sequence[ProjectRow]:
        """Every project, or those seen last where the index fails."""
        try:
            return self._index.projects()
        except Exception as error:
            logger.warning("index fails (%s: %s); projects as of before", type(error).__name__, error)
            return tuple(self._last.values())


def version_string(row: ProjectRow, held: str | None) -> str:
    """The version that /setup and /predict name, never empty.

    Args:
        row: the project.
        held: label of the model in service, None for none.

    Returns:
        What is published in Label Studio where the held model made it, so that Label Studio does not ask again for
        tasks that have it; else the held model's label. Without a model: what is published (Label Studio has it
        already), else "celloop-<project>-r0".
    """
    if held is not None:
        return row.published_version if row.published_version and row.published_model == held else held
    return row.published_version or f"celloop-{row.name}-r0"
