from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import BadData, Transient
from tasks.core.parquet import read_records, write_records
from tasks.core.records import KINDS, ChatExample, Message, PreferencePair, Record, SeqPair
from tasks.ingest.params import FolderSource, GeneratorSource, HubSource
from tasks.ingest.stage import Reading
from tests.conftest import ROOT
from tests.helpers.samples import file_source

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CHAT = {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def rows(path: Path, **changes: Any) -> list[Record]:
    return list(Reading("s", file_source(path, **changes)).records())


def write(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def folder_source(path: Path, glob: str) -> FolderSource:
    return FolderSource.model_validate({**file_source(path).model_dump(), "kind": "folder", "glob": glob})


def test_rows_keep_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ALPACA, CHAT | {"conversations": CHAT["conversations"]}][:1] * 2)
    found = rows(path)
    assert [(r.id, r.source, r.file, r.row) for r in found] == [("s-1", "s", str(path), 1), ("s-2", "s", str(path), 2)]
    assert isinstance(found[0], ChatExample)
    assert found[0].messages == (Message("user", "Add.\n1 and 2"), Message("assistant", "3"))


def test_inputs_and_targets_are_the_same_from_every_form_of_a_real_file(real_data: Path) -> None:
    """RAFT's twitter_complaints as an array, as lines and as tables, by the names of its columns."""
    forms = [real_data / "fms_artifacts" / "testdata" / form for form in ("json", "jsonl", "parquet", "arrow")]
    read = [
        rows(form / f"twitter_complaints_input_output.{form.name}", format={"input": "input", "target": "output"})
        for form in forms
    ]
    pairs = [[(r.input, r.target) for r in found if isinstance(r, SeqPair)] for found in read]
    assert len(pairs[0]) == 50
    assert {target for _, target in pairs[0]} == {"complaint", "no complaint"}
    assert all(other == pairs[0] for other in pairs[1:])
    columns = {"input": "Tweet text", "target": "text_label"}  # RAFT's own names
    few = [rows(form / f"twitter_complaints_small.{form.name}", format=columns) for form in forms]
    assert all([(r.input, r.target) for r in found if isinstance(r, SeqPair)] == pairs[0][:10] for found in few)


def test_one_malformed_row_costs_that_row(tmp_path: Path) -> None:
    """A number that is none, a comma too many, a cut line, a row of a table with a field too many: and where."""
    good = json.dumps(ALPACA)
    lines = [good, '{"instruction": NaN}', good, '{"instruction": "a", }', good, good, '{"instruction": "cu']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text("[" + ",\n".join(lines[:-1]) + "]")
    (tmp_path / "a.csv").write_text("prompt,reply\na,b\na,b,c\nc,d\n")
    for name, kept, lost in (
        ("a.jsonl", [1, 3, 5, 6], [2, 4, 7]),
        ("a.json", [1, 3, 5, 6], [2, 4]),
        ("a.csv", [2, 4], [3]),
    ):
        reading = Reading("s", file_source(tmp_path / name, max_refused=0.5))
        assert [record.row for record in reading.records()] == kept
        assert [int(error.where.split(":")[1]) for error in reading.refused] == lost
        with pytest.raises(BadData):
            rows(tmp_path / name)


def test_an_array_that_is_cut_has_no_end_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" + json.dumps(ALPACA) + ', {"instruction": "cu')
    with pytest.raises(BadData, match="is cut off"):
        rows(tmp_path / "a.json", max_refused=1.0)


def test_parquet_gives_the_rows_that_lines_give(tmp_path: Path) -> None:
    """Arrow gives every object the keys of all others; those are not the row's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = [{"name": "warmth", "arguments": {"town": "Oslo"}}, {"name": "lamp", "arguments": {"on": True}}]
    chats = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "content": "1"},
            ],
            "tools": [{"type": "function", "function": {"name": call["name"], "parameters": call["arguments"]}}],
        }
        for call in calls
    ]
    lines = rows(write(tmp_path / "a.jsonl", chats))
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "a.parquet")
    assert [(r.messages, r.tools) for r in rows(tmp_path / "a.parquet") if isinstance(r, ChatExample)] == [
        (r.messages, r.tools) for r in lines if isinstance(r, ChatExample)
    ]


def test_numbered_answers_are_read_alike_in_a_whole_file(tmp_path: Path) -> None:
    """ARC, flat: numbers from 1 beside letters."""
    (tmp_path / "arc.csv").write_text("question,a,b,answerKey\nIron?,x,y,1\nOak?,x,y,B\n")
    reading = Reading("s", file_source(tmp_path / "arc.csv"))
    assert [r.messages[-1].content for r in reading.records() if isinstance(r, ChatExample)] == ["A", "B"]
    assert reading.remarks == {f"the choices of {tmp_path / 'arc.csv'} are numbered from 1": 1}
    (tmp_path / "some.csv").write_text("question,A,B,C,answer\nIron?,x,y,z,1\nOak?,x,y,z,2\n")
    with pytest.raises(BadData, match="numbered from 0 or from 1"):
        rows(tmp_path / "some.csv")
    found = rows(tmp_path / "some.csv", numbered_from=0)
    assert [r.messages[-1].content for r in found if isinstance(r, ChatExample)] == ["B", "C"]


def test_what_was_taken_and_what_else_stood_there_is_said(tmp_path: Path) -> None:
    given = [
        {"prompt": "q", "text": "q a", "score": 1},
        {"prompt": "q", "text": "a", "score": None},
        {"question": "q", "answer": "a", "output": "o"},
        {"chosen": "Say hi. Hello", "rejected": "Say hi. No"},
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "see <img src=x>"}],
    ]
    reading = Reading("s", file_source(write(tmp_path / "a.jsonl", given)))
    read = list(reading.records())
    assert [r.messages[-1].content for r in read if isinstance(r, ChatExample)] == ["a", "a", "a", "see <img src=x>"]
    assert [(r.prompt[0].content, r.chosen, r.rejected) for r in read if isinstance(r, PreferencePair)] == [
        ("Say hi.", "Hello", "No")
    ]
    assert set(reading.remarks) == {
        '"text" beside "prompt" is taken as the prompt and its reply',
        '"text" beside "prompt" is taken as the reply',
        'the column "score" is not read',
        'the column "output" is not read',
        "what chosen and rejected begin with is taken as their prompt",
        "a row is a list of turns, taken as its messages",
        '"content" holds an <img> address, which is taken as words',
    }


def test_the_text_of_a_row_is_not_touched(tmp_path: Path) -> None:
    text = "  two spaces, \u00a0 and a newline\n"
    chat = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
    (found,) = rows(write(tmp_path / "a.jsonl", [chat]))
    assert isinstance(found, ChatExample)
    assert {m.content for m in found.messages} == {text}


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "in er").mkdir()
    write(tmp_path / "b.jsonl", [ALPACA])
    write(tmp_path / "in er" / "a.jsonl", [CHAT, CHAT])
    write(tmp_path / "other.txt", [1])
    reading = Reading("s", folder_source(tmp_path, "**/*.jsonl"))
    assert [r.id for r in reading.records()] == ["s-b.jsonl:1", "s-in er/a.jsonl:1", "s-in er/a.jsonl:2"]
    assert sorted(reading.formats.values()) == ["alpaca", "conversations"]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    outside = write(tmp_path / "secret.jsonl", [ALPACA])
    (tmp_path / "data" / "link.jsonl").symlink_to(outside)
    with pytest.raises(BadData, match="leads out of its folder"):
        list(Reading("s", folder_source(tmp_path / "data", "*.jsonl")).records())
    with pytest.raises(BadData, match="no file matches"):
        list(Reading("s", folder_source(tmp_path / "data", "*.csv")).records())


def test_a_dataset_of_the_hub_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real code of the hub client, offline, over a cache laid out as it lays it out: files are links to blobs."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "datasets--someone--rows" / "snapshots" / revision / "data"
    folder.mkdir(parents=True)
    (tmp_path / "datasets--someone--rows" / "blobs").mkdir()
    blob = write(tmp_path / "datasets--someone--rows" / "blobs" / "abc", [ALPACA, ALPACA])
    (folder / "train.jsonl").symlink_to(blob)
    values = {
        **file_source(tmp_path).model_dump(),
        "kind": "hub",
        "path": "data/remote.md",
        "id": "someone/rows",
        "revision": revision,
        "glob": "data/*.jsonl",
    }
    found = list(Reading("s", HubSource.model_validate(values)).records())
    assert [(r.id, r.file) for r in found] == [
        (f"s-data/train.jsonl:{n}", f"hf://someone/rows@{revision}/data/train.jsonl") for n in (1, 2)
    ]
    with pytest.raises(Transient, match="cannot be fetched"):
        list(Reading("s", HubSource.model_validate({**values, "revision": "f" * 40})).records())
    with pytest.raises(ValueError, match="revision"):
        HubSource.model_validate({**values, "revision": "main"})


BAD = {"instruction": "Add.", "output": None}


def test_rows_of_several_kinds_may_stand_in_one_file(tmp_path: Path) -> None:
    """Told row by row: none loses its label or its replies to the format of the first."""
    labelled = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": False}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = rows(write(tmp_path / "a.jsonl", [CHAT, labelled, pair, {"text": "t"}]))
    assert [r.kind for r in found] == ["chat", "labelled", "preference", "text"]


def test_texts_in_one_line_have_ids_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>three\n<|endoftext|>four")
    assert [r.id for r in rows(tmp_path / "a.txt")] == ["s-1", "s-1.2", "s-1.3", "s-2"]


def test_one_malformed_row_is_told_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ALPACA, BAD])
    with pytest.raises(BadData) as caught:
        rows(path)
    assert (caught.value.what, caught.value.where) == ('field "output" is not text', f"{path}:2")
    assert caught.value.exit_code == 65


def test_all_malformed_rows_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ALPACA] * 10 + [BAD] * 7)
    with pytest.raises(BadData) as caught:
        rows(path, max_refused=0.1)
    assert caught.value.what == "7 of 17 rows are malformed"
    assert str(caught.value).count("a.jsonl:1") == 5
    assert "and 2 more" in str(caught.value)


def test_a_share_of_malformed_rows_may_be_lost_and_is_written_down(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ALPACA] * 9 + [BAD])
    reading = Reading("s", file_source(path, max_refused=0.1))
    assert len(list(reading.records())) == 9
    assert (reading.read, len(reading.refused)) == (10, 1)
    (refusal,) = reading.refusals()
    assert refusal == {
        "place": f"{path}:10",
        "reason": f'{path}:10: field "output" is not text (got null)',
        "excerpt": json.dumps(BAD),
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "a.jsonl", [CHAT] * 3))
    assert write_records(tmp_path, iter(found)) == dict.fromkeys(KINDS, 0) | {"chat": 3}
    assert list(read_records(tmp_path)) == found


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """40 MB of rows; all of them as objects would take several times that."""
    import tracemalloc

    path = tmp_path / "a.jsonl"
    line = json.dumps({**ALPACA, "output": "word " * 400}) + "\n"
    with path.open("w") as file:
        for _ in range(20_000):
            file.write(line)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    write_records(tmp_path / "out", Reading("s", file_source(path)).records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size


def test_the_generator_is_a_source() -> None:
    generator = GeneratorSource.model_validate(
        {
            "kind": "generator",
            "path": str(ROOT / "data" / "lexicon.yaml"),
            "use": "train",
            "rows": "chat",
            "count": 7,
            "seed": 1,
            "withheld": 0.0,
            "licence": "Apache-2.0",
        }
    )
    assert len(list(Reading("g", generator).records())) == 7


# --- real data --------------------------------------------------------------------------------------------------------

NO_ROWS = {
    "dataset_info.json",  # one object: a catalogue
    "ceval_mapping.json",
    "cmmlu_mapping.json",
    "image_dataset.jsonl",  # pictures
    "winograd_wsc.jsonl",  # two contexts for one continuation: a benchmark of its own form
    "winograd_small.jsonl",
    "twitter_complaints_small.json",  # columns of its own names
    "twitter_complaints_small.jsonl",
    "malformatted_data.json",
    "config.json",
    "generation_config.json",
}


def counted(real_data: Path) -> dict[Path, int]:
    """The number of records of each file, as its SOURCE.txt counts them."""
    found, name = {}, ""
    for source in sorted(real_data.glob("*/SOURCE.txt")):
        for line in source.read_text().splitlines():
            if line and not line.startswith(" "):
                name = line
            elif match := re.search(r"records=(\d+)", line):
                found[source.parent / name] = int(match[1])
    return {path: count for path, count in found.items() if path.is_file()}


def test_every_real_file_of_rows_is_read_by_nothing_but_its_path(real_data: Path) -> None:
    files = {path: count for path, count in counted(real_data).items() if path.name not in NO_ROWS}
    assert len(files) > 40
    for path, count in files.items():
        reading = Reading("s", file_source(path, max_refused=0.2))  # v2 of alpaca_zh_en has untranslated rows
        list(reading.records())
        assert reading.read == count, path
        assert len(reading.refused) in ((2,) if "/v2/" in str(path) else (0,)), path


def test_real_files_that_hold_no_rows_are_refused_as_what_they_are(real_data: Path) -> None:
    for name, what in {
        "hh_rlhf/helpful-base/test.jsonl.gz": "Git LFS pointer",
        "alpaca_zh_en_52k/v2/alpaca_chinese_part_0.json": "is empty",
        "fms_artifacts/testdata/json/malformatted_data.json": "is not JSON",
        "fms_artifacts/testdata/json/empty_data.json": "is empty",
        "fms_artifacts/testdata/parquet/chat_dataset_tokenized_sequence.parquet": "token ids",
        "fms_artifacts/testdata/jsonl/image_dataset.jsonl": "holds pictures",
        "llama_factory/dataset_info.json": "is one JSON object",
        "cs336_fixtures/corpus.en": "no kind of file that is known",
        "stories260k/stories260K.bin": "is not text",
        "nltk_text/genesis.zip": "is not UTF-8",
        "nltk_text/shakespeare.zip": "is a web page or XML",
    }.items():
        with pytest.raises(BadData, match=what):
            rows(real_data / name)


def test_one_table_in_four_forms_gives_the_same_rows(real_data: Path) -> None:
    folder = real_data / "fms_artifacts" / "testdata"
    forms = [
        [
            r.messages
            for r in rows(folder / ending / f"twitter_complaints_input_output.{ending}")
            if isinstance(r, ChatExample)
        ]
        for ending in ("json", "jsonl", "parquet", "arrow")
    ]
    assert len(forms[0]) == 50
    assert all(form == forms[0] for form in forms)


def test_real_zips_are_read_member_by_member(real_data: Path) -> None:
    reading = Reading("s", file_source(real_data / "mcq_exams" / "ceval.zip"))
    found = list(reading.records())
    unanswered = sum(len(r.messages) == 1 for r in found if isinstance(r, ChatExample))
    assert (len(found), unanswered) == (13948, 12342)  # the test split has no answers
    assert len(list(Reading("s", file_source(real_data / "mcq_exams" / "cmmlu.zip")).records())) == 11917


def test_the_chats_and_stories_that_the_readme_counts(real_data: Path) -> None:
    chats = rows(real_data / "belle_chat_1k" / "test.json")
    assert sum(len(r.messages) for r in chats if isinstance(r, ChatExample)) == 5403
    assert len(rows(real_data / "tinystories_2mib" / "tinystories_sample.txt")) == 2317
    empty = [r.row for r in rows(real_data / "stanford_alpaca" / "alpaca_5000.json")
             if isinstance(r, ChatExample) and not r.messages[-1].content]  # fmt: skip
    assert empty == [2336, 4659]  # rows 2335 and 4658, counted from 0


def test_the_first_rows_of_a_source_or_those_that_datasets_would_shuffle_to_its_front(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = [f"text {n}" for n in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def taken(take: Any) -> list[Any]:
        source = file_source(tmp_path / "rows.jsonl", format="text", take=take)
        return [record.text for record in Reading("s", source).records()]  # type: ignore[attr-defined]

    assert taken("all") == texts
    assert taken({"first": 7}) == texts[:7]
    assert taken({"first": 70}) == texts
    theirs = Dataset.from_dict({"text": texts}).shuffle(seed=42).select(range(9))["text"]
    assert taken({"shuffled": 9, "seed": 42}) == list(theirs)


def test_no_more_of_a_source_is_read_than_is_taken(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{broken')
    source = file_source(tmp_path / "rows.jsonl", format="text", take={"first": 2})
    assert len(list(Reading("s", source).records())) == 2
