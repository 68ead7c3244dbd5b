"""Several people at one batch: who labels which image, the tab that shows each his own, and second labels."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flows.context import LoopContext
from flows.select import seed_of
from loop.acquisition.deal import deal
from loop.adapters.index import ImageRow
from loop.adapters.label_studio_api import LOWEST_SCORE_FIRST, NOT_YET_ANNOTATED
from loop.errors import ConfigError
from loop.types import Selection

logger = logging.getLogger(__name__)

TAB = "Batch for "
"""A person's tab is called so, with the login behind it."""


def dealt(
    context: LoopContext, round_number: int, batch: Sequence[Selection], rows: Sequence[ImageRow]
) -> dict[str, str]:
    """Image id -> the logins of those who label it, as the index and the task's data hold them; {} without any.

    The same for the same batch, people and expected seconds, so that a round that is published again deals alike.

    Raises:
        ConfigError: a login is empty or holds spaces or brackets.
        InputError: a login is named twice.
    """
    settings = context.config.select
    seconds = {row.image_id: row.seconds for row in rows if row.seconds}
    odd = [person for person in settings.annotators if not person or set(person) & set("[] \t\n")]
    if odd:
        raise ConfigError(f"select.annotators: {odd[0]!r} is no login; give e-mails or user names of Label Studio")
    rng = np.random.default_rng(seed_of(f"{context.project_name}/{round_number}/shares"))
    shares = deal(batch, settings.annotators, overlap=settings.overlap, seconds=seconds, rng=rng)
    return {image_id: " ".join(_tag(person) for person in people) for image_id, people in shares.items()}


def second_labels(context: LoopContext, rows: Sequence[ImageRow]) -> tuple[list[ImageRow], list[ImageRow]]:
    """Of the images that one of two people has labelled: those that the other is to label, and those he never will.

    The latter because one of the two is not named in `select.annotators` any more.
    """
    shared = [row for row in rows if row.state == "labelled" and is_shared(row.annotators)]
    if not shared:
        return [], []
    done: dict[str, set[int | None]] = {}
    for annotation in context.index.annotations(context.project_name):
        done.setdefault(annotation.image_id, set()).add(annotation.completed_by)
    half = [row for row in shared if len(done.get(row.image_id, ())) < 2]
    named = {_tag(person) for person in context.config.select.annotators}
    waiting = [row for row in half if named.issuperset(row.annotators.split())]
    return waiting, [row for row in half if row not in waiting]


def release(context: LoopContext) -> None:
    """Images whose second person is not named any more count as labelled, in Label Studio too."""
    _, alone = second_labels(context, context.index.images(context.project_name, state="labelled"))
    if not alone:
        return
    tasks = {row.task_id for row in alone}
    for task in list(context.label_studio.tasks(context.project.ls_project_id)):
        if task.id in tasks:
            context.label_studio.set_task_data(task.id, {**task.data, "annotators": ""}, people=1)
    context.index.set_images(context.project_name, {row.image_id: {"annotators": ""} for row in alone})


def is_shared(annotators: str) -> bool:
    """Whether two people are to label an image, by what the index holds of it."""
    return len(annotators.split()) > 1


def set_tabs(context: LoopContext, columns: Sequence[str], widths: Mapping[str, int]) -> None:
    """One tab for each of `select.annotators` with the tasks that are his and that he has not done, in rank order.

    His button there is "Label Tasks As Displayed"; "Label All Tasks" takes no notice of tabs. Tabs of people who are
    not named any more are deleted; where nobody ever was, Label Studio is not asked. Somebody whom Label Studio does
    not know yet is named in the log; until a later round finds him, his tab loses a task of two people when the first
    of them has labelled it.
    """
    studio, project = context.label_studio, context.project.ls_project_id
    people = context.config.select.annotators
    if not people and not any(row.annotators for row in context.index.images(context.project_name)):
        return
    known = studio.people() if people else {}
    for person in people:
        number = known.get(person.lower())
        if number is None:
            logger.warning("Label Studio knows nobody of the login %s; has he signed up there?", person)
        shown = _filters(person, number)
        studio.set_tab(project, TAB + person, LOWEST_SCORE_FIRST, shown, columns=columns, widths=widths)
    wanted = {TAB + person for person in people}
    for title in studio.tab_titles(project):
        if title.startswith(TAB) and title not in wanted:
            studio.remove_tab(project, title)


def _filters(person: str, number: int | None) -> dict[str, Any]:
    mine = _item("data.annotators", "contains", "String", _tag(person))
    not_done = [_item("annotators", "not_contains", "List", number)] if number else NOT_YET_ANNOTATED["items"]
    return {"conjunction": "and", "items": [mine, *not_done]}


def _item(column: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}


def _tag(person: str) -> str:
    """In brackets, so that the filter for ann@lab.org does not find joann@lab.org."""
    return f"[{person}]"
