"""One project's chain, link by link: connections, an image as a browser gets it, a prediction, a click."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from flows.local.workspace import Endpoints, Workspace
from loop.adapters.index import ImageRow, Index, ProjectRow
from loop.adapters.label_studio_api import LabelStudio, Task
from loop.adapters.label_studio_hooks import Backend, backends_of, hooks_of
from loop.adapters.label_studio_http import Connection
from loop.errors import RefusedError, ServiceError
from loop.labelstudio.interface import Interface

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
TIMEOUT_S = 60.0
AGAIN = "run `celloop init` again with the same images: it connects the project anew"


class FaultError(ServiceError):
    """A fault that the doctor found, with its cure.

    `mend` puts it right and says what it did; None where a person has to.
    """

    def __init__(self, detail: str, cure: str, mend: Callable[[], str] | None = None) -> None:
        super().__init__(f"{detail}; {cure}")
        self.detail = detail
        self.cure = cure
        self.mend = mend


@dataclass(frozen=True)
class ProjectProbe:
    """A project, one of its images with its task, and the doors to both servers."""

    row: ProjectRow
    image_row: ImageRow
    task: Task
    interface: Interface
    endpoints: Endpoints
    connection: Connection
    has_model: bool
    studio: LabelStudio
    index: Index
    workspace: Workspace

    @property
    def name(self) -> str:
        """The project's name."""
        return self.row.name

    def connections(self) -> str:
        """That Label Studio asks the backend of this run, and rings its webhook.

        Raises:
            FaultError: it asks another one, or none.
        """
        backend = self.endpoints.backend_url
        attached = [one.url.rstrip("/") for one in self.attached()]
        if backend not in attached:
            what = f"asks {', '.join(attached)}" if attached else "has no backend"
            raise FaultError(f"project {self.name} {what}; the backend is at {backend}", AGAIN, self._connect)
        hooks = [hook.url for hook in hooks_of(self.connection, self.row.ls_project_id)]
        if f"{backend}/webhook" not in hooks:
            raise FaultError(f"project {self.name} has no webhook to {backend}/webhook", AGAIN, self._connect)
        return f"Label Studio asks {backend} and tells it of new annotations"

    def attached(self) -> list[Backend]:
        """The backends of the project; Label Studio asks each whether it is well before it answers."""
        return backends_of(self.connection, self.row.ls_project_id)

    def _connect(self) -> str:
        ends, number = self.endpoints, self.row.ls_project_id
        user, password = ends.backend_user or None, ends.backend_password or None
        self.studio.connect_backend(number, ends.backend_url, "celloop", user=user, password=password)
        self.studio.connect_webhook(number, f"{ends.backend_url}/webhook", ends.webhook_secret)
        return f"attached {ends.backend_url} and its webhook to project {self.name}"

    def image(self) -> str:
        """That a task's picture comes out of Label Studio as a browser asks for it.

        Raises:
            FaultError: it does not come, or is no picture.
        """
        address = str(self.task.data.get(self.interface.image_value_key, ""))
        url = f"{self.endpoints.label_studio_url}{address}" if address.startswith("/") else address
        reply = asked(lambda client: client.get(url, headers=self._authorization()))
        if reply.status_code != httpx.codes.OK:
            raise FaultError(f"Label Studio answers {reply.status_code} for {address} of task {self.task.id}", AGAIN)
        if not reply.content.startswith((PNG, JPEG)):
            raise FaultError(f"{address} of task {self.task.id} is neither PNG nor JPEG", AGAIN)
        return f"task {self.task.id}: {len(reply.content) / 1000:.0f} kB"

    def prediction(self) -> str:
        """That the backend finds cells in the task's image.

        Raises:
            FaultError: it refuses or answers something unusable.
        """
        found = self._predicted()
        return f"{len(found['result'])} cells by {found['model_version']}"

    def click(self) -> str:
        """That a click on a cell comes back as a mask, asked through Label Studio as the editor asks.

        Raises:
            FaultError: no smart control, or an error on the way.
        """
        attached = [one for one in self.attached() if one.url.rstrip("/") == self.endpoints.backend_url]
        if not attached:
            raise FaultError("Label Studio does not know this backend", AGAIN)
        body = {"task": self.task.id, "context": {"result": [self._keypoint()]}}
        path = f"/api/ml/{attached[0].id}/interactive-annotating"
        answer = self.connection.send("POST", path, body=body).body
        if answer.get("errors"):
            raise FaultError(f"the click failed: {' '.join(map(str, answer['errors']))[:300]}", "see the backend's log")
        data = answer.get("data") or {}
        return f"{len(data.get('result', []))} cell under the click"

    def _keypoint(self) -> dict[str, Any]:
        """A click in the middle of the first predicted cell, of the image where there is none."""
        smart = [item for item in self.interface.controls if item.smart and item.kind.startswith("keypoint")]
        if not smart:
            raise FaultError("the label config has no smart KeyPointLabels", "add one, see configs/label_config.xml")
        cells = self._predicted()["result"]
        points = cells[0]["value"].get("points", []) if cells else []
        x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True)) if points else (50.0, 50.0)
        return {
            "type": "keypointlabels",
            "from_name": smart[0].name,
            "to_name": self.interface.image_name,
            "id": "doctor",
            "is_positive": True,
            "original_width": self.image_row.width,
            "original_height": self.image_row.height,
            "image_rotation": 0,
            "value": {"x": x, "y": y, "width": 0.3, "keypointlabels": list(smart[0].labels[:1])},
        }

    def _predicted(self) -> dict[str, Any]:
        body = {
            "tasks": [{"id": self.task.id, "data": self.task.data}],
            "project": f"{self.row.ls_project_id}.0",
            "label_config": self.row.label_config,
            "params": {},
        }
        user = self.endpoints.backend_user
        auth = httpx.BasicAuth(user, self.endpoints.backend_password) if user else httpx.USE_CLIENT_DEFAULT
        url = f"{self.endpoints.backend_url}/predict"
        reply = asked(lambda client: client.post(url, json=body, auth=auth))
        if reply.status_code == httpx.codes.BAD_GATEWAY:
            raise FaultError(
                f"the backend does not get at the image: {reply.text[:300]}",
                "start the backend with CELLOOP_LABEL_STUDIO_URL = an address of Label Studio that its machine knows "
                f"(this one knows {self.endpoints.label_studio_url})",
            )
        if reply.status_code != httpx.codes.OK:
            raise FaultError(f"the backend answers {reply.status_code}: {reply.text[:300]}", "see the backend's log")
        found: dict[str, Any] = reply.json()["results"][0]
        return found

    def _authorization(self) -> dict[str, str]:
        token = self.endpoints.label_studio_token
        if token.count(".") != 2:
            return {"Authorization": f"Token {token}"}
        url = f"{self.endpoints.label_studio_url}/api/token/refresh/"
        reply = asked(lambda client: client.post(url, json={"refresh": token}))
        if reply.status_code != httpx.codes.OK:
            raise RefusedError(f"Label Studio refuses the personal access token ({reply.status_code}); make a new one")
        return {"Authorization": f"Bearer {reply.json()['access']}"}


def open_project(workspace: Workspace, endpoints: Endpoints, name: str | None) -> ProjectProbe | None:
    """The project to look at; None where the workspace has none yet.

    Raises:
        StateError: there is no project of that name.
        RefusedError: Label Studio has no task of it.
    """
    index = Index(workspace.index_url)
    rows = index.projects()
    if name is None and not rows:
        return None
    row = rows[0] if name is None else index.project(name)
    server = LabelStudio(endpoints.label_studio_url, endpoints.label_studio_token)
    images = {image.task_id: image for image in index.images(row.name)}
    task = next((item for item in server.tasks(row.ls_project_id) if item.id in images), None)
    if task is None:
        raise RefusedError(f"project {row.name} has no image that is a task in Label Studio; {AGAIN}")
    return ProjectProbe(
        row=row,
        image_row=images[task.id],
        task=task,
        interface=Interface.parse(row.label_config),
        endpoints=endpoints,
        connection=Connection(endpoints.label_studio_url, endpoints.label_studio_token, timeout_s=TIMEOUT_S),
        has_model=row.published_model not in (None, ""),
        studio=server,
        index=index,
        workspace=workspace,
    )


def asked(ask: Callable[[httpx.Client], httpx.Response]) -> httpx.Response:
    """What a server answers this machine.

    Raises:
        FaultError: nothing.
    """
    try:
        with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:
            return ask(client)
    except httpx.HTTPError as error:
        raise FaultError(f"no answer ({type(error).__name__})", "see `celloop status`") from error
