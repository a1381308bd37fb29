"""What the command line does with any file or folder of rows, without a workspace: inspect, render, convert."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks import graph
from tasks.errors import BadData, BadParams
from tasks.files import is_prose
from tasks.ingest import Reading
from tasks.outputs import whole_file
from tasks.params import FileSource, Params
from tasks.params_reading import load
from tasks.records import KINDS, ChatExample, LabelledReply, PreferencePair, Record, SeqPair

if TYPE_CHECKING:
    import pyarrow as pa

SHIPPED = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"


class FileFound(NamedTuple):
    """One file that was looked into: its format and rows, or why it holds none."""

    path: str
    format: str
    rows: int
    refused: int
    error: str


def inspect(path: Path, against: Sequence[Path]) -> dict[str, Any]:
    """What a run would make of a file, or of all files of a folder.

    Args:
        path: the file or folder.
        against: files with the questions of benchmarks.

    Returns:
        `format`, `rows` (as the files hold them), `kinds`, and how many rows would be `rejected`, `repaired`, merged
        as `duplicates` and found as `leaks`; with `reasons` and `repairs` by name, `benchmarks`, and all `files`.

    Raises:
        BadData: the file holds no rows, or no file of the folder does.
    """
    from tasks.compare import questions_of
    from tasks.judge import judge
    from tasks.remembered import Memory

    params = nearest_params()
    files, records, refused = _look_into(path)
    found = {
        "path": str(path),
        "format": _named({file.path: file.format for file in files if file.format}),
        "rows": sum(file.rows for file in files),
        "kinds": dict(Counter(record.kind for record in records)),
        "files": [file._asdict() for file in files],
    }
    reasons = Counter(error.what for error in refused)
    if not records:
        return {**found, "rejected": len(refused), "repaired": 0, "duplicates": 0, "leaks": 0, "reasons": dict(reasons)}
    benchmarks = {str(each): questions_of(_tables(Reading("", any_file(each)).records())) for each in against}
    with TemporaryDirectory() as docs:
        verdict = judge(
            _tables(records), benchmarks, params.render.held_out, params.validate_, Path(docs), Memory(None)
        )
    reasons += Counter(reason for why in verdict.reasons.values() for reason in why)
    return {
        **found,
        "rejected": len(refused) + len(verdict.reasons),
        "repaired": len({change.id for change in verdict.repaired}),
        "duplicates": len(verdict.marks.exact) + len(verdict.marks.near),
        "leaks": int((verdict.marks.leaks > 0).sum()),
        "reasons": dict(reasons.most_common()),
        "repairs": dict(Counter(change.check for change in verdict.repaired)),
        "warnings": {
            name: outcome.found
            for name, outcome in verdict.outcomes.items()
            if outcome.found and not outcome.rows and not name.endswith("duplicates")
        },
        "benchmarks": {name: leaks._asdict() for name, leaks in verdict.marks.benchmarks.items()},
    }


def _look_into(path: Path) -> tuple[list[FileFound], list[Record], list[BadData]]:
    """The files, their rows, and why rows were refused."""
    files: list[FileFound] = []
    records: list[Record] = []
    refused: list[BadData] = []
    for file in _files(path):
        reading = Reading(str(file), any_file(file))
        try:
            found = list(reading.records())
            if reading.holds_nothing:
                raise reading.refused[0]
        except BadData as error:
            if path.is_file():
                raise
            files.append(FileFound(str(file), "", 0, 0, error.line()))
            continue
        records += found
        refused += reading.refused
        files.append(FileFound(str(file), _named(reading.formats), reading.read, len(reading.refused), ""))
    if not records and not refused:
        raise BadData("no file here holds rows", where=str(path), examples=[file.error for file in files])
    return files, records, refused


class Shown(NamedTuple):
    """A rendered row: its place, and its tokens as text, each with whether it is learnt.

    Tokens that only together are a character stand together.
    """

    place: str
    tokens: list[tuple[str, bool]]


def render(path: Path, tokenizer_folder: Path, show: int) -> tuple[list[Shown], dict[str, int], Counter[str]]:
    """Renders a file's rows with a tokenizer, chats by its template.

    Returns:
        The first rows to show, counts (rows, rendered, tokens, learnt tokens), and why rows were refused.
    """
    from tasks.templates import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    shown: list[Shown] = []
    counts, refused = {"rows": 0, "rendered": 0, "tokens": 0, "learnt": 0}, Counter[str]()
    for record in Reading("", any_file(path)).records():
        counts["rows"] += 1
        try:
            parts = _rendered(record, tokenizer)
        except BadData as error:
            refused[error.what] += 1
            continue
        for name, ids, mask in parts:
            counts["rendered"] += 1
            counts["tokens"] += len(ids)
            counts["learnt"] += sum(mask)
            if len(shown) < show:
                shown.append(Shown(f"{record.file}:{record.row}{name}", _as_text(tokenizer, ids, mask)))
    return shown, counts, refused


def _rendered(record: Record, tokenizer: Any) -> list[tuple[str, list[int], list[bool]]]:
    """A row as token ids and what is learnt; of two replies both, and of an input and its target both."""
    from tasks.render import tokens_of_pairs
    from tasks.templates import Answered, Chat, render_chat, render_replies

    if isinstance(record, ChatExample):
        ids, mask, _ = render_chat(tokenizer, record.messages, record.tools)
        return [("", ids, mask)]
    if isinstance(record, (PreferencePair, LabelledReply)):
        pair = isinstance(record, PreferencePair)
        replies = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record.reply,)
        (answered,) = render_replies(tokenizer, [Chat(record.prompt, record.tools)], [replies])
        if not isinstance(answered, Answered):
            raise answered
        names = (" chosen", " rejected") if pair else ("",)
        return [
            (name, answered.prompt + reply, [False] * len(answered.prompt) + [True] * len(reply))
            for name, reply in zip(names, answered.replies, strict=True)
        ]
    if isinstance(record, SeqPair):
        ((given, wanted),) = tokens_of_pairs(tokenizer, [record])
        return [(" input", given, [False] * len(given)), (" target", wanted, [True] * len(wanted))]
    raise BadData(f"rows of the kind {record.kind} are not rendered")


def _as_text(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    waiting: list[int] = []
    for place, token in enumerate(ids):
        waiting.append(token)
        text = str(tokenizer.decode(waiting))
        last = place + 1 == len(ids) or mask[place + 1] != mask[place]
        if last or not text.endswith("\ufffd") or len(waiting) == LONGEST_CHARACTER:
            pieces.append((text, mask[place]))
            waiting = []
    return pieces


LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most, of one character in UTF-8."""


def convert(source: Path, target: Path, form: str) -> int:
    """Writes a file's rows in another form, as .json (an array) or .jsonl; returns how many.

    Raises:
        BadData: a row cannot be read, or holds what the form cannot; then nothing was written.
        BadParams: the form or the file's ending is none that is known.
    """
    from tasks.unparse import FORMS

    if form not in FORMS:
        raise BadParams("is no form to write", where=f"--to {form}", expected=", ".join(FORMS))
    if target.suffix not in (".json", ".jsonl"):
        raise BadParams("is no kind of file to write", where=str(target), expected="an ending of .json or .jsonl")
    if target.resolve() == source.resolve():
        raise BadParams("is the file that is read", where=str(target), fix="name another")
    count = 0
    with whole_file(target) as file:
        array = target.suffix == ".json"
        for record in Reading("", any_file(source, max_refused=0.0)).records():
            line = json.dumps(FORMS[form](record), ensure_ascii=False)
            file.write(((("[\n" if not count else ",\n") + line) if array else line + "\n").encode())
            count += 1
        if array:
            file.write(b"\n]\n")
    return count


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = sorted(file for file in found if not is_prose(file.name))
    if not files:
        raise BadData("holds no files", where=str(path), fix="name a file, or a folder of files")
    return files


def any_file(path: Path, max_refused: float = 1.0) -> FileSource:
    """A file of rows, told by its content; up to this share of malformed rows are left out."""
    return FileSource(
        kind="file",
        path=str(path),
        use="train",
        licence="?",
        format="auto",
        encoding="utf-8",
        max_refused=max_refused,
        take="all",
    )


def _named(formats: Mapping[str, str]) -> str:
    return ", ".join(sorted(set(formats.values())))


def nearest_params() -> Params:
    """The checks of the workspace that one stands in, or else those of the quickstart."""
    try:
        return load(graph.find_workspace(Path.cwd()) / graph.PARAMS)
    except BadParams:
        return load(SHIPPED)


def _tables(records: Sequence[Record] | Iterator[Record]) -> dict[str, pa.Table]:
    from tasks.tables import as_table

    rows = list(records)
    return {kind: as_table(kind, [row for row in rows if row.kind == kind]) for kind in KINDS}
