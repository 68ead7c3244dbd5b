"""From a click or a box to one region: SAM answers where the settings ask for it and it serves, else the champion.

One request takes model, version string and settings once, at its start; a swap in between changes none of them.
"""

import logging
import uuid
from dataclasses import dataclass, replace

import numpy as np
import orjson

from backend.answerers import Answerer, ByChampion, BySam
from backend.errors import BadRequestError, NoModelError
from backend.images import ImageSource
from backend.metrics import Metrics
from backend.model_slot import ModelSlot
from backend.project_settings import ProjectSettings
from backend.projects import Projects, version_string
from backend.sam_slot import SamSlot
from backend.schemas import PredictRequest, Task, prediction_item
from backend.sights import Sights
from backend.tasks import image_id, image_value, interface_of
from backend.turns import Rank, Turns
from loop.adapters.index import ProjectRow
from loop.config import LoopConfig
from loop.errors import InputError
from loop.labelstudio.interface import Interface
from loop.labelstudio.results import prompts_from_context, to_results
from loop.labelstudio.screen import others_on_screen
from loop.metrics.typical import Typical
from loop.models.apart import leave_out
from loop.types import Instances

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """What one click is answered with, from its start to its end."""

    row: ProjectRow
    config: LoopConfig
    interface: Interface
    version: str
    by: Answerer


class Clicks:
    """Answers clicks of all projects.

    Args:
        projects: Label Studio id -> project.
        settings: project -> its settings.
        slot: project -> champion.
        sams: project -> SAM.
        images: task value -> image file.
        sights: what the models see in images.
        turns: clicks are announced there.
        metrics: clicks are counted there.
    """

    def __init__(
        self,
        projects: Projects,
        settings: ProjectSettings,
        *,
        slot: ModelSlot,
        sams: SamSlot,
        images: ImageSource,
        sights: Sights,
        turns: Turns,
        metrics: Metrics,
    ) -> None:
        self._projects = projects
        self._settings = settings
        self._slot = slot
        self._sams = sams
        self._images = images
        self._sights = sights
        self._turns = turns
        self._metrics = metrics
        self._unusable: set[str] = set()

    def answered_by(self, project: str) -> Answerer | None:
        """Who answers clicks in a project now; None: nobody can."""
        sam, champion = self._sams.of(project), self._slot.get(project)
        if sam is not None:
            return BySam(sam, self._sights, self._settings.of(project).click.store_mb)
        return None if champion is None else ByChampion(champion, self._sights)

    def answer(self, request: PredictRequest) -> bytes:
        """The reply to a click: the cell under it as one region, or none for background.

        Raises:
            UnknownProjectError, NoModelError, LabelError: nothing can be answered.
            ImageError, ServiceError: the image cannot be read.
            BadRequestError: not exactly one task, or no context.
        """
        if len(request.tasks) != 1 or request.params.context is None:
            raise BadRequestError(f"{len(request.tasks)} tasks with a click; expected one task and its context")
        job = self._prepare(request)
        task = request.tasks[0]
        with self._images.open(image_value(task, job.interface)) as file:
            look = job.by.look(file, Rank.CLICK)
        with self._turns.beside():
            prompts = prompts_from_context(request.params.context, look.shape)
            cells = look.cell(prompts, self._typical(job, task), image_id(task))
            cells = _labelled(self._apart(job, task, cells), prompts.label, job.interface)
            tolerance = job.config.publish.tolerance_px
            regions = to_results(cells, job.interface, tolerance_px=tolerance, id_seed=uuid.uuid4().hex)
        score = float(cells.scores[0]) if len(cells) else 0.0
        self._metrics.clicks.labels(job.row.name, "cell" if len(cells) else "background").inc()
        self._metrics.answers.labels(job.row.name, job.by.kind).inc()
        return orjson.dumps({"results": [prediction_item(regions, score, job.version)]})

    def _prepare(self, request: PredictRequest) -> _Job:
        row = self._projects.recent(request.project)
        by = self.answered_by(row.name)
        if by is None:
            self._slot.wake()
            raise NoModelError(
                f"nothing answers clicks in project {row.name!r} yet: it has no model (`celloop round` makes the first "
                "one), and SAM has no weights, is switched off or still being loaded"
            )
        config = self._settings.of(row.name)
        champion = self._slot.get(row.name)
        version = version_string(row, champion.label if champion else None)
        return _Job(row, config, interface_of(request, row, config), version, by)

    def _apart(self, job: _Job, task: Task, cells: Instances) -> Instances:
        """The cell without the pixels of others that are on screen, where the settings say so."""
        if not len(cells) or not job.config.click.apart:
            return cells
        near = cells.boxes_xyxy[0].tolist()
        shown = job.row.published_version or job.version
        return leave_out(cells, others_on_screen(task.on_screen, job.interface, cells.shape, version=shown, near=near))

    def _typical(self, job: _Job, task: Task) -> Typical | None:
        """Size and shape of labelled cells of the image's modality, else of all; None where they are not to count."""
        by_modality = job.row.typical if job.config.click.typical else {}
        document = by_modality.get(str(task.data.get("modality") or "")) or by_modality.get("")
        if not document:
            return None
        try:
            return Typical.from_document(document)
        except InputError as error:
            if str(error) not in self._unusable:
                self._unusable.add(str(error))
                logger.warning("clicks in %s go by SAM's own scores alone: %s", job.row.name, error)
            return None


def _labelled(cells: Instances, label: str, interface: Interface) -> Instances:
    """The cells under the label that the person chose, where masks can have it, else under the first one."""
    can_have = label in interface.labels and interface.mask_control(label) is not None
    return replace(cells, labels=np.full(len(cells), interface.labels.index(label) if can_have else 0, np.int32))
