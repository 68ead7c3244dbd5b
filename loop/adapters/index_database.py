"""The database under the index: opened on first use, one writer at a time, its errors in plain words.

Imported by loop/adapters/index.py only.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError, StatementError
from sqlalchemy.orm import Session

from loop.adapters.index_tables import SCHEMA, Base, SchemaRecord
from loop.errors import ConfigError, LoopError, ServiceError, StateError, UnreachableError

_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_WRITER_LOCK = 7_235_601  # PostgreSQL advisory lock: one writer at a time, as SQLite has it
# What brings an index of the schema before to the next one; tables that are new are made besides.
_UPGRADES: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE images ADD COLUMN pseudo_taught BOOLEAN NOT NULL DEFAULT FALSE",
        "ALTER TABLE rounds ADD COLUMN pseudo JSON NOT NULL DEFAULT '{}'",
    ),
    2: (
        "ALTER TABLE images ADD COLUMN note TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE images ADD COLUMN seconds DOUBLE PRECISION",
        "ALTER TABLE images ADD COLUMN annotators TEXT NOT NULL DEFAULT ''",
    ),
    3: (
        "ALTER TABLE projects ADD COLUMN typical JSON NOT NULL DEFAULT '{}'",
        "ALTER TABLE images ADD COLUMN parent TEXT NOT NULL DEFAULT ''",
        'ALTER TABLE images ADD COLUMN "top" INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE images ADD COLUMN "left" INTEGER NOT NULL DEFAULT 0',
        "ALTER TABLE annotations ADD COLUMN reviewed BOOLEAN NOT NULL DEFAULT FALSE",
    ),
}
_EXAMPLES = "give sqlite:////folder/index.sqlite or postgresql://user:password@host/database"

# What SQLite and PostgreSQL say, the kind of error it is here, and the cure; the first line that fits counts.
_CURES: tuple[tuple[tuple[str, ...], type[LoopError], str], ...] = (
    (
        ("unable to open", "readonly database", "ermission denied"),
        ConfigError,
        "check that its folder exists and that you may write there",
    ),
    (
        ("not a database", "malformed"),
        ConfigError,
        "the file is damaged or something else: restore it, or move it aside",
    ),
    (
        ("locked", "lock timeout"),
        ServiceError,
        "another process has been writing for over {wait_s:g} s: end it and run the same command again",
    ),
    (
        ("disk is full", "No space left"),
        ServiceError,
        "free some space and run the same command again, nothing is half written",
    ),
    (
        ("password authentication", "does not exist"),
        ConfigError,
        "check user, password and database name in the index URL",
    ),
    (("connection", "resolve host"), UnreachableError, "start the database or correct the index URL"),
)


class Database:
    """Sessions on the index at `url`; nothing is opened before the first one.

    A writer holds the database for itself from its first statement (BEGIN IMMEDIATE on SQLite, an advisory lock on
    PostgreSQL): what it reads cannot change before it commits, and two writers never fail each other, they wait up
    to `wait_s`. Readers see the last commit and never wait (SQLite in WAL mode).
    """

    def __init__(self, url: str, wait_s: float) -> None:
        parsed = _parse(url)
        self.name = parsed.render_as_string(hide_password=True)
        self.insert = sqlite_insert if parsed.get_backend_name() == "sqlite" else postgresql_insert
        self._wait_s = wait_s
        self._engine = _build_engine(parsed, wait_s)
        self._writer = self._engine.execution_options(celloop_write=True)
        self._ready = False
        self._prepare_lock = threading.Lock()

    def close(self) -> None:
        """Close every connection; the next session opens new ones."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one moment of the index."""
        self._prepare()
        with self._explained(), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that is the only writer; committed at the end, rolled back when the body raises."""
        self._prepare()
        with self._explained(), Session(self._writer) as session, session.begin():
            yield session

    def _prepare(self) -> None:
        if self._ready:
            return
        with self._prepare_lock, self._explained():
            with self._engine.connect() as connection:
                known = sa.inspect(connection).has_table(SchemaRecord.__tablename__)
            if not known:
                with self._writer.begin() as connection:  # another process may be here too: look again inside
                    Base.metadata.create_all(connection)
                    if connection.scalar(sa.select(SchemaRecord.number)) is None:
                        connection.execute(sa.insert(SchemaRecord).values(number=SCHEMA))
            with self._engine.connect() as connection:
                found = connection.scalar(sa.select(SchemaRecord.number))
            if found in _UPGRADES:
                with self._writer.begin() as connection:
                    found = _upgrade(connection)
            if found != SCHEMA:
                raise StateError(
                    f"the index {self.name} has schema {found}, this celloop reads {SCHEMA}; use the celloop that "
                    f"made it, or move the workspace aside and start anew"
                )
            self._ready = True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except StatementError as error:
            if isinstance(error.orig, LoopError):  # raised by a column type; SQLAlchemy wraps it
                raise error.orig from None
            raise self._explain(error) from error
        except SQLAlchemyError as error:
            raise ServiceError(f"the index {self.name} failed: {error}") from error

    def _explain(self, error: StatementError) -> LoopError:
        """The database's complaint with the cure; the SQL and its parameters stay out of the text."""
        text = str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__
        said = f"the index {self.name}: {text}"
        for words, kind, cure in _CURES:
            if any(word in text for word in words):
                return kind(f"{said}; {cure.format(wait_s=self._wait_s)}")
        return ServiceError(f"{said} ({type(error).__name__})")


def _upgrade(connection: Connection) -> int | None:
    """Brings an older index to the present schema, all or nothing; another process may have done it meanwhile."""
    found = connection.scalar(sa.select(SchemaRecord.number))
    while found in _UPGRADES:
        for statement in _UPGRADES[found]:
            connection.execute(sa.text(statement))
        found += 1
        connection.execute(sa.update(SchemaRecord).values(number=found))
    Base.metadata.create_all(connection)
    return found


def execute_many(session: Session, statement: sa.Executable, parameters: list[dict[str, Any]]) -> None:
    """Run the statement once for each set of parameters; none at all is no statement."""
    if parameters:
        session.execute(statement, parameters)


def _parse(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the index URL cannot be read; {_EXAMPLES}") from error
    backend = parsed.get_backend_name()
    if backend not in _DRIVERS:
        raise ConfigError(f"the index URL asks for {backend!r}; {_EXAMPLES}")
    parsed = parsed.set(drivername=_DRIVERS[backend])
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ConfigError(f"the index URL {url} names no file, and an index in memory is lost; {_EXAMPLES}")
        folder = Path(str(parsed.database)).absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"the index cannot be made in {folder}: no such folder; make it or correct the index URL")
    return parsed


def _build_engine(url: URL, wait_s: float) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, connect_args={"timeout": wait_s})
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    options = {"connect_timeout": 10, "options": f"-c lock_timeout={int(wait_s * 1000)}"}
    try:
        engine = sa.create_engine(url, connect_args=options, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the index URL asks for PostgreSQL; install its driver: pip install 'celloop[postgres]'"
        ) from (error)
    sa.event.listen(engine, "begin", _begin_postgresql)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Set what SQLite keeps per connection; transactions are begun by `_begin_sqlite`, not by the driver."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Begin; a writer takes the lock at once, for a reader that turned writer would fail instead of waiting."""
    write = connection.get_execution_options().get("celloop_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("celloop_write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
