"""The commands that need no workspace, by their real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.files import convert, inspect, show_tokens
from tasks.core.errors import BadData, BadParams
from tasks.ingest.stage import Reading
from tasks.render.params import Render
from tests.conftest import ROOT
from tests.helpers.samples import file_source

CHAT = {"messages": [{"role": "user", "content": "What is 1 plus 2?"}, {"role": "assistant", "content": "3"}]}
TOOLS = {
    "conversations": [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": [1]}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a", "weight": 0},
    ],
    "tools": '[{"name": "f"}]',
}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
LABELLED = {"prompt": "q", "completion": "a", "label": False}
TALK = {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["h", "i"], ["j", "k"]]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_inspect_says_what_a_run_would_make_of_a_file(tmp_path: Path) -> None:
    bad = {"messages": [*CHAT["messages"], {"role": "user", "content": "I am {{name}}"}]}
    other = {"messages": [{"role": "user", "content": "Say hi\u0007."}, {"role": "assistant", "content": "hi there"}]}
    path = write(tmp_path / "some chats.jsonl", CHAT, CHAT, bad, other, {"messages": None})
    done = command(tmp_path, "inspect", path.name, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert {
        key: found[key] for key in ("format", "rows", "kinds", "rejected", "repaired", "duplicates", "contamination")
    } == {
        "format": "conversations",
        "rows": 5,
        "kinds": {"chat": 4},
        "rejected": 2,
        "repaired": 1,
        "duplicates": 1,
        "contamination": 0,
    }
    assert '"messages" holds no turns' in found["reasons"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some chats.jsonl"]  # nothing was written


def test_inspect_looks_for_a_benchmark_and_through_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", CHAT, PAIR)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "LICENSE").write_text("do")
    exam = write(tmp_path / "exam.json", {"question": "what is 1 PLUS 2", "answer": "3"})
    found = inspect.inspect(tmp_path, [exam])
    assert found["format"] == "conversations, prompt_reply"
    assert [Path(file["path"]).name for file in found["files"] if file["error"]] == ["empty.jsonl"]
    assert found["benchmarks"][str(exam)]["exact"] == 1


def test_a_file_without_rows_is_refused_in_one_block(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    done = command(tmp_path, "inspect", "a.jsonl")
    assert done.returncode == 65
    assert done.stderr.startswith("error: a.jsonl: is empty (0 bytes)")
    with pytest.raises(BadData, match="no file here holds rows"):
        inspect.inspect(tmp_path, [])


def test_render_shows_what_is_trained(tmp_path: Path) -> None:
    dog = {"messages": [{"role": "user", "content": "狗?"}, {"role": "assistant", "content": "狗。"}]}
    path = write(tmp_path / "a.jsonl", CHAT, dog)
    done = command(tmp_path, "render", path.name, "--tokenizer", str(ROOT / "models" / "tiny"), "--show", "2")
    assert done.returncode == 0, done.stderr
    assert "user\nWhat is 1 plus 2?<|im_end|>\n<|im_start|>assistant\n[[3<|im_end|>]]\n" in done.stdout
    assert "[[狗。<|im_end|>]]" in done.stdout  # characters of several tokens stay whole
    assert "2 rows, 2 rendered" in done.stdout


def test_both_replies_of_a_pair_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIR, {"prompt": "q", "chosen": "x", "rejected": "y"})
    found = show_tokens.render(path, ROOT / "models" / "tiny", 2, Render(), None)
    assert [row.place.rpartition(" ")[2] for row in found.shown] == ["chosen", "rejected"]
    assert (found.counts["rows"], found.counts["rendered"], found.refused) == (2, 4, {})


KEPT: dict[str, list[Any]] = {
    "messages": [CHAT, TOOLS, PAIR, LABELLED],
    "conversations": [CHAT, TOOLS, PAIR, LABELLED],
    "alpaca": [CHAT, TALK],
    "preference": [PAIR],
}


@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_what_is_converted_means_the_same(tmp_path: Path, form: str, ending: str) -> None:
    for number, row in enumerate(KEPT[form]):
        source, target = write(tmp_path / "in.jsonl", row, row), tmp_path / f"{number}.{ending}"
        assert convert.convert(source, target, form) == 2
        meant = [vars_of(r) for r in Reading("s", file_source(source)).records()]
        assert [vars_of(r) for r in Reading("s", file_source(target)).records()] == meant


def vars_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__ if name not in ("id", "file", "row")}


LOST: dict[str, list[Any]] = {
    "alpaca": [TOOLS, PAIR, LABELLED, {"messages": CHAT["messages"][:1]}, {"text": "t"}],
    "preference": [CHAT, LABELLED, {"text": "t"}],
    "conversations": [{"text": "t"}, {"input": "q", "target": "a"}],
    "messages": [{"text": "t"}],
}


@pytest.mark.parametrize("form", LOST)
def test_what_would_be_lost_is_refused_and_nothing_written(tmp_path: Path, form: str) -> None:
    for row in LOST[form]:
        source, target = write(tmp_path / "in.jsonl", row), tmp_path / "out.jsonl"
        with pytest.raises(BadData, match="without losing something"):
            convert.convert(source, target, form)
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_convert_knows_its_forms_and_files(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", CHAT)
    for target, form in ((tmp_path / "out.csv", "messages"), (tmp_path / "out.json", "chatml"), (source, "messages")):
        with pytest.raises(BadParams):
            convert.convert(source, target, form)
    assert json.loads(source.read_text()) == CHAT


def test_real_files_convert_and_come_back(real_data: Path, tmp_path: Path) -> None:
    for name, form in (
        ("llama_factory/glaive_toolcall_en_demo.json", "messages"),
        ("llama_factory/dpo_zh_demo.json", "preference"),
        ("llama_factory/kto_en_demo.json", "conversations"),
        ("llama_factory_old/oaast_sft_zh.json", "alpaca"),
    ):
        source, target = real_data / name, tmp_path / "out.json"
        convert.convert(source, target, form)
        meant = [vars_of(r) for r in Reading("s", file_source(source)).records()]
        assert [vars_of(r) for r in Reading("s", file_source(target)).records()] == meant
