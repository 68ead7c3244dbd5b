"""Label Studio through its API: projects, storage, backend, webhook, tasks, annotations, predictions, tabs.

Checked against 1.23.2. Every method that writes may be called again with the same arguments and then changes nothing.
SQLite behind Label Studio has one writer, so nothing here runs in parallel.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID
from xml.etree import ElementTree

from loop.adapters import (
    label_studio_hooks,
    label_studio_publish,
    label_studio_queue,
    label_studio_storage,
    label_studio_tabs,
    label_studio_tasks,
    label_studio_untouched,
)
from loop.adapters.label_studio_hooks import SECRET_HEADER, WEBHOOK_ACTIONS
from loop.adapters.label_studio_http import Connection, StatusError, delete
from loop.adapters.label_studio_publish import Prediction, Progress, PublishReport, TaskPrediction
from loop.adapters.label_studio_queue import QueuedTask, QueueState
from loop.adapters.label_studio_tasks import Annotation, Task
from loop.errors import InputError, RefusedError, StateError

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio as Client

__all__ = [
    "LOWEST_SCORE_FIRST",
    "MOST_INFORMATIVE",
    "NOT_YET_ANNOTATED",
    "SECRET_HEADER",
    "WEBHOOK_ACTIONS",
    "Annotation",
    "LabelStudio",
    "Prediction",
    "PublishReport",
    "QueueState",
    "QueuedTask",
    "ServerInfo",
    "Task",
    "TaskPrediction",
]

PROJECT_SETTINGS: Final[Mapping[str, Any]] = {
    "sampling": "Uncertainty sampling",
    "show_collab_predictions": True,
    "evaluate_predictions_automatically": False,
    "maximum_annotations": 1,
    "skip_queue": "REQUEUE_FOR_OTHERS",
    "show_skip_button": True,
    "enable_empty_annotation": True,
    "min_annotations_to_start_training": 0,
}
"""Lowest score first; a task opens with the prediction as an editable copy; one person a task; a skipped task goes to
somebody else; no cells at all is a valid answer; a round starts by the loop's own rule, not by Label Studio's."""

MOST_INFORMATIVE: Final = "Most informative"
LOWEST_SCORE_FIRST: Final = ("tasks:predictions_score",)
NOT_YET_ANNOTATED: Final[Mapping[str, Any]] = {
    "conjunction": "and",
    "items": [
        {"filter": f"filter:tasks:{column}", "operator": "equal", "type": "Number", "value": 0}
        for column in ("total_annotations", "cancelled_annotations")
    ],
}
"""Filter of a tab: neither annotated nor skipped."""


@dataclass(frozen=True)
class ServerInfo:
    """Label Studio's version and whose token it is."""

    version: str
    email: str


class LabelStudio:
    """A Label Studio server as celloop uses it.

    All methods raise UnreachableError without an answer, and RefusedError when the answer is no; both texts say what to
    do, and neither ever holds the token.

    Args:
        url: e.g. "http://127.0.0.1:8080".
        token: legacy token or personal access token.
        timeout_s: for one request. Label Studio on SQLite may wait half a minute for another writer.

    Raises:
        ConfigError: url or token cannot be one.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 120.0) -> None:
        self._connection = Connection(url, token, timeout_s=timeout_s)
        self._project_of: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"LabelStudio({self._connection.url!r})"

    def close(self) -> None:
        """Frees the sockets."""
        self._connection.close()

    def check(self) -> ServerInfo:
        """Version and owner of the token; the way to find out whether address and token are right.

        Raises:
            RefusedError: wrong token, legacy tokens switched off, or another program at this address.
        """
        package = getattr(self._sdk.versions.get(), "label_studio_os_package", None)
        if package is None:
            raise RefusedError(f"{self._connection.url} answers, but not as Label Studio does; give its right address")
        return ServerInfo(package["version"], self._sdk.users.whoami().email)

    def find_project(self, title: str) -> int | None:
        """The number of the project with exactly this title (the oldest of several), or None."""
        numbers: list[int] = []
        page = 1
        while True:
            found = self._sdk.projects.list(title=title, page=page, page_size=100, include="id,title")
            numbers += [int(project.id) for project in found.items or [] if project.title == title]
            if found.response.next is None:
                return min(numbers, default=None)
            page += 1

    def create_project(self, title: str, label_config: str, description: str = "") -> int:
        """A project that serves the lowest score first; the one of this title and config where there is one already.

        Raises:
            InputError: the title is not 3 to 50 characters long.
            StateError: a project of this title has another label config.
        """
        if not 3 <= len(title) <= 50:
            raise InputError(f"{title!r} has {len(title)} characters; Label Studio wants titles of 3 to 50")
        number = self.find_project(title)
        if number is None:
            made = self._sdk.projects.create(
                title=title, label_config=label_config, description=description, **PROJECT_SETTINGS
            )
            return int(made.id)
        if _canonical(self.project(number)["label_config"]) != _canonical(label_config):
            raise StateError(
                f"Label Studio has a project {title!r} (number {number}) with another label config; "
                "choose another name, or delete that project first"
            )
        self.update_project(number, **PROJECT_SETTINGS)
        return number

    def project(self, project_id: int) -> dict[str, Any]:
        """A project as Label Studio shows it: settings, and counters such as task_number."""
        found: dict[str, Any] = self._sdk.projects.with_raw_response.get(project_id).response.json()
        return found

    def update_project(self, project_id: int, **fields: Any) -> dict[str, Any]:
        """Changes settings of a project by Label Studio's own names; returns it as it then is."""
        answer = self._sdk.projects.with_raw_response.update(
            project_id, request_options={"additional_body_parameters": fields}
        )
        changed: dict[str, Any] = answer.response.json()
        return changed

    def delete_project(self, project_id: int) -> None:
        """Deletes a project with its tasks, annotations and predictions; nothing happens if there is none."""
        delete(self._sdk.projects.delete, project_id)

    def connect_storage(self, project_id: int, directory: Path | str) -> int:
        """Lets Label Studio show the pictures below `directory`; imports nothing. Returns the storage's number.

        Args:
            project_id: Label Studio's number of the project.
            directory: absolute, on the machine of Label Studio, below (not equal to) its document root.

        Raises:
            InputError: the directory is not absolute.
            RefusedError: Label Studio does not see it, or it is not below the document root.
        """
        return label_studio_storage.connect_storage(self._connection, project_id, directory)

    def upload(self, project_id: int, paths: Sequence[Path]) -> list[str]:
        """Sends PNG files to Label Studio, for a server that does not see this machine's disk; makes no tasks.

        Returns:
            What to put into the tasks' data to show them, in the order given. The same picture is sent once.

        Raises:
            ImageError: a file cannot be read.
        """
        return label_studio_tasks.upload(self._connection, project_id, paths)

    def connect_backend(
        self, project_id: int, url: str, title: str, *, user: str | None = None, password: str | None = None
    ) -> int:
        """Attaches the backend that answers clicks; see label_studio_hooks.connect_backend. Returns its number."""
        return label_studio_hooks.connect_backend(
            self._connection, project_id, url, title, user=user, password=password
        )

    def connect_webhook(self, project_id: int, url: str, secret: str) -> int:
        """Has `url` told of each change, the secret in header X-Celloop-Secret; returns the webhook's number."""
        return label_studio_hooks.connect_webhook(self._connection, project_id, url, secret)

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        """Brings tasks in, those that are there already by their data's "celloop_id" excepted.

        Args:
            project_id: Label Studio's number of the project.
            tasks: each {"data": {"celloop_id": ..., ...}} with "meta" if wanted.

        Returns:
            Label Studio's numbers of all of them, in the order given.

        Raises:
            InputError: a task without "celloop_id", or two with the same.
        """
        numbers = label_studio_tasks.import_tasks(self._connection, project_id, tasks)
        self._project_of.update(dict.fromkeys(numbers, project_id))
        return numbers

    def tasks(self, project_id: int, *, updated_after: datetime | None = None) -> Iterator[Task]:
        """All tasks, or those whose annotations changed after a time, by ascending number.

        Read in pages by number, so that tasks made or deleted meanwhile shift nothing. Deleted tasks do not show.

        Args:
            project_id: Label Studio's number of the project.
            updated_after: with a timezone; Label Studio's clock.

        Raises:
            InputError: `updated_after` has no timezone.
        """
        for task in label_studio_tasks.tasks_of(self._connection, project_id, updated_after):
            self._project_of[task.id] = project_id
            yield task

    def annotations(self, task_id: int) -> list[Annotation]:
        """Every annotation of a task, the skipped ones too, oldest first; no drafts."""
        return label_studio_tasks.annotations_of(self._connection, self._project(task_id), task_id)

    def submit(
        self,
        task_id: int,
        result: Sequence[Mapping[str, Any]],
        *,
        lead_time_s: float | None,
        unique_id: UUID | str,
        parent_prediction: int | None = None,
        was_cancelled: bool = False,
    ) -> int:
        """Submits an annotation as the editor does; returns its number, the first one's when called again.

        For arguments and errors see label_studio_tasks.submit.
        """
        return label_studio_tasks.submit(
            self._connection,
            task_id,
            result,
            lead_time_s=lead_time_s,
            unique_id=unique_id,
            parent_prediction=parent_prediction,
            was_cancelled=was_cancelled,
            project_of=self._project,
        )

    def untouched(self, project_id: int, task_ids: Sequence[int]) -> list[int]:
        """Those of `task_ids` that nobody has annotated, skipped or begun."""
        return label_studio_untouched.untouched(self._connection, project_id, task_ids)

    def remove_untouched(self, project_id: int, task_ids: Sequence[int]) -> list[int]:
        """Deletes those of `task_ids` that are untouched; returns those that are gone."""
        return label_studio_untouched.remove_untouched(self._connection, project_id, task_ids)

    def publish(
        self,
        project_id: int,
        version: str,
        predictions: Sequence[TaskPrediction],
        *,
        chunk: int = 500,
        progress: Progress | None = None,
    ) -> PublishReport:
        """Makes `version` the only prediction of each task and the project's order; see label_studio_publish."""
        return label_studio_publish.publish(
            self._connection, project_id, version, predictions, chunk=chunk, progress=progress
        )

    def predictions(self, task_id: int) -> list[Prediction]:
        """All predictions of a task, every version, oldest first."""
        return label_studio_publish.predictions_of(self._connection, task_id)

    def queue(self, project_id: int, *, first: int) -> QueueState:
        """The queue as it stands, with the `first` tasks that are served next; see label_studio_queue."""
        return label_studio_queue.queue_state(self._connection, project_id, first=first)

    def queued_tasks(self, project_id: int, task_ids: Sequence[int]) -> dict[int, QueuedTask]:
        """Those of `task_ids` that the project has, by number, as the queue sees them."""
        return label_studio_queue.queued_tasks(self._connection, project_id, task_ids)

    def doubled_predictions(self, project_id: int, version: str) -> dict[int, list[int]]:
        """By task, the predictions of `version` beyond its first one."""
        return label_studio_queue.doubled_predictions(self._connection, project_id, version)

    def set_tab(
        self,
        project_id: int,
        title: str,
        ordering: Sequence[str],
        filters: Mapping[str, Any],
        *,
        columns: Sequence[str] = (),
        widths: Mapping[str, int] = MappingProxyType({}),
        numbers: Sequence[str] = (),
    ) -> int:
        """Makes or corrects the tab of this title in Label Studio's list of tasks; returns its number.

        Args:
            project_id: Label Studio's number of the project.
            title: of the tab.
            ordering: e.g. LOWEST_SCORE_FIRST; only the first entry counts.
            filters: e.g. NOT_YET_ANNOTATED.
            columns: the only ones to show, e.g. ("data.image", "data.reason", "predictions_score"); none = as it is.
            widths: of columns, px.
            numbers: columns of the data to order as numbers; PostgreSQL orders 10 before 2 otherwise.
        """
        wanted: dict[str, Any] = {"title": title, "ordering": list(ordering), "filters": filters}
        if widths:
            wanted["columnsWidth"] = {f"tasks:{name}": width for name, width in widths.items()}
        if numbers:
            wanted["columnsDisplayType"] = {f"tasks:{name}": "Number" for name in numbers}
        return label_studio_tabs.set_tab(self._connection, project_id, wanted, columns)

    def tab_titles(self, project_id: int) -> list[str]:
        """The titles of all tabs, in the order in which they stand there."""
        return label_studio_tabs.tab_titles(self._connection, project_id)

    def remove_tab(self, project_id: int, title: str) -> None:
        """Deletes every tab of this title; nothing happens if there is none."""
        label_studio_tabs.remove_tab(self._connection, project_id, title)

    def people(self) -> dict[str, int]:
        """Label Studio's number of each person, by login (e-mail) and by user name, both in lower case."""
        return label_studio_tabs.people(self._connection)

    def set_task_data(self, task_id: int, data: Mapping[str, Any], *, people: int | None = None) -> None:
        """Replaces the whole data of a task (140 ms on SQLite), and how many people label it; None = as it is."""
        more = {} if people is None else {"overlap": people}
        self._sdk.tasks.update(str(task_id), data=dict(data), **more)

    def next_task(self, project_id: int, *, tab: str | None = None) -> dict[str, Any] | None:
        """What Label Studio serves the token's owner next; None = all done.

        Asked as its button "Label All Tasks" asks, or for a tab as the tab's "Label Tasks As Displayed" does. The
        former's task is reserved for this person for a day: the same one is served again until it is submitted or
        skipped. Asked by a request of our own, because the SDK throws away what an action answers.

        Args:
            project_id: Label Studio's number of the project.
            tab: the title of a tab.

        Raises:
            StateError: there is no such tab.
        """
        action = {"id": "next_task", "project": project_id}
        queue = {} if tab is None else label_studio_tabs.queue_of(self._connection, project_id, tab)
        try:
            served: dict[str, Any] = self._connection.send(
                "POST", "/api/dm/actions/", params=action, body={"project": project_id, **queue}
            ).body
        except StatusError as error:
            if error.status != 404:
                raise
            self.project(project_id)  # refuses by name where it is the project that is not there
            return None
        return served

    @property
    def _sdk(self) -> "Client":
        return self._connection.sdk

    def _project(self, task_id: int) -> int:
        if task_id not in self._project_of:
            self._project_of[task_id] = int(self._sdk.tasks.get(str(task_id)).project)
        return self._project_of[task_id]


def _canonical(label_config: str) -> str:
    try:
        return ElementTree.canonicalize(label_config, strip_text=True)
    except ElementTree.ParseError as error:
        raise InputError(f"the label config is no XML ({error}); see configs/label_config.xml") from error
