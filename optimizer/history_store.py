"""The history's file: where it lies, its schema, how it is opened. `perwatt.history` says what is kept in it.

One SQLite file, one short transaction for each job, no server. The journal is SQLite's rollback journal, not a
write-ahead log: that needs shared memory, which network file systems don't have, and one write per job gains nothing by
it. Writers wait for each other. What a killed writer left half done is rolled back by whoever opens the file next.
Readers change nothing: an older schema is read through a migrated copy in memory, so that a read-only file can be read.

Limits: a file system whose locks don't work (some network mounts) can lose or damage any SQLite file; the history is
meant to lie on a local disk, one for each machine or one for each CI cache.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from perwatt.errors import InputError

APPLICATION_ID = 0x70776874
"""Tells our files from other programs' (`PRAGMA application_id`): nothing is ever written into a stranger's database."""

WAIT_S = 20.0
"""How long a process waits for others that write; each holds the file for milliseconds."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE machines (digest TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY,
            job TEXT NOT NULL,
            position INTEGER NOT NULL,
            created TEXT NOT NULL,
            kind TEXT NOT NULL,
            side TEXT NOT NULL,
            name TEXT NOT NULL,
            label TEXT NOT NULL,
            commit_id TEXT,
            dirty INTEGER NOT NULL,
            digest TEXT,
            target TEXT NOT NULL,
            scenario TEXT NOT NULL,
            operating_point TEXT NOT NULL,
            execution_precision TEXT,
            machine TEXT NOT NULL REFERENCES machines (digest),
            perwatt_version TEXT NOT NULL,
            verdict TEXT,
            disturbed INTEGER NOT NULL,
            UNIQUE (job, position)
        )""",
        """CREATE TABLE figures (
            run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
            figure TEXT NOT NULL,
            unit TEXT NOT NULL,
            metric TEXT,
            value REAL,
            low REAL,
            high REAL,
            n INTEGER NOT NULL,
            method TEXT,
            boundary TEXT,
            ratio REAL,
            ratio_low REAL,
            ratio_high REAL,
            floor REAL,
            PRIMARY KEY (run, figure)
        ) WITHOUT ROWID""",
    ),
    (
        "ALTER TABLE runs ADD COLUMN subject_kind TEXT",
        "ALTER TABLE runs ADD COLUMN repository TEXT",
        "ALTER TABLE runs ADD COLUMN place TEXT",
    ),
)
"""Step by step from an empty file to today's schema. `PRAGMA user_version` counts the steps that a file has behind it:
a step that was released is never changed, a new one is added below."""


def history_path(path: str | Path | None = None) -> Path:
    """`path`, else $PERWATT_HISTORY, else perwatt/history.sqlite in $XDG_DATA_HOME (~/.local/share where that is not
    set). Raises InputError where there is no home folder."""
    try:
        if path is not None or (path := os.environ.get("PERWATT_HISTORY")):
            return Path(path).expanduser()
        # A relative $XDG_DATA_HOME is to be ignored, says its specification.
        data = Path(os.environ.get("XDG_DATA_HOME", ""))
        return (data if data.is_absolute() else Path.home() / ".local" / "share") / "perwatt" / "history.sqlite"
    except RuntimeError:
        raise InputError(
            "there is no home folder to keep the history in", fix="set PERWATT_HISTORY to a file"
        ) from None


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """The history at `path`, made or migrated where need be, in a transaction that is committed at the end, or not at
    all. Raises InputError for whatever is wrong with the file or its folder."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(_connected(path, "rwc")) as connection:
            # At once for writing: two that begin by reading could each wait for the other.
            connection.execute("BEGIN IMMEDIATE")
            _migrate(connection, path)
            yield connection
            connection.execute("COMMIT")


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The history at `path` in today's schema, unchanged on disk. Raises InputError for whatever is wrong with it."""
    # Opened for writing where that is allowed, so that what a killed writer left can be rolled back.
    with _explained(path), closing(_connected(path, "rw")) as connection:
        if _version(connection, path) == len(MIGRATIONS):
            yield connection
            return
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
            connection.backup(copy)
            _migrate(copy, path)
            yield copy


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=WAIT_S, isolation_level=None
    )
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """How many migrations the file has behind it. Raises InputError where it isn't ours or is of a later perwatt."""
    ((application,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master")
    if application != APPLICATION_ID and (application or version or tables):
        raise InputError(f"{path} is the database of another program", fix="name another file")
    if version > len(MIGRATIONS):
        raise InputError(
            f"{path} was written by a later perwatt (its schema is {version}, this one knows {len(MIGRATIONS)})",
            fix="upgrade perwatt, or name another file",
        )
    return int(version)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema up to today's. The version is asked for in here: another process may just have done it."""
    version = _version(connection, path)
    if version == len(MIGRATIONS):
        return
    for statement in (statement for step in MIGRATIONS[version:] for statement in step):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


_OUTSIDE = {
    sqlite3.SQLITE_BUSY: "another process holds it: try again when that is done",
    sqlite3.SQLITE_LOCKED: "another process holds it: try again when that is done",
    sqlite3.SQLITE_FULL: "make room on the disk, or set PERWATT_HISTORY to a file elsewhere",
    **dict.fromkeys(
        (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR),
        "set PERWATT_HISTORY to a file that can be written",
    ),
    sqlite3.SQLITE_PROTOCOL: "its file system has no locks: set PERWATT_HISTORY to a file on a local disk",
}
"""What is no fault of the file's, and what to do about it."""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What SQLite and the file system say, in a line for a person."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _OUTSIDE:
            raise InputError(f"the history {path} can't be used: {error}", fix=_OUTSIDE[code]) from None
        said = "is no SQLite database" if code == sqlite3.SQLITE_NOTADB else f"is damaged or was altered: {error}"
        raise InputError(f"{path} {said}", fix="move it away, and a new one is begun, or name another file") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"the history {path} can't be used: {why}", fix=_OUTSIDE[sqlite3.SQLITE_CANTOPEN]) from None
