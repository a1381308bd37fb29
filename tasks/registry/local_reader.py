"""MLflow's SQLite file of a workspace, read without MLflow, whose import alone takes two seconds of a processor.

It answers what reports ask of `MlflowClient`, by the same names and with the same fields as far as they are read;
whoever writes goes through MLflow. It knows one form of MLflow's tables, that of the pinned version.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

SCHEMA = "dc11669786a5"
"""The last migration of the tables that are read here, as MLflow names it."""

_WAIT_S = 60
"""Another process may be writing."""

_VERSIONS = """
    select name, version, coalesce(run_id, ''), creation_time from model_versions
    where name = ? and current_stage <> 'Deleted_Internal'"""
"""MLflow keeps a version that was deleted, for its number."""

_RUNS = """
    select run_uuid from runs where experiment_id = ? and lifecycle_stage = 'active'
    order by start_time desc, run_uuid limit ?"""


class RegistryReader(Protocol):
    """What reports ask of a registry: of MLflow's client, or of the file alone."""

    def get_registered_model(self, name: str) -> Any:
        """Return a model, with its `aliases` and `tags`."""

    def search_model_versions(self, filter_string: str, *, max_results: int, page_token: str | None) -> Any:
        """Return versions, with the `token` of the next page."""

    def get_experiment_by_name(self, name: str) -> Any:
        """Return an experiment, with its `experiment_id` and `lifecycle_stage`, or None."""

    def search_runs(self, experiment_ids: list[str], *, max_results: int) -> Any:
        """Return the runs of experiments that were not deleted, the latest first."""

    def download_artifacts(self, run_id: str, path: str, dst_path: str) -> str:
        """Return the path of a run's artifact on this machine."""


class RegisteredModel(NamedTuple):
    """A model's aliases with their versions, and its tags; a model that does not exist has neither."""

    aliases: Mapping[str, str]
    tags: Mapping[str, str]


class ModelVersion(NamedTuple):
    """A version of a model; `creation_timestamp` in milliseconds since 1970."""

    name: str
    version: int
    run_id: str
    creation_timestamp: int
    tags: Mapping[str, str]


class Experiment(NamedTuple):
    """An experiment; `lifecycle_stage` is active or deleted."""

    experiment_id: str
    lifecycle_stage: str


class RunInfo(NamedTuple):
    """A run's id."""

    run_id: str


class RunData(NamedTuple):
    """A run's params."""

    params: Mapping[str, str]


class Run(NamedTuple):
    """A run."""

    info: RunInfo
    data: RunData


class Page(list[ModelVersion]):
    """All versions of a model: no further page comes."""

    token = ""


class LocalRegistry:
    """MLflow's SQLite file, to be read; where there is none yet, nothing is registered."""

    def __init__(self, database: Path) -> None:
        self._database = database

    def get_registered_model(self, name: str) -> RegisteredModel:
        """Return the aliases and tags of a model."""
        with self._reading() as rows:
            aliases = rows("select alias, version from registered_model_aliases where name = ?", name)
            tags = rows("select key, value from registered_model_tags where name = ?", name)
            return RegisteredModel({alias: str(version) for alias, version in aliases}, dict(tags))

    def search_model_versions(self, filter_string: str, *, max_results: int, page_token: str | None) -> Page:
        """Return all versions of the model that the filter `name = '...'` names, on one page."""
        found = re.fullmatch("name = '(.*)'", filter_string)
        if found is None:
            raise ValueError(f"only versions of one model are read here, not {filter_string}")
        with self._reading() as rows:
            tags: dict[int, dict[str, str]] = {}
            for number, key, value in rows(
                "select version, key, value from model_version_tags where name = ?", found[1]
            ):
                tags.setdefault(number, {})[key] = value
            some = rows(_VERSIONS, found[1])
            return Page(ModelVersion(name, n, run, made, tags.get(n, {})) for name, n, run, made in some)

    def get_experiment_by_name(self, name: str) -> Experiment | None:
        """Return an experiment, also one that was deleted."""
        with self._reading() as rows:
            some = rows("select experiment_id, lifecycle_stage from experiments where name = ?", name)
            return next((Experiment(str(number), stage) for number, stage in some), None)

    def search_runs(self, experiment_ids: list[str], *, max_results: int) -> Sequence[Run]:
        """Return the latest runs of an experiment that were not deleted."""
        (experiment,) = experiment_ids
        with self._reading() as rows:
            names = [name for (name,) in rows(_RUNS, int(experiment), max_results)]
            params = [dict(rows("select key, value from params where run_uuid = ?", name)) for name in names]
            return [Run(RunInfo(name), RunData(each)) for name, each in zip(names, params, strict=True)]

    def download_artifacts(self, run_id: str, path: str, dst_path: str) -> str:
        """Return the path of a run's artifact where it lies.

        Raises:
            OSError: it does not lie on this machine.
        """
        with self._reading() as rows:
            (address,) = next(rows("select artifact_uri from runs where run_uuid = ?", run_id), (None,))
        if address is None:
            raise OSError(f"there is no run {run_id}")
        place = urlsplit(address)
        if place.scheme not in ("", "file"):
            raise OSError(f"{address} is not on this machine")
        found = Path(unquote(place.path) if place.scheme else address) / path
        found.stat()
        return str(found)

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """Yield what asks the tables; without a file no row answers."""
        if not self._database.is_file():
            yield lambda *_: iter(())
            return
        with closing(_opened(self._database)) as connection:
            yield lambda statement, *values: connection.execute(statement, values)


def reads(database: Path) -> bool:
    """Return whether a file is of the form that is read here, or is still to be made."""
    if not database.is_file():
        return True
    try:
        with closing(_opened(database)) as connection:
            return connection.execute("select version_num from alembic_version").fetchall() == [(SCHEMA,)]
    except sqlite3.DatabaseError:  # MLflow says what is wrong with it
        return False


def _opened(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=_WAIT_S)
