"""Read one source and write its rows, typed.

Reads:  one entry of `ingest.sources`: a file or folder of rows here or elsewhere, a snapshot of feedback, or the
        generator's lexicon.
Writes: data/raw/SOURCE/: KIND.parquet for every kind of row (chat, preference, labelled, text, pair), refused.parquet
        (place, reason, excerpt), manifest.json (source, path, sha256, formats, rows, refused, remarks, licence, use).
Params: ingest.sources.SOURCE
Fails:  a source that cannot be read or is not what it says, more malformed rows than its max_refused (65, never
        retried).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from tasks.core.artifacts import atomic_folder, digest, digests
from tasks.core.errors import BadData
from tasks.core.hub import snapshot
from tasks.core.parquet import REFUSED, text_schema, write_records, write_rows
from tasks.core.records import Record
from tasks.core.stage import run_stage
from tasks.ingest.download import Pinned, fetch
from tasks.ingest.feedback import snapshot_files
from tasks.ingest.formats import detect, parse
from tasks.ingest.params import (
    AnySource,
    FeedbackSource,
    FileSource,
    First,
    FolderSource,
    GeneratorSource,
    HubSource,
    RemoteSource,
    RowsOfFiles,
    Shuffled,
    Source,
)
from tasks.ingest.parsers import Origin, choices_of, lettered
from tasks.ingest.remarks import collected, remark
from tasks.ingest.synthetic import Recipe, generate_rows, read_lexicon
from tasks.readers.files import check_name, read_rows_and_errors
from tasks.readers.numbered_answers import number_of, numbered_from

FilesSource: TypeAlias = FileSource | FolderSource | RemoteSource | HubSource | FeedbackSource

_REFUSALS_KEPT = 100_000
_EXCERPT_CHARACTERS = 200


@dataclass
class Reading:
    """One source, being read: how many rows its files held, in which formats, and which of them were refused."""

    name: str
    source: Source
    downloads: Path = Path(".temper", "downloads")
    read: int = 0
    refused: list[BadData] = field(default_factory=list)
    excerpts: list[str] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    """How often something was taken in a way that is to be said, or was not read."""
    _first_numbers: dict[str, int] = field(default_factory=dict)

    def records(self) -> Iterator[Record]:
        """Yield the rows of the source, in its own order.

        Raises:
            BadData: the source is missing, empty, damaged, or more than its max_refused of it is malformed.
        """
        if isinstance(self.source, GeneratorSource):
            source = self.source
            recipe = Recipe(self.name, source.rows, source.count, source.seed, source.withheld)
            for record in generate_rows(recipe, read_lexicon(Path(source.path))):
                self.read += 1
                yield record
            return
        yield from self._taken(self.source)
        self._check_refused(self.source.max_refused)

    def _taken(self, source: FilesSource) -> Iterator[Record]:
        written = (
            source if isinstance(source, RowsOfFiles) else RowsOfFiles(path=source.path, max_refused=source.max_refused)
        )
        records = (record for file, place in self._files(source) for record in self._records_of(file, written, place))
        if isinstance(source.take, First):
            return islice(records, source.take.first)
        return shuffled(list(records), source.take) if isinstance(source.take, Shuffled) else records

    def _files(self, source: FilesSource) -> list[tuple[Path, str]]:
        """List the files of a source, each with its name in rows and errors."""
        if isinstance(source, RemoteSource):
            return [(fetch(Pinned(source.url, source.sha256, source.max_bytes), self.downloads), source.url)]
        if isinstance(source, HubSource):
            folder = snapshot(source.id, source.revision, [source.glob], kind="dataset")
            files = files_below(folder, source.glob, within=folder.parent.parent)  # its files are links into the cache
            return [(file, f"{origin_of(source)}/{file.relative_to(folder)}") for file in files]
        if isinstance(source, FeedbackSource):
            return [(file, str(file)) for file in snapshot_files(source)]
        if isinstance(source, FolderSource):
            files = files_below(Path(source.path), source.glob, within=Path(source.path))
            return [(file, str(file)) for file in files]
        return [(Path(source.path), source.path)]

    def _records_of(self, path: Path, source: RowsOfFiles, place: str) -> Iterator[Record]:
        whole = origin_of(source)
        last_id, repeats = "", 0
        for file, number, row in read_rows_and_errors(path, source.encoding, place):
            self.read += 1
            inside = file.removeprefix(whole).strip("/!")
            row_id = f"{self.name}-{inside}:{number}" if inside else f"{self.name}-{number}"
            repeats = repeats + 1 if row_id == last_id else 0  # several texts may stand in one line
            last_id = row_id
            origin = Origin(f"{row_id}.{repeats + 1}" if repeats else row_id, self.name, file, number)
            try:
                if isinstance(row, BadData):
                    raise row
                with collected(self.remarks):
                    form = self._form(source, row, origin)
                    if form == "choices" and _is_numbered(row):
                        row = lettered(row, self._numbered_from(path, source, place, file), origin.place)
                    records = parse(row, form, origin)
                yield from records
                self.formats.setdefault(file, form if isinstance(form, str) else "columns")
            except BadData as error:
                self.refused.append(error)
                said = row.got if isinstance(row, BadData) else json.dumps(row, ensure_ascii=False, default=str)
                self.excerpts.append(said[:_EXCERPT_CHARACTERS])
                if len(self.refused) == _REFUSALS_KEPT:
                    self._check_refused(source.max_refused)

    def _numbered_from(self, path: Path, source: RowsOfFiles, place: str, file: str) -> int:
        """Return the number of the first choice in a file, for which all of it is read once more."""
        if file not in self._first_numbers:
            rows = (each.value for each in read_rows_and_errors(path, source.encoding, place) if each.file == file)
            asked = (choices_of(row) for row in rows if isinstance(row, Mapping))
            answers = (
                (answer, len(options))
                for options, _, answer in asked
                if isinstance(options, list) and str(answer).strip() not in map(str, options)
            )
            self._first_numbers[file] = numbered_from(answers, source.numbered_from, file)
            remark(f"the choices of {file} are numbered from {self._first_numbers[file]}")
        return self._first_numbers[file]

    def _form(self, source: RowsOfFiles, row: Any, origin: Origin) -> str | dict[str, str]:
        """Return the format of a row: the columns that params name, else the format that its keys show."""
        if not isinstance(source.format, str):
            return {str(ours): name for ours, name in source.format.items()}
        return detect(row, origin.place) if source.format == "auto" else source.format

    def _check_refused(self, share: float) -> None:
        if len(self.refused) <= share * self.read:
            return
        if len(self.refused) == 1 or self.holds_nothing:
            raise self.refused[0]
        raise BadData(
            f"{len(self.refused)} of {self.read} rows are malformed",
            where=origin_of(self.source),
            expected=f"at most the share max_refused = {share}",
            examples=[error.line() for error in self.refused],
            fix=f"correct these rows, or raise ingest.sources.{self.name}.max_refused if they may be lost",
        )

    @property
    def holds_nothing(self) -> bool:
        """Return whether every row was refused for the same reason: then the file is no such data at all."""
        return 0 < len(self.refused) == self.read and len({error.what for error in self.refused}) == 1

    def refusals(self) -> list[dict[str, Any]]:
        """Return the rows that were refused, as refused.parquet has them."""
        return [
            {"place": error.where, "reason": error.line(), "excerpt": excerpt}
            for error, excerpt in zip(self.refused, self.excerpts, strict=True)
        ]


def _is_numbered(row: Any) -> bool:
    """Return whether a question of several choices has a number for its answer."""
    options, _, answer = choices_of(row)
    return bool(options) and number_of(answer) is not None


def shuffled(records: Sequence[Record], take: Shuffled) -> Iterator[Record]:
    """Yield the first records of a random order, the one that `datasets` gives after `shuffle(seed=...)`."""
    import numpy as np

    order = np.random.default_rng(take.seed).permutation(len(records))
    return (records[place] for place in order[: take.shuffled])


def origin_of(source: AnySource) -> str:
    """Describe where a source's rows come from, in one line."""
    if isinstance(source, RemoteSource):
        return source.url
    return f"hf://{source.id}@{source.revision}" if isinstance(source, HubSource) else source.path


def files_below(folder: Path, glob: str, *, within: Path) -> list[Path]:
    """List the files of a folder that match, in the order of their names.

    Raises:
        BadData: the folder is missing, nothing in it matches, or a link leads out of `within`.
    """
    if not folder.is_dir():
        raise BadData("there is no such folder", where=str(folder), fix="correct the source's path in params.yaml")
    files = sorted(file for file in folder.glob(glob) if not file.is_dir())
    for file in files:
        check_name(str(file))
        if not file.resolve().is_relative_to(within.resolve()):
            raise BadData(
                "is a link that leads out of its folder", where=str(file), got=str(file.resolve()), fix="copy the file"
            )
    if not files:
        raise BadData("no file matches", where=str(folder), got=glob, fix="correct the source's glob in params.yaml")
    return files


def main() -> None:
    """Run the stage `ingest@SOURCE`."""
    with run_stage(__doc__, "out", item="source", may_fetch=True) as stage:
        source = stage.section(f"ingest.sources.{stage.item}", Source)
        reading = Reading(stage.item, source)
        about: dict[str, Any] = {
            "source": stage.item,
            "path": origin_of(source),
            "licence": source.licence,
            "use": source.use,
        }
        with atomic_folder(stage.path("out"), about) as folder:
            about["rows"] = write_records(folder, reading.records())
            write_rows(folder / REFUSED, reading.refusals(), text_schema(("place", "reason", "excerpt")))
            about |= {"read": reading.read, "refused": len(reading.refused), "formats": reading.formats}
            about["remarks"] = dict(reading.remarks.most_common())
            path = Path(source.path)
            if isinstance(source, RemoteSource):
                about["sha256"] = source.sha256
            elif not isinstance(source, HubSource):
                about["sha256"] = digests(path) if path.is_dir() else digest(path)
        rows = ", ".join(f"{count} {kind}" for kind, count in about["rows"].items() if count)
        print(f"ingest {stage.item}: {rows} from {about['path']}; {len(reading.refused)} refused", flush=True)
        for text, count in reading.remarks.most_common():
            print(f"ingest {stage.item}: {text} ({count} rows)", flush=True)
