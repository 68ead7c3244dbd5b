"""The tables that hold the index's rows (SQLAlchemy 2).

A row class and its table share their field names, so that one function turns a record into a row.
Imported by loop/adapters/index*.py only.
"""

import dataclasses
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, ForeignKeyConstraint, Index, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from loop.adapters.index_rows import (
    AnnotationRow,
    AuditRow,
    EffortRow,
    ImageRow,
    ProjectRow,
    RoundRow,
    check_values,
)
from loop.errors import InputError

SCHEMA = 4  # raised when a table changes; index_database brings an older index up to it and refuses a newer one


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
    typical: Mapped[dict[str, Any]]


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
    parent: Mapped[str]
    top: Mapped[int]
    left: Mapped[int]


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
    reviewed: Mapped[bool]


class EffortRecord(Base):
    """Table of EffortRow."""

    __tablename__ = "efforts"
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    annotation_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    image_id: Mapped[str]
    updated_at: Mapped[datetime]
    version: Mapped[str]
    predicted: Mapped[bool]
    annotator: Mapped[int | None]
    modality: Mapped[str]
    kept: Mapped[int]
    edited: Mapped[int]
    deleted: Mapped[int]
    added: Mapped[int]
    edited_iou: Mapped[float | None]
    seconds: Mapped[float | None]


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
EFFORTS = Base.metadata.tables[EffortRecord.__tablename__]
AUDITS = Base.metadata.tables[PseudoAuditRecord.__tablename__]

Row = TypeVar("Row", ProjectRow, ImageRow, AnnotationRow, EffortRow, RoundRow, AuditRow)


def to_row(row: type[Row], record: Base) -> Row:
    """The record as a frozen row, detached from the database."""
    return row(**{f.name: getattr(record, f.name) for f in dataclasses.fields(row)})


def to_values(row: ImageRow | AnnotationRow | EffortRow | RoundRow | AuditRow, project_id: int) -> dict[str, Any]:
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
