"""The one small SQL index: each image's task, group, split, state, score, rank and reason; annotations; rounds.

Label Studio owns the labels and MLflow the models; the index only knows where each thing stands. Every write is
one transaction and can be repeated: the same call twice leaves the same rows.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from loop.adapters.index_database import Database, execute_many
from loop.adapters.index_rows import (
    AnnotationRow,
    AuditRow,
    EffortRow,
    ImageRow,
    ProjectRow,
    RoundRow,
    check_fields,
    check_values,
)
from loop.adapters.index_tables import (
    ANNOTATIONS,
    AUDITS,
    EFFORTS,
    IMAGES,
    AnnotationRecord,
    EffortRecord,
    ImageRecord,
    ProjectRecord,
    PseudoAuditRecord,
    RoundRecord,
    to_row,
    to_values,
)
from loop.errors import NonFiniteError, StateError

__all__ = ["AnnotationRow", "AuditRow", "EffortRow", "ImageRow", "Index", "ProjectRow", "RoundRow"]

# What an import knows of an image; the rest of a row belongs to the loop and outlives a second import.
_FROM_IMPORT = (
    *("sha256", "path", "display", "group", "split", "modality", "height", "width"),
    *("parent", "top", "left"),
)


class Index:
    """The index behind `url`: sqlite:////path/index.sqlite, or postgresql://user:password@host/database.

    Safe for several threads and processes at once; a writer waits up to `wait_s` for another. Nothing is opened
    before the first call, which also makes the tables. SQLite runs in WAL mode, so readers never wait.

    Every method raises StateError for an unknown project, ConfigError when the index cannot be opened as
    configured, ServiceError when the database is away, locked or full.
    """

    def __init__(self, url: str, *, wait_s: float = 30.0) -> None:
        self._database = Database(url, wait_s)
        self._read, self._write, self._insert = self._database.read, self._database.write, self._database.insert

    def __repr__(self) -> str:
        return f"Index({self._database.name!r})"

    def close(self) -> None:
        """Close every connection; the next call opens new ones."""
        self._database.close()

    # projects

    def add_project(self, name: str, *, ls_project_id: int, root: str | Path, label_config: str) -> ProjectRow:
        """The project of that name, made or brought up to date.

        A changed `ls_project_id` means a new, empty project in Label Studio: what was published and how far was
        synced is forgotten; images, annotations and rounds stay.

        Raises:
            StateError: another project already has this number in Label Studio.
        """
        with self._write() as session:
            holder = session.scalar(
                sa.select(ProjectRecord.name).where(
                    ProjectRecord.ls_project_id == ls_project_id, ProjectRecord.name != name
                )
            )
            if holder is not None:
                raise StateError(
                    f"Label Studio project {ls_project_id} belongs to {holder!r}, not to {name!r}; "
                    f"use that project or make a new one in Label Studio"
                )
            record = session.scalar(sa.select(ProjectRecord).where(ProjectRecord.name == name))
            if record is None:
                record = ProjectRecord(name=name, created_at=datetime.now(UTC), typical={})
                session.add(record)
            if record.ls_project_id != ls_project_id:
                record.ls_project_id, record.synced_until = ls_project_id, None
                record.published_version = record.published_model = ""
            record.root, record.label_config = str(root), label_config
            session.flush()
            return to_row(ProjectRow, record)

    def project(self, name: str) -> ProjectRow:
        """The project of that name."""
        with self._read() as session:
            return to_row(ProjectRow, _project(session, name))

    def project_by_label_studio(self, ls_project_id: int) -> ProjectRow:
        """The project that has this number in Label Studio."""
        with self._read() as session:
            record = session.scalar(sa.select(ProjectRecord).where(ProjectRecord.ls_project_id == ls_project_id))
            if record is None:
                raise StateError(f"no project has number {ls_project_id} in Label Studio; {_known(session)}")
            return to_row(ProjectRow, record)

    def projects(self) -> list[ProjectRow]:
        """All projects by name."""
        with self._read() as session:
            return [
                to_row(ProjectRow, r) for r in session.scalars(sa.select(ProjectRecord).order_by(ProjectRecord.name))
            ]

    def set_published(self, name: str, version: str, model: str) -> None:
        """Remember the version of the predictions in Label Studio and the label of the model that made them."""
        with self._write() as session:
            record = _project(session, name)
            record.published_version, record.published_model = version, model

    def set_synced(self, name: str, until: datetime) -> None:
        """Remember how far annotations have been read; `until` is an aware time."""
        with self._write() as session:
            _project(session, name).synced_until = until

    def set_typical(self, name: str, typical: Mapping[str, Any]) -> None:
        """Remember how large and of what shape the labelled cells are (loop/metrics/typical.py)."""
        with self._write() as session:
            _project(session, name).typical = dict(typical)

    # images

    def add_images(self, project: str, rows: Iterable[ImageRow]) -> None:
        """Add images, or bring known ones up to date, by `image_id`.

        Of a known image only what an import knows is replaced (hash, paths, size, group, split, modality, and the
        task where the row has one); role, score, rank and reason stay, and so does the state unless it was "gone".
        """
        with self._write() as session:
            project_id = _project(session, project).id
            statement = self._insert(IMAGES)
            new, old = statement.excluded, IMAGES.c
            statement = statement.on_conflict_do_update(
                index_elements=[old.project_id, old.image_id],
                set_={name: new[name] for name in _FROM_IMPORT}
                | {
                    "task_id": sa.func.coalesce(new.task_id, old.task_id),
                    "state": sa.case((old.state == "gone", new.state), else_=old.state),
                },
            )
            execute_many(session, statement, [to_values(row, project_id) for row in rows])

    def images(self, project: str, *, state: str | None = None, role: str | None = None) -> list[ImageRow]:
        """The project's images by `image_id`, all or those of one state or role."""
        wanted = {name: value for name, value in {"state": state, "role": role}.items() if value is not None}
        check_values(ImageRow, wanted)
        with self._read() as session:
            query = sa.select(ImageRecord).where(ImageRecord.project_id == _project(session, project).id)
            records = session.scalars(query.filter_by(**wanted).order_by(ImageRecord.image_id))
            return [to_row(ImageRow, record) for record in records]

    def image(self, project: str, image_id: str) -> ImageRow:
        """One image.

        Raises:
            StateError: the project has no such image.
        """
        with self._read() as session:
            record = session.get(ImageRecord, (_project(session, project).id, image_id))
            if record is None:
                raise StateError(f"project {project!r} has no image {image_id!r}; import it with `celloop init`")
            return to_row(ImageRow, record)

    def set_images(self, project: str, updates: Mapping[str, Mapping[str, Any]]) -> None:
        """Change fields of images, {image_id: {field: value}}, all or none.

        Raises:
            InputError: a field that ImageRow does not have, or a word that it does not take.
            NonFiniteError: a score or seconds are NaN or infinite; names the image.
            StateError: an image is not in the index.
        """
        for image_id, fields in updates.items():
            check_fields(ImageRow, fields, {"project_id", "image_id"})
            check_values(ImageRow, fields, image_id)
        with self._write() as session:
            project_id = _project(session, project).id
            _check_images(session, project, project_id, set(updates))
            by_fields: dict[tuple[str, ...], list[dict[str, Any]]] = {}
            for image_id, fields in updates.items():
                values = {f"new_{name}": value for name, value in fields.items()}
                by_fields.setdefault(tuple(sorted(fields)), []).append({"key": image_id, **values})
            columns = IMAGES.c
            for names, parameters in by_fields.items():
                if names:
                    statement = sa.update(IMAGES).values({n: sa.bindparam(f"new_{n}") for n in names})
                    statement = statement.where(columns.project_id == project_id)
                    execute_many(session, statement.where(columns.image_id == sa.bindparam("key")), parameters)

    # annotations

    def put_annotations(self, project: str, rows: Iterable[AnnotationRow]) -> None:
        """Add annotations, or replace known ones, by `annotation_id`; an older `updated_at` never replaces a newer.

        `used_in_round` None keeps the known round while the content is the same, and forgets it when the annotation
        was edited since: an edited annotation is new.

        Raises:
            StateError: an annotation's image is not in the index.
        """
        with self._write() as session:
            project_id = _project(session, project).id
            statement = self._insert(ANNOTATIONS)
            new, old = statement.excluded, ANNOTATIONS.c
            same = sa.case((new.updated_at == old.updated_at, old.used_in_round), else_=sa.null())
            taken = {c.name: new[c.name] for c in old if not c.primary_key}
            statement = statement.on_conflict_do_update(
                index_elements=[old.project_id, old.annotation_id],
                set_=taken | {"used_in_round": sa.func.coalesce(new.used_in_round, same)},
                where=new.updated_at >= old.updated_at,
            )
            values = [to_values(row, project_id) for row in rows]
            _check_images(session, project, project_id, {value["image_id"] for value in values})
            execute_many(session, statement, values)

    def annotations(self, project: str) -> list[AnnotationRow]:
        """The project's annotations by number."""
        with self._read() as session:
            query = sa.select(AnnotationRecord).where(AnnotationRecord.project_id == _project(session, project).id)
            records = session.scalars(query.order_by(AnnotationRecord.annotation_id))
            return [to_row(AnnotationRow, record) for record in records]

    def drop_annotations(self, project: str, annotation_ids: Iterable[int]) -> None:
        """Forget annotations that Label Studio no longer has; unknown numbers are no error."""
        with self._write() as session:
            columns = ANNOTATIONS.c
            statement = sa.delete(ANNOTATIONS).where(columns.project_id == _project(session, project).id)
            statement = statement.where(columns.annotation_id == sa.bindparam("key"))
            execute_many(session, statement, [{"key": number} for number in annotation_ids])

    def set_used(self, project: str, annotation_ids: Iterable[int], number: int) -> None:
        """Mark annotations as used by round `number`; the first round that used one keeps it."""
        with self._write() as session:
            columns = ANNOTATIONS.c
            statement = sa.update(ANNOTATIONS).where(columns.project_id == _project(session, project).id)
            statement = statement.where(columns.annotation_id == sa.bindparam("key"), columns.used_in_round.is_(None))
            statement = statement.values(used_in_round=number)
            execute_many(session, statement, [{"key": key} for key in annotation_ids])

    def new_annotations_since_last_round(self, project: str) -> int:
        """How many annotations, skipped tasks left out, no round has used yet in their present form."""
        with self._read() as session:
            query = sa.select(sa.func.count()).select_from(AnnotationRecord)
            query = query.where(
                AnnotationRecord.project_id == _project(session, project).id,
                AnnotationRecord.used_in_round.is_(None),
                AnnotationRecord.cancelled.is_(False),
            )
            return session.scalar(query) or 0

    # rounds

    def open_round(self, project: str) -> RoundRow:
        """The round that is not done yet, or else a new one; the first has number 0."""
        with self._write() as session:
            project_id = _project(session, project).id
            query = sa.select(RoundRecord).where(RoundRecord.project_id == project_id)
            last = session.scalar(query.order_by(RoundRecord.number.desc()).limit(1))
            if last is not None and last.status == "running":
                return to_row(RoundRow, last)
            fresh = RoundRow(project_id=project_id, number=0 if last is None else last.number + 1)
            session.add(RoundRecord(**to_values(fresh, project_id)))
            return fresh

    def update_round(self, project: str, number: int, **fields: Any) -> RoundRow:
        """The round with `fields` changed; status "done" also sets `finished_at` where it is not set yet.

        Raises:
            InputError: a field that RoundRow does not have, or a word that it does not take.
            NonFiniteError: `metrics` or `pseudo` holds NaN or infinity.
            StateError: there is no such round.
        """
        check_fields(RoundRow, fields, {"project_id", "number"})
        check_values(RoundRow, fields)
        for name in ("metrics", "pseudo"):
            _check_numbers(project, number, name, fields.get(name, {}))
        with self._write() as session:
            record = session.get(RoundRecord, (_project(session, project).id, number))
            if record is None:
                raise StateError(f"project {project!r} has no round {number}; open it first")
            for name, value in fields.items():
                setattr(record, name, value)
            if record.status == "done" and record.finished_at is None:
                record.finished_at = datetime.now(UTC)
            session.flush()
            session.refresh(record)
            return to_row(RoundRow, record)

    def rounds(self, project: str) -> list[RoundRow]:
        """The project's rounds, the first one first."""
        with self._read() as session:
            query = sa.select(RoundRecord).where(RoundRecord.project_id == _project(session, project).id)
            return [to_row(RoundRow, record) for record in session.scalars(query.order_by(RoundRecord.number))]

    # the effort ledger

    def put_efforts(self, project: str, rows: Iterable[EffortRow]) -> None:
        """Add lines of the ledger, or replace those of the same annotations."""
        self._put(EFFORTS, project, rows)

    def efforts(self, project: str) -> list[EffortRow]:
        """The project's ledger by annotation. Those that Label Studio no longer has stay in it: they were work too."""
        with self._read() as session:
            query = sa.select(EffortRecord).where(EffortRecord.project_id == _project(session, project).id)
            return [to_row(EffortRow, r) for r in session.scalars(query.order_by(EffortRecord.annotation_id))]

    # audits of pseudo-labels

    def put_audits(self, project: str, rows: Iterable[AuditRow]) -> None:
        """Add audits, or replace those of the same round and labeller."""
        self._put(AUDITS, project, rows)

    def audits(self, project: str) -> list[AuditRow]:
        """The project's audits, those of the first round first, by labeller."""
        with self._read() as session:
            record = PseudoAuditRecord
            query = sa.select(record).where(record.project_id == _project(session, project).id)
            return [to_row(AuditRow, r) for r in session.scalars(query.order_by(record.number, record.labeller))]

    def _put(self, table: sa.Table, project: str, rows: Iterable[AuditRow] | Iterable[EffortRow]) -> None:
        """Add rows, or replace those of the same key."""
        with self._write() as session:
            project_id = _project(session, project).id
            statement = self._insert(table)
            taken = {c.name: statement.excluded[c.name] for c in table.c if not c.primary_key}
            keys = [c for c in table.c if c.primary_key]
            statement = statement.on_conflict_do_update(index_elements=keys, set_=taken)
            execute_many(session, statement, [to_values(row, project_id) for row in rows])


def _known(session: Session) -> str:
    names = session.scalars(sa.select(ProjectRecord.name).order_by(ProjectRecord.name)).all()
    return f"known projects: {', '.join(names)}" if names else "there is no project yet: make one with `celloop init`"


def _project(session: Session, name: str) -> ProjectRecord:
    record = session.scalar(sa.select(ProjectRecord).where(ProjectRecord.name == name))
    if record is None:
        raise StateError(f"no project {name!r}; {_known(session)}")
    return record


def _check_images(session: Session, project: str, project_id: int, image_ids: set[str]) -> None:
    """Refuse images that the index does not have."""
    if not image_ids:
        return
    known = set(session.scalars(sa.select(ImageRecord.image_id).where(ImageRecord.project_id == project_id)))
    missing = sorted(image_ids - known)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise StateError(
            f"project {project!r} has no image {shown} ({len(missing)} unknown); import with `celloop init` first"
        )


def _check_numbers(project: str, number: int, name: str, values: Mapping[str, Any]) -> None:
    try:
        json.dumps(values, allow_nan=False)
    except ValueError as error:
        raise NonFiniteError(f"round {number} of {project!r}: {name} hold NaN or infinity: {values}") from error
