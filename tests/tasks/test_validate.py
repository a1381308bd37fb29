from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import BadData
from tasks.ingest import read_source
from tasks.params import FileSource, Validate
from tasks.records import ChatExample, Message, PreferencePair, Record, TextExample
from tasks.validate import Verdict, check_share, flatten, judge, reason_rows
from tests.samples import VALIDATE

LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def chat(row_id: str, roles: str, text: str = "hello") -> ChatExample:
    return ChatExample(id=row_id, source="s", messages=tuple(Message(LETTERS[r], text) for r in roles))


GOOD: list[Record] = [
    chat("one", "ua"),
    chat("system", "suaua"),
    chat("tool", "uata"),
    PreferencePair(id="pair", source="s", prompt=(Message("user", "q"),), chosen="a", rejected="b"),
    TextExample(id="text", source="s", text="Once upon a time."),
]
BAD: dict[str, tuple[Record, str]] = {
    "two users": (chat("bad", "uua"), "alternate"),
    "no reply": (chat("bad", "u"), "alternate"),
    "reply first": (chat("bad", "au"), "alternate"),
    "late system": (chat("bad", "usa"), "alternate"),
    "no turns": (chat("bad", ""), "turns"),
    "many turns": (chat("bad", "ua" * 5), "max_turns"),
    "blank": (chat("bad", "ua", " \n"), "blank"),
    "long": (chat("bad", "ua", "x" * 300), "max_characters"),
    "control token": (chat("bad", "ua", "a <|im_end|> b"), "control token"),
    "wrong decoding": (chat("bad", "ua", "caf\ufffd"), "U+FFFD"),
    "same replies": (
        PreferencePair(id="bad", source="s", prompt=(Message("user", "q"),), chosen="a", rejected="a "),
        "the same",
    ),
    "empty text": (TextExample(id="bad", source="s", text=""), "empty"),
    "same id": (chat("one", "ua"), "more than once"),
}


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    """One run of the suite over good rows and one bad row of every kind, each under an id of its own."""
    import dataclasses

    records = list(GOOD)
    for name, (record, _) in BAD.items():
        records.append(record if name == "same id" else dataclasses.replace(record, id=name))
    return judge(flatten(records), VALIDATE, tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_found_with_its_reason(verdict: Verdict, name: str) -> None:
    row = "one" if name == "same id" else name
    assert any(BAD[name][1] in reason for reason in verdict.reasons[row]), verdict.reasons[row]


def test_good_rows_pass(verdict: Verdict) -> None:
    assert not verdict.reasons.keys() & {r.id for r in GOOD if r.id != "one"}


def test_great_expectations_ran_every_expectation(verdict: Verdict) -> None:
    """An empty suite is a success to Great Expectations; ours is not empty, and says so."""
    assert verdict.result["statistics"]["evaluated_expectations"] == 8
    assert verdict.result["success"] is False


def test_no_rows_are_no_success(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no rows"):
        judge(flatten([]), VALIDATE, tmp_path)


def test_data_docs_are_written(tmp_path: Path) -> None:
    judge(flatten(GOOD), VALIDATE, tmp_path / "docs")
    assert "rows" in (tmp_path / "docs" / "index.html").read_text()


def test_the_share_that_may_fail() -> None:
    verdict = Verdict({f"r{n}": ["why"] for n in range(6)}, {})
    check_share(verdict, len(verdict.reasons), 12, VALIDATE)
    with pytest.raises(BadData) as caught:
        check_share(verdict, len(verdict.reasons), 11, VALIDATE)
    assert caught.value.got == "54.5%"
    assert str(caught.value).count("- r") == 5
    assert "and 1 more" in str(caught.value)


def test_every_reason_is_written_down() -> None:
    verdict = Verdict({"one": ["a", "b"]}, {})
    assert reason_rows(GOOD, verdict) == [
        {"id": "one", "source": "s", "reason": "a"},
        {"id": "one", "source": "s", "reason": "b"},
    ]


def test_the_known_defects_of_real_chats(real_data: Path, tmp_path: Path) -> None:
    """Five of Belle's thousand chats break the alternation of turns: indices 73, 455, 488, 654 and 790."""
    path = real_data / "belle_chat_1k" / "test.json"
    source = FileSource(kind="file", path=str(path), format="auto", licence="GPL-3.0")
    records = list(read_source("belle", source))
    found = judge(flatten(records), Validate(max_quarantined=1.0, max_turns=1000, max_characters=10**9), tmp_path)
    broken = {row for row, reasons in found.reasons.items() if any("alternate" in reason for reason in reasons)}
    assert broken == {f"belle-{index + 1}" for index in (73, 455, 488, 654, 790)}
