"""The index's rows as the rest of celloop sees them, and the words and numbers that their fields take.

Imported by loop/adapters/index*.py only; index.py hands the row classes on.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args, get_origin

from loop.errors import InputError, NonFiniteError

Role = Literal["open", "train", "control"]
State = Literal["open", "labelled", "skipped", "unusable", "gone", "tiled"]
Status = Literal["running", "done"]
Decision = Literal["promoted", "refused", "first", "none"]


@dataclass(frozen=True)
class ProjectRow:
    """One project: its name here, its number in Label Studio, and what is published there.

    `root` is the dataset's folder. `published_version` is the version of the predictions in Label Studio,
    `published_model` the label of the model that made them, "" before any. `synced_until` is how far
    annotations have been read, None before the first sync. `typical` is how large and of what shape the labelled cells
    are, by modality (loop/metrics/typical.py), {} before any. All times are UTC.
    """

    id: int
    name: str
    ls_project_id: int
    root: str
    label_config: str
    published_version: str = ""
    published_model: str = ""
    synced_until: datetime | None = None
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    typical: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageRow:
    """One image of a project: where it is, and where it stands in the loop.

    `path` is the original, `display` the file that Label Studio shows. `role` says what the image is for:
    "control" images are the hold-out and never train. `score` is its uncertainty (higher = ask sooner),
    `rank` its place in the queue (1 = first), `chosen_in` the round that chose it; None = not yet.
    `taught`: a model has learnt from it, whatever became of its annotation since; it can never measure one.
    `pseudo_taught`: it was drawn to be pseudo-labelled for a model that learnt so, whether a cell in it was sure or
    not, which forbids the same; a person may still label it.
    `reason` says why it was chosen, `note` what a person should know besides (doubtful cells, minutes); `seconds` is
    how long a person was expected to need for it when it was chosen, None = not known. `annotators` are the logins of
    those who share it out among them, each in square brackets; "" = anybody.
    A tile is an image of its own: `parent` is the id of the image that it was cut from, "" for a whole image, and `top`
    and `left` say where in it the tile begins, px. The state of an image that was cut is "tiled".
    """

    project_id: int
    image_id: str
    sha256: str
    path: str
    display: str
    task_id: int | None = None
    group: str = ""
    split: str = ""
    modality: str = ""
    height: int = 0
    width: int = 0
    role: Role = "open"
    state: State = "open"
    score: float | None = None
    rank: int | None = None
    reason: str = ""
    chosen_in: int | None = None
    taught: bool = False
    pseudo_taught: bool = False
    note: str = ""
    seconds: float | None = None
    annotators: str = ""
    parent: str = ""
    top: int = 0
    left: int = 0

    @property
    def is_present(self) -> bool:
        """Whether it is an image to work with: its task is there, and it was not cut into tiles."""
        return self.state not in ("gone", "tiled")

    @property
    def told(self) -> str:
        """Reason and note in one line, as the image's task shows them."""
        return "; ".join(part for part in (self.reason, self.note) if part)


@dataclass(frozen=True)
class AnnotationRow:
    """One annotation of Label Studio as it was last read; `file` is the cached JSON body.

    `used_in_round` is the first round whose snapshot held this content, None = not used yet.
    `completed_by` is the person's number in Label Studio. `cancelled` = the person skipped the task. `reviewed` =
    somebody starred it as ground truth.
    """

    project_id: int
    annotation_id: int
    image_id: str
    task_id: int
    updated_at: datetime
    file: str
    n_regions: int = 0
    lead_time_s: float | None = None
    completed_by: int | None = None
    cancelled: bool = False
    used_in_round: int | None = None
    reviewed: bool = False


@dataclass(frozen=True)
class EffortRow:
    """What one annotation cost, and what became of the cells that were offered: a line of the effort ledger.

    `version` is the published version that was on screen, "" where nothing was; `predicted` says whether a model made
    it. Of the offered cells `kept` stayed, `edited` were reshaped (to `edited_iou` with the offered ones, on average;
    None without any), `deleted` were removed; `added` were drawn. `seconds` is None where Label Studio measured none.
    `annotator` is the person's number in Label Studio, `updated_at` the time of the annotation's content.
    """

    project_id: int
    annotation_id: int
    image_id: str
    updated_at: datetime
    version: str = ""
    predicted: bool = False
    annotator: int | None = None
    modality: str = ""
    kept: int = 0
    edited: int = 0
    deleted: int = 0
    added: int = 0
    edited_iou: float | None = None
    seconds: float | None = None

    @property
    def offered(self) -> int:
        """Number of cells that were on screen at the beginning."""
        return self.kept + self.edited + self.deleted

    @property
    def cells(self) -> int:
        """Number of cells that were submitted."""
        return self.kept + self.edited + self.added


@dataclass(frozen=True)
class RoundRow:
    """One round: what it trained on, what the gate decided and why. Number 0 is the first.

    `pseudo` is the document of its pseudo-labels (flows/pseudo.py), {} where the round did not learn.
    """

    project_id: int
    number: int
    status: Status = "running"
    snapshot_id: str = ""
    champion_before: str = ""
    challenger: str = ""
    decision: Decision = "none"
    reason: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    published_version: str = ""
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished_at: datetime | None = None
    pseudo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditRow:
    """How one labeller's pseudo-labels of images that people have labelled since agree with them, as a round found it.

    `number` is the round that audited, `labeller` the name in PSEUDO_LABELLERS, `version` its newest version among the
    proposals. Of `cells` proposed cells that taught (or would have) `hits` are one of the `truths` cells that people
    drew in the same images, one to one. `image_ids` are those images; none is audited twice for the same labeller.
    """

    project_id: int
    number: int
    labeller: str
    version: str
    cells: int
    hits: int
    truths: int
    image_ids: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float | None:
        """Share of the proposed cells that a person drew too; None without any."""
        return self.hits / self.cells if self.cells else None

    @property
    def recall(self) -> float | None:
        """Share of the people's cells that were proposed; None without any."""
        return self.hits / self.truths if self.truths else None


def check_fields(row: type[ImageRow] | type[RoundRow], names: Iterable[str], keys: set[str]) -> None:
    """Refuse names that the row does not have, and its keys.

    Raises:
        InputError: names the field and what can be changed.
    """
    allowed = [f.name for f in dataclasses.fields(row) if f.name not in keys]
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise InputError(f"{row.__name__} cannot change {', '.join(unknown)}; it can change {', '.join(allowed)}")


def check_values(row: type[Any], values: Mapping[str, Any], image_id: str = "") -> None:
    """Refuse words that a field does not take, and numbers that are none.

    Raises:
        InputError: names the field, what was given and what is allowed.
        NonFiniteError: the score or the seconds are NaN or infinite; names the image.
    """
    choices = {f.name: get_args(f.type) for f in dataclasses.fields(row) if get_origin(f.type) is Literal}
    for name in choices.keys() & values.keys():
        if values[name] not in choices[name]:
            raise InputError(f"{name}={values[name]!r} is not known; expected one of {', '.join(choices[name])}")
    for name in ("score", "seconds", "edited_iou"):
        number = values.get(name)
        if number is not None and not math.isfinite(number):
            raise NonFiniteError(f"image {image_id}: its {name} is {number}; expected a finite number")
