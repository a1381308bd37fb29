"""A workspace that was moved or copied: MLflow's file notes absolute paths, which would lead to where it was before."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = Path(".temper", "artifacts")

_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""The columns of MLflow's database that hold the address of a folder."""


def relocate(workspace: Path, database: Path, experiment: str) -> str | None:
    """Make what a workspace's registry says of its own folders true again, in one transaction.

    Where it lay before is told by the folder of the experiment; addresses elsewhere stay as they are.

    Args:
        workspace: where it lies now, with its artifacts.
        database: MLflow's SQLite file.
        experiment: the one whose artifacts lie in `.temper/artifacts`.

    Returns:
        A sentence about what was changed; None when nothing was.
    """
    here = workspace.resolve()
    if not database.is_file() or not (here / ARTIFACTS).is_dir():
        return None
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        before = _former_place(connection, experiment)
        if before is None or before == here:
            return None
        with connection:
            connection.execute("begin immediate")
            if _former_place(connection, experiment) != before:  # another process has done it
                return None
            changed = sum(
                _replace(connection, table, column, old, new)
                for table, column in _PLACES
                for old, new in ((before.as_uri(), here.as_uri()), (str(before), str(here)))
            )
    return f"this workspace was at {before}: {changed} addresses of its registry now lead here"


def _former_place(connection: sqlite3.Connection, experiment: str) -> Path | None:
    """Return the workspace that the experiment's artifacts were in, by its address."""
    try:
        asked = connection.execute("select artifact_location from experiments where name = ?", (experiment,))
        found = asked.fetchone()
    except sqlite3.OperationalError:  # a new file has no tables yet
        return None
    place = Path(unquote(urlsplit(found[0]).path)) if found and str(found[0]).startswith("file://") else None
    return place.parents[1] if place and place.parts[-2:] == ARTIFACTS.parts else None


def _replace(connection: sqlite3.Connection, table: str, column: str, old: str, new: str) -> int:
    """Replace the beginning of addresses below a folder; return how many there were."""
    where = f"substr({column}, 1, ?) = ?"
    change = f"update {table} set {column} = ? || substr({column}, ?) where {where}"  # noqa: S608  # of the places above
    return connection.execute(change, (f"{new}/", len(old) + 2, len(old) + 1, f"{old}/")).rowcount
