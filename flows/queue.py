"""Whether people are served what the index says, in its order: asked of Label Studio after each publish."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from flows.context import LoopContext
from loop.adapters.index import ImageRow, Index
from loop.adapters.label_studio_api import PROJECT_SETTINGS, LabelStudio, QueueState

logger = logging.getLogger(__name__)

FIRST: Final = 100
"""So many tasks are looked at one by one, or the whole batch where it is larger."""
NAMED: Final = 5
"""A fault names so many tasks and counts the rest."""

Kind = Literal["unfinished", "version", "sampling", "strange", "nameless", "doubled", "missing", "order"]

BY_PUBLISHING: Final = frozenset[Kind]({"unfinished", "version", "strange", "doubled", "missing", "order"})
"""What is right again once predictions are published anew. The way of sampling is a setting of the project, and what
has no version Label Studio cannot delete: a round that was made because of these would be made for ever."""


@dataclass(frozen=True)
class QueueFault:
    """One thing that is wrong with a queue; `text` names the tasks.

    `kind`: a round was interrupted; the project names another version, or samples otherwise; it has predictions of a
    version that is not published, or without one; a task has several of one version, or none; the order is not the
    index's.
    """

    kind: Kind
    text: str


@dataclass(frozen=True)
class QueueReport:
    """What a look at a queue found; `batch` is how many tasks of the batch are still to be served."""

    published: str
    batch: int
    faults: tuple[QueueFault, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """The faults as a person reads them."""
        return tuple(f"queue: {fault.text}" for fault in self.faults)


def verify_queue(context: LoopContext) -> QueueReport:
    """Compares what Label Studio serves with what the index says; each fault is a warning in the log.

    Changes nothing, and raises for a fault nothing: `celloop doctor --mend` and the next round put it right. Costs five
    small requests; one for each task with several predictions where there are any.

    Raises:
        UnreachableError, RefusedError: Label Studio does not answer, or has no such project.
    """
    report = look_at_queue(context.label_studio, context.index, context.project_name)
    for line in report.lines:
        logger.warning("project %s: %s", context.project_name, line)
    if not report.faults:
        logger.info("project %s serves its batch of %d in order", context.project_name, report.batch)
    return report


def look_at_queue(studio: LabelStudio, index: Index, name: str) -> QueueReport:
    """The faults of a project's queue, none where nothing is published or open.

    What a person has annotated or skipped since the index was brought up to date is no fault. Of the tasks behind the
    batch only that they have one prediction each is looked at, and that no two of the first FIRST share a score.

    Raises:
        As `verify_queue`.
    """
    project = index.project(name)
    rows = [row for row in index.images(name, state="open") if row.task_id is not None and row.score is not None]
    if not project.published_version or not rows:
        return QueueReport(project.published_version, 0)
    batch = sorted((row for row in rows if row.rank is not None), key=lambda row: row.rank or 0)
    state = studio.queue(project.ls_project_id, first=max(FIRST, len(batch) + 1))
    published, unfinished = project.published_version, unfinished_endings(index, name)
    if state.version != published and state.version.endswith(unfinished):
        text = f"a round was interrupted right after it had published {state.version!r}; run `celloop round` to end it"
        return QueueReport(published, len(batch), (QueueFault("unfinished", text),))
    faults = [*_settings(state, published), *_strange(state, published, unfinished)]
    if state.version == published:
        faults += _predictions(studio, project.ls_project_id, state, rows)
        first = {task.id for task in state.first}
        absent = [row.task_id or 0 for row in batch if row.task_id not in first]
        there = studio.queued_tasks(project.ls_project_id, absent) if absent else {}
        behind = {number for number, task in there.items() if not task.touched and task.score is not None}
        faults += _order(state, rows, [row for row in batch if row.task_id in first | behind])
    return QueueReport(published, len(batch), tuple(faults))


def unfinished_endings(index: Index, name: str) -> tuple[str, ...]:
    """How the versions end that an interrupted round was publishing; its predictions are used when it is resumed."""
    return tuple(f"-r{row.number}" for row in index.rounds(name) if row.status == "running")


def _settings(state: QueueState, published: str) -> list[QueueFault]:
    faults = []
    if state.version != published:
        found = f"the version {state.version!r}" if state.version else "no version"
        faults.append(
            QueueFault("version", f"the project names {found} and not {published!r}, so tasks come in random order")
        )
    if state.sampling != PROJECT_SETTINGS["sampling"]:
        wanted = PROJECT_SETTINGS["sampling"]
        faults.append(QueueFault("sampling", f"the project is set to {state.sampling!r} and not to {wanted!r}"))
    return faults


def _strange(state: QueueState, published: str, unfinished: tuple[str, ...]) -> list[QueueFault]:
    """Versions that nothing knows; that of a round which was interrupted while publishing is still wanted."""
    faults = []
    strange = strange_versions(state, published, unfinished)
    if strange:
        listed = ", ".join(f"{state.versions[name]} of {name!r}" for name in strange)
        faults.append(QueueFault("strange", f"predictions of versions that are not published: {listed}"))
    if state.versions.get(""):
        text = f"predictions of versions that are not published: {state.versions['']} of ''"
        faults.append(QueueFault("nameless", text))
    return faults


def strange_versions(state: QueueState, published: str, unfinished: tuple[str, ...]) -> list[str]:
    """The stored versions by name that are neither published nor, by their ending, of an unfinished round."""
    return sorted(name for name in state.versions if name not in ("", published) and not name.endswith(unfinished))


def _predictions(studio: LabelStudio, number: int, state: QueueState, rows: Sequence[ImageRow]) -> list[QueueFault]:
    """Whether each task has exactly one prediction of the project's version."""
    faults = []
    if state.versions.get(state.version, 0) > state.scored:
        doubled = studio.doubled_predictions(number, state.version)
        if doubled:
            text = f"several predictions of one version in {_named(list(doubled), rows)}"
            faults.append(QueueFault("doubled", text))
    unscored = set(state.unscored)
    missing = [row.task_id for row in rows if row.task_id in unscored]
    if missing:
        faults.append(QueueFault("missing", f"no prediction with a score in {_named(missing, rows)}"))
    return faults


def _order(state: QueueState, rows: Sequence[ImageRow], batch: Sequence[ImageRow]) -> list[QueueFault]:
    """Whether the batch comes first and in its order, and no two of the first tasks share a score."""
    faults = []
    known = {row.task_id for row in rows}
    served = [task for task in state.first if task.id in known]
    wanted = [row.task_id or 0 for row in batch]
    wrong = [task.id for task, expected in zip(served, wanted, strict=False) if task.id != expected]
    wrong += wanted[len(served) :]
    if wrong:
        faults.append(QueueFault("order", f"the batch is not served by rank: {_named(wrong, rows)}"))
    equal = [task.id for task, after in pairwise(served) if task.score == after.score]
    if equal:
        faults.append(QueueFault("order", f"the same score as the next one in {_named(equal, rows)}"))
    return faults


def _named(tasks: Sequence[int | None], rows: Sequence[ImageRow]) -> str:
    """Tasks by number and image, the first few."""
    image_of = {row.task_id: row.image_id for row in rows}
    shown = [f"task {task} ({image_of.get(task, 'no image of the project')})" for task in tasks[:NAMED]]
    more = len(tasks) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
