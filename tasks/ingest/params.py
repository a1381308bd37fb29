"""Params of a source of rows: one section for each kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tasks.core.params import Commit, Count, FilePath, HubName, Name, Positive, Section, Seed, Share, SourceFacts
from tasks.readers.numbered_answers import NumberedFrom


class AnySource(SourceFacts):
    """Settings that every source has."""

    path: FilePath
    """What DVC watches: a file or folder, relative to the workspace or absolute."""


class GeneratorSource(AnySource):
    """Rows made from a seed (synthetic.py); `path` is the lexicon, a YAML file of the words it draws from."""

    kind: Literal["generator"]
    rows: Literal["chat", "preference", "text", "talk"] = "chat"
    """Chats, preference pairs, plain text of facts, or small talk as plain text."""
    count: Count = 1000
    """Rows to make."""
    seed: Seed = 1
    """The same seed, count and lexicon give the same rows."""
    withheld: Share = 0.0
    """Facts in this share of the hash range are never drawn; at least `render.held_out` keeps held-out facts unseen."""


Format = Literal[
    "auto",
    "conversations",
    "alpaca",
    "seed_tasks",
    "prompt_reply",
    "choices",
    "preference",
    "ranked",
    "labelled",
    "prompt_text",
    "text",
    "pair",
]
Field_ = Literal["prompt", "reply", "system", "chosen", "rejected", "label", "text", "input", "target"]


class First(Section):
    """The beginning of a source."""

    first: Count
    """So many rows."""


class Shuffled(Section):
    """Rows from anywhere in a source."""

    shuffled: Count
    """So many rows, the first of a random order."""
    seed: Seed = 42
    """Of that order."""


class PartOfRows(AnySource):
    """Settings of how much of the rows is taken, and how many may be malformed."""

    max_refused: Share = 0.01
    """The stage fails when a larger share of the rows is malformed; the others are listed in refused.parquet."""
    take: Literal["all"] | First | Shuffled = "all"
    """Which rows: `all`, {first: 10000}, or {shuffled: 1000, seed: 42}, as `datasets` shuffles them."""


class RowsOfFiles(PartOfRows):
    """Settings of how files of rows are read."""

    format: Format | Annotated[dict[Field_, str], Field(min_length=1)] = "auto"
    """How rows are written; `auto` looks at the first of each file; or which column is what: {prompt: Q, reply: A}."""
    encoding: Literal["utf-8", "latin-1", "cp1252", "mac-roman", "gb18030", "big5", "shift-jis", "euc-jp", "euc-kr"] = (
        "utf-8"
    )
    """Of text files."""
    numbered_from: NumberedFrom = "auto"
    """The number of the first choice of a question, where answers are numbers: 0, 1, or what all of a file tell."""


class FileSource(RowsOfFiles):
    """Rows of one file: json, jsonl, csv, tsv, parquet, arrow or txt, also packed as gz, zst or zip."""

    kind: Literal["file"]


class FolderSource(RowsOfFiles):
    """Rows of the files of a folder."""

    kind: Literal["folder"]
    glob: Annotated[str, StringConstraints(min_length=1)] = "**/*"
    """Which files, such as `*.jsonl` or `**/*.parquet`."""


class RemoteSource(RowsOfFiles):
    """Rows of one file elsewhere, pinned to its content."""

    kind: Literal["remote"]
    path: Literal["data/remote.md"] = "data/remote.md"
    """Stands in for what is not on this disk: a DVC dependency cannot be left out."""
    url: Annotated[str, StringConstraints(pattern=r"^(https|s3|gs|gcs|az|abfs|abfss)://[^\s@]+$")]
    """Where it is; object stores need the library of fsspec that knows them, and its environment variables."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole file; anything else is refused."""
    max_bytes: Count = 2**34
    """A larger file is refused while it comes."""


class HubSource(RowsOfFiles):
    """Rows of the files of a dataset of the Hugging Face hub, pinned to a commit."""

    kind: Literal["hub"]
    path: Literal["data/remote.md"] = "data/remote.md"
    """Stands in for what is not on this disk: a DVC dependency cannot be left out."""
    id: HubName
    """Owner and name."""
    revision: Commit
    """The whole commit hash; branches and tags move and are refused."""
    glob: Annotated[str, StringConstraints(min_length=1)] = "**/*.parquet"
    """Which files, such as `data/train-*.parquet`."""


FeedbackRows = Literal["chats", "labels", "preferences"]


class FeedbackSource(PartOfRows):
    """What people said of answers, as rows: a snapshot of what `temper serve --record` keeps.

    `temper feedback` renews the snapshot in `path`; the stage reads nothing else.
    """

    kind: Literal["feedback"]
    record: FilePath | None = None
    """The SQLite file of the record; without it, the file or database that TEMPER_RECORD names."""
    rows: Annotated[list[FeedbackRows], Field(min_length=1)] = ["chats", "labels", "preferences"]
    """Better answers as chats, thumbs as labels, better and preferred answers as preference pairs."""
    consent: dict[str, str] = {}
    """What the `metadata` of a request must say, such as {training: "yes"}; with nothing, all are taken."""
    days: Positive | None = None
    """Only conversations of the last so many days; without it, of whatever age."""
    forget_after: Positive | None = None
    """`temper feedback` first deletes older conversations from the record, for good, in days; without it, none."""


Source = Annotated[
    GeneratorSource | FileSource | FolderSource | RemoteSource | HubSource | FeedbackSource,
    Field(discriminator="kind"),
]


class Ingest(Section):
    """Sources of the rows; one DVC stage `ingest@NAME` for each."""

    sources: Annotated[dict[Name, Source], Field(min_length=1)]
