"""The database of a record: SQLite or PostgreSQL, told by a file's name or a URL. What was committed is on the disk.

    said.db, sqlite:///said.db                 a file, which its owner alone may read
    postgresql://user:password@host/database   with the driver psycopg2, or postgresql+psycopg:// with psycopg

A URL with a password is given in the environment (TEMPER_RECORD), where no list of processes shows it; libpq's own
ways, PGPASSWORD and ~/.pgpass, do as well. No error and no log has more of a URL than `shown` tells.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    QueuePool,
    Table,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)

from tasks.core.errors import BadParams, TemperError, Transient

VARIABLE = "TEMPER_RECORD"
_EXPECTED = "a file, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
_WAIT_S = 30
"""So long a writer waits for another one, and for a server that says nothing."""
_CONNECT_S = 10
_LOCK = 0x7465_6D70_6572
"""PostgreSQL's name of the lock under which tables are made."""

_DURABLE = text(
    "select set_config('synchronous_commit', 'on', true) where current_setting('synchronous_commit') = 'off'"
)
"""For a transaction, where the server was told not to wait for its disk."""


def url_of(place: str | Path | URL) -> URL:
    """Return where a record is as a URL; the path of a file becomes absolute.

    Raises:
        BadParams: it is a URL of something else.
    """
    if isinstance(place, URL):
        return place
    if isinstance(place, Path) or "://" not in place:
        return URL.create("sqlite", database=str(Path(place).resolve()))
    scheme = place.partition("://")[0]
    try:
        url = make_url(place)
        known = url.get_backend_name() == "postgresql" and not url.get_dialect().is_async
    except (ArgumentError, ValueError, NoSuchModuleError) as error:  # whose words repeat the password
        raise BadParams("is no URL of a record", where=f"{scheme}://...", expected=_EXPECTED) from error
    except ImportError as error:
        raise _no_driver(scheme, error) from error
    if url.get_backend_name() == "sqlite" and url.database and not (url.query or url.host):
        return URL.create("sqlite", database=str(Path(url.database).resolve()))
    if not known:
        raise BadParams("is no URL of a record", where=shown(url), expected=_EXPECTED)
    return url


def url_given(option: str | None) -> URL | None:
    """Return where the record is that a command was told of: by its option, else by TEMPER_RECORD; None: nowhere.

    Raises:
        BadParams: it is a URL of something else, or has a password in a command line.
    """
    if option:
        return url_named(option)
    return url_of(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def url_named(place: str) -> URL:
    """Return where the record is that a command line names.

    Raises:
        BadParams: it is a URL of something else, or has a password.
    """
    url = url_of(place)
    if url.password or "password" in url.query:
        raise BadParams(
            "has its password in a command line, which everybody on this machine can read",
            where=shown(url),
            fix=f"set the URL in the variable {VARIABLE}, or the password in PGPASSWORD or ~/.pgpass; and change it",
        )
    return url


def shown(url: URL) -> str:
    """Return a record's place as it may be shown: a file's path, or server and database."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    port = f":{url.port}" if url.port else ""
    return f"{url.get_backend_name()}://{url.host or ''}{port}/{url.database or ''}"


class Database:
    """Tables in a database; several threads and processes may use them.

    Args:
        url: of `url_of`.
        tables: what is made where nothing is.
        schema: the version of the tables.
        write: False opens what is there to read it, and changes nothing.

    Raises:
        BadParams: something else is there, of another version or by another program, or a driver is missing.
        Transient: the server does not answer.
    """

    def __init__(self, url: URL, tables: MetaData, schema: int, *, write: bool) -> None:
        self.url, self._tables, self._schema, self._write = url, tables, schema, write
        self.sqlite = url.get_backend_name() == "sqlite"
        try:
            self._engine = _sqlite(Path(str(url.database)), write=write) if self.sqlite else _postgresql(url, write)
        except ImportError as error:
            raise _no_driver(url.drivername, error) from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def place(self) -> str:
        """Where it is, as it may be shown."""
        return shown(self.url)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Yield a connection whose changes are all on the disk after the block, or none of them.

        Raises:
            Transient: the database does not answer, or cannot write.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise Transient("the record does not answer", where=self.place, got=_said(error)) from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _open(self) -> None:
        try:
            with self._engine.begin() as connection:
                found = self._version(connection)
                if not found and self._write:
                    self._make(connection)
                    found = self._schema
        except OperationalError as error:
            kind: type[TemperError] = BadParams if self.sqlite else Transient
            what = "is no record of conversations" if self.sqlite else "the record does not answer"
            raise kind(what, where=self.place, got=_said(error)) from error
        except (SQLAlchemyError, OSError) as error:
            raise BadParams("is no record of conversations", where=self.place, got=_said(error)) from error
        if found != self._schema:
            raise BadParams(
                "is of another version of temper" if found else "is no record of conversations",
                where=self.place,
                got=f"schema {found}" if found else "",
                expected=f"what `temper serve --record` wrote, schema {self._schema}",
            )

    def _version(self, connection: Connection) -> int:
        """Return the version of the tables; 0 where there are none."""
        if self.sqlite:
            return int(connection.exec_driver_sql("pragma user_version").scalar_one())
        if self._write:
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        there = inspect(connection).has_table(_VERSIONS.name)
        return int(connection.execute(select(_VERSIONS.c.schema)).scalar_one()) if there else 0

    def _make(self, connection: Connection) -> None:
        self._tables.create_all(connection, checkfirst=False)  # fails where another program has tables of these names
        if self.sqlite:
            connection.exec_driver_sql(f"pragma user_version = {self._schema}")
        else:
            _VERSIONS.create(connection)
            connection.execute(insert(_VERSIONS).values(schema=self._schema))


_VERSIONS = Table("temper_record", MetaData(), Column("schema", Integer, nullable=False))


def _sqlite(file: Path, *, write: bool) -> Engine:
    def connect() -> sqlite3.Connection:
        if write:
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # what people say is nobody else's to read
        address = f"{file.as_uri()}?mode={'rw' if write else 'ro'}"
        connection = sqlite3.connect(address, uri=True, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
        if write:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")  # a commit is on the disk when it returns
            connection.execute("pragma secure_delete = on")
        connection.execute("pragma foreign_keys = on")
        return connection

    # one connection, for which threads wait in turn: SQLite has one writer, and lets others try again at intervals
    engine = create_engine(
        "sqlite://", creator=connect, poolclass=QueuePool, pool_size=1, max_overflow=0, hide_parameters=True
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("begin immediate" if write else "begin")

    return engine


def _postgresql(url: URL, write: bool) -> Engine:
    engine = create_engine(
        url,
        connect_args={"connect_timeout": _CONNECT_S, "tcp_user_timeout": _WAIT_S * 1000},
        pool_pre_ping=True,  # connections that a restart of the server ended are made anew
        hide_parameters=True,  # they are what people said
        execution_options={} if write else {"postgresql_readonly": True},
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if write:
            connection.execute(_DURABLE)

    return engine


def _said(error: Exception) -> str:
    """Return what the driver says of a connection or the disk; other words of it may repeat what people said."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    harmless = isinstance(error, OperationalError | OSError) or type(error) is DatabaseError
    return str(cause).strip() if harmless else type(cause).__name__


def _no_driver(scheme: str, error: ImportError) -> BadParams:
    driver = error.name or "psycopg2"
    return BadParams(
        "needs a driver that is not installed",
        where=f"{scheme}://...",
        got=f"no module {driver}",
        fix=f"pip install {'psycopg2-binary' if driver == 'psycopg2' else 'psycopg[binary]'}",
    )
