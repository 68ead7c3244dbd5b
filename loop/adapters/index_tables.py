"""The index's rows as the rest of celloop sees them, and the tables that hold them (SQLAlchemy 2).

A row class and its table share their field names, so that one function turns a record into a row.
Imported by loop/adapters/index.py only, which hands the row classes on.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, get_args, get_origin

from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, ForeignKeyConstraint, Index, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from loop.errors import InputError, NonFiniteError

SCHEMA = 3  # raised when a table changes; index_database brings an older index up to it and refuses a newer one

Role = Literal["open", "train", "control"]
State = Literal["open", "labelled", "skipped", "unusable", "gone"]
Status = Literal["running", "done"]
Decision = Literal["promoted", "refused", "first", "none"]


@dataclass(frozen=True)
class ProjectRow:
    """One project: its name here, its number in Label Studio, and what is published there.

    `root` is the dataset's folder. `published_version` is the version of the predictions in Label Studio,
    `published_model` the label of the model that made them, "" before any. `synced_until` is how far
    annotations have been read, None before the first sync. All times are UTC.
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

    @property
    def told(self) -> str:
        """Reason and note in one line, as the image's task shows them."""
        return "; ".join(part for part in (self.reason, self.note) if part)


@dataclass(frozen=True)
class AnnotationRow:
    """One annotation of Label Studio as it was last read; `file` is the cached JSON body.

    `used_in_round` is the first round whose snapshot held this content, None = not used yet.
    `completed_by` is the person's number in Label Studio. `cancelled` = the person skipped the task.
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


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time: aware in, aware UTC out, whatever the database keeps.

    SQLite knows no time zones and stores the UTC wall clock; PostgreSQL stores timestamptz.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The value to store; a naive time is refused, since nobody can say which hour it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise InputError(f"the time {value.isoformat()} has no time zone; give an aware one, e.g. in UTC")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The stored value as an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """All tables of the index."""

    type_annotation_map = {  # noqa: RUF012 (read by SQLAlchemy)
        str: Text,
        datetime: UtcDateTime,
        dict[str, Any]: JSON,
        list[str]: JSON,
    }


class SchemaRecord(Base):
    """One line: the number of the schema that made these tables."""

    __tablename__ = "celloop_schema"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class ProjectRecord(Base):
    """Table of ProjectRow."""

    __tablename__ = "projects"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    ls_project_id: Mapped[int] = mapped_column(unique=True)
    root: Mapped[str]
    label_config: Mapped[str]
    published_version: Mapped[str]
    published_model: Mapped[str]
    synced_until: Mapped[datetime | None]
    created_at: Mapped[datetime]


class ImageRecord(Base):
    """Table of ImageRow."""

    __tablename__ = "images"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    image_id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    path: Mapped[str]
    display: Mapped[str]
    task_id: Mapped[int | None]
    group: Mapped[str]
    split: Mapped[str]
    modality: Mapped[str]
    height: Mapped[int]
    width: Mapped[int]
    role: Mapped[str]
    state: Mapped[str]
    score: Mapped[float | None]
    rank: Mapped[int | None]
    reason: Mapped[str]
    chosen_in: Mapped[int | None]
    taught: Mapped[bool]
    pseudo_taught: Mapped[bool]
    note: Mapped[str]
    seconds: Mapped[float | None]
    annotators: Mapped[str]


class AnnotationRecord(Base):
    """Table of AnnotationRow."""

    __tablename__ = "annotations"
    __table_args__ = (
        ForeignKeyConstraint(["project_id", "image_id"], ["images.project_id", "images.image_id"]),
        Index("annotations_by_image", "project_id", "image_id"),
    )
    project_id: Mapped[int] = mapped_column(primary_key=True)
    annotation_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    image_id: Mapped[str]
    task_id: Mapped[int]
    updated_at: Mapped[datetime]
    file: Mapped[str]
    n_regions: Mapped[int]
    lead_time_s: Mapped[float | None]
    completed_by: Mapped[int | None]
    cancelled: Mapped[bool]
    used_in_round: Mapped[int | None]


class RoundRecord(Base):
    """Table of RoundRow."""

    __tablename__ = "rounds"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    status: Mapped[str]
    snapshot_id: Mapped[str]
    champion_before: Mapped[str]
    challenger: Mapped[str]
    decision: Mapped[str]
    reason: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    published_version: Mapped[str]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    pseudo: Mapped[dict[str, Any]]


class PseudoAuditRecord(Base):
    """Table of AuditRow."""

    __tablename__ = "pseudo_audits"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    labeller: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str]
    cells: Mapped[int]
    hits: Mapped[int]
    truths: Mapped[int]
    image_ids: Mapped[list[str]]


IMAGES = Base.metadata.tables[ImageRecord.__tablename__]
ANNOTATIONS = Base.metadata.tables[AnnotationRecord.__tablename__]
AUDITS = Base.metadata.tables[PseudoAuditRecord.__tablename__]

Row = TypeVar("Row", ProjectRow, ImageRow, AnnotationRow, RoundRow, AuditRow)


def to_row(row: type[Row], record: Base) -> Row:
    """The record as a frozen row, detached from the database."""
    return row(**{f.name: getattr(record, f.name) for f in dataclasses.fields(row)})


def to_values(row: ImageRow | AnnotationRow | RoundRow | AuditRow, project_id: int) -> dict[str, Any]:
    """The row's fields for an insert into the table of `project_id`.

    Raises:
        InputError: the row belongs to another project, or a field holds a word that it does not take.
        NonFiniteError: the score or the seconds are NaN or infinite.
    """
    if row.project_id != project_id:
        raise InputError(
            f"a row of project number {row.project_id} was given for project number {project_id}; "
            f"take project_id from Index.project(name).id"
        )
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    check_values(type(row), values, str(values.get("image_id", "")))
    return values


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
    for name in ("score", "seconds"):
        number = values.get(name)
        if number is not None and not math.isfinite(number):
            raise NonFiniteError(f"image {image_id}: its {name} is {number}; expected a finite number")
