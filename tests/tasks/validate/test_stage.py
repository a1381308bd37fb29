from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tasks.core.errors import BadData
from tasks.core.parquet import as_records, as_table
from tasks.core.records import KINDS, ChatExample, LabelledReply, Message, PreferencePair, Record, TextExample
from tasks.ingest.stage import Reading
from tasks.validate.cross_row_checks import questions_of
from tasks.validate.decide import ValidationResult, apply_checks
from tasks.validate.feature_cache import MOST_ROWS, FeatureCache
from tasks.validate.params import Validate
from tasks.validate.profile import drift, measure, profile_page, stability
from tasks.validate.stage import check_share, partition, places_of
from tests.helpers.samples import file_source, validate_params

LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
CALLS = '[{"name": "f", "arguments": {}}]'
NUMBER = iter(range(10**6))


def chat(row_id: str, roles: str, text: str = "hello") -> ChatExample:
    """A chat whose words are no other chat's."""
    own = f"{text} n{next(NUMBER)}" if text.strip() else text
    return ChatExample(id=row_id, source="s", messages=tuple(Message(LETTERS[r], own) for r in roles))


def pair(row_id: str, chosen: str, rejected: str, prompt: str = "") -> PreferencePair:
    asked = (Message("user", prompt or f"q{next(NUMBER)}"),)
    return PreferencePair(id=row_id, source="s", prompt=asked, chosen=chosen, rejected=rejected)


def labelled(row_id: str, label: bool, prompt: str = "is it?") -> LabelledReply:
    return LabelledReply(id=row_id, source="s", prompt=(Message("user", prompt),), reply="yes, it is", label=label)


SIGNS = [("Is 3 < 5?", "Is 3 > 5?"), ("What is 8 - 2?", "What is 8 + 2?"), ("x -> !x", "x -> x"), ("2^2", "2_2")]


def tables(records: Sequence[Record]) -> dict[str, pa.Table]:
    return {kind: as_table(kind, [r for r in records if r.kind == kind]) for kind in KINDS}


def verdict_on(
    records: Sequence[Record], folder: Path, params: Validate | None = None, **given: Any
) -> ValidationResult:
    params = params or validate_params()
    return apply_checks(
        tables(records),
        given.get("benchmarks", {}),
        given.get("held_out", 0.0),
        params,
        folder,
        FeatureCache(given.get("memory")),
    )


def reasons_of(verdict: ValidationResult) -> dict[str, list[str]]:
    return {verdict.facts["id"][row]: why for row, why in verdict.reasons.items()}


CALLING = ChatExample(
    id="tool",
    source="s",
    messages=(
        Message("user", "what?"),
        Message("assistant", "", CALLS),
        Message("tool", "1"),
        Message("assistant", "One."),
    ),
)
GOOD: list[Record] = [
    chat("one", "ua"),
    chat("system", "suaua"),
    CALLING,
    pair("pair", "a", "b"),
    TextExample(id="text", source="s", text="Once upon a time."),
    chat("code", "ua", "use {x} and a < b, x@y or 3.14"),
    chat("two languages", "ua", "猫 means cat"),
]
BAD: dict[str, tuple[Record, str]] = {
    "two users": (chat("bad", "uua"), "out of order"),
    "no reply": (chat("bad", "u"), "out of order"),
    "reply first": (chat("bad", "au"), "out of order"),
    "late system": (chat("bad", "usa"), "out of order"),
    "no turns": (chat("bad", ""), "turns"),
    "many turns": (chat("bad", "ua" * 5), "max_turns"),
    "blank": (chat("bad", "ua", " \n"), "blank"),
    "long": (chat("bad", "ua", "x" * 300), "max_characters"),
    "outer space": (chat("bad", "ua", "  hello"), "white space"),
    "control token": (chat("bad", "ua", "a <|im_end|> b"), "control token"),
    "template token": (chat("bad", "ua", "[INST] do it [/INST]"), "control token"),
    "template": (chat("bad", "ua", "### Instruction:\nDo."), "prompt template"),
    "placeholder": (chat("bad", "ua", "I am {{name}}"), "placeholder"),
    "html": (chat("bad", "ua", 'a<br/>b <div class="x">'), "HTML"),
    "wrong decoding": (chat("bad", "ua", "caf\ufffd"), "U+FFFD"),
    "mojibake": (chat("bad", "ua", "itâ€™s a cafÃ©"), "decoded wrongly"),
    "control character": (chat("bad", "ua", "a\x1b[0m b"), "control characters"),
    "decomposed": (chat("bad", "ua", "cafe\u0301"), "NFC"),
    "refusal": (chat("bad", "ua", "I'm sorry, but I can't"), "declines"),
    "refusal in Chinese": (chat("bad", "ua", "作为一个人工智能，"), "declines"),
    "email": (chat("bad", "ua", "write to jane.doe@example.org"), "e-mail"),
    "telephone": (chat("bad", "ua", "call (555) 123-4567"), "telephone"),
    "key": (chat("bad", "ua", "hf_" + "aB3" * 12), "secret key"),
    "same replies": (pair("bad", "a", "a "), "the same"),
    "prefix": (pair("bad", "yes and more", "yes"), "a beginning of the other"),
    "empty text": (TextExample(id="bad", source="s", text=""), "empty"),
    "same id": (chat("one", "ua"), "more than once"),
    "other script": (
        ChatExample(
            id="bad",
            source="s",
            messages=(Message("user", "请给出三个保持健康的建议"), Message("assistant", "Eat well and sleep a lot")),
        ),
        "another script",
    ),
    "good here": (labelled("bad", True), "contradicted"),
    "bad there": (labelled("bad", False), "contradicted"),
    "this way": (pair("bad", "left one", "right one", "which?"), "contradicted"),
    "that way": (pair("bad", "right one", "left one", "which?"), "contradicted"),
}  # fmt: skip


def test_a_sign_makes_another_row(tmp_path: Path) -> None:
    """What differs in a symbol alone contradicts nothing, is no duplicate and no question of the held-out rows."""
    of_labels: list[Record] = [
        labelled(f"{n} {label}", label, prompt)
        for n, pair_of in enumerate(SIGNS)
        for label, prompt in zip((True, False), pair_of, strict=True)
    ]
    chats: list[Record] = [
        ChatExample(id=f"chat {text}", source="s", messages=(Message("user", text), Message("assistant", "The same.")))
        for pair_of in SIGNS
        for text in pair_of
    ]
    found = verdict_on([*of_labels, *chats], tmp_path / "docs")
    assert not reasons_of(found)
    assert not found.merged
    assert all(each.exact == 0 for each in found.marks.benchmarks.values())


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> ValidationResult:
    """One run of the suite over good rows and one bad row of every kind, each under an id of its own."""
    records = list(GOOD)
    for name, (record, _) in BAD.items():
        records.append(record if name == "same id" else dataclasses.replace(record, id=name))
    return verdict_on(records, tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_found_with_its_reason(verdict: ValidationResult, name: str) -> None:
    reasons = reasons_of(verdict)["one" if name == "same id" else name]
    assert any(BAD[name][1] in reason for reason in reasons), reasons


def test_good_rows_pass(verdict: ValidationResult) -> None:
    assert not reasons_of(verdict).keys() & {r.id for r in GOOD if r.id != "one"}


def test_a_row_of_unusual_length_is_found(tmp_path: Path) -> None:
    records = [chat(str(n), "ua", "hello there " * (n % 5 + 1)) for n in range(30)] + [
        chat("long", "ua", "hello " * 900)
    ]
    params = validate_params(outlier_deviations=5.0, max_characters=10**6)
    assert list(reasons_of(verdict_on(records, tmp_path, params))) == ["long"]


def test_great_expectations_ran_every_expectation(verdict: ValidationResult) -> None:
    """An empty suite is a success to Great Expectations; ours is not empty, and says so."""
    assert verdict.result["rows"]["statistics"]["evaluated_expectations"] == 24
    assert verdict.result["rows"]["success"] is False


def test_no_rows_are_no_success(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no rows"):
        verdict_on([], tmp_path)


def test_a_check_may_warn_or_be_left_out(tmp_path: Path) -> None:
    bad = dataclasses.replace(BAD["html"][0], id="h")
    warned = verdict_on([bad], tmp_path / "a", validate_params({"html": "warn"}))
    assert not warned.reasons
    assert warned.outcomes["html"].found == 1
    assert "html" not in verdict_on([bad], tmp_path / "b", validate_params({"html": "ignore"})).outcomes


def test_the_same_rows_give_the_same_pages(tmp_path: Path) -> None:
    """Also Data Docs, which come with random ids, the time of day, and a picture from elsewhere that counts views."""
    records = [*GOOD, *(dataclasses.replace(row, id=name) for name, (row, _) in BAD.items())]
    for folder in ("one", "two"):
        verdict_on(records, tmp_path / folder)
    pages = {path.relative_to(tmp_path / "one"): path for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert len(pages) > 5
    for name, path in pages.items():
        assert path.read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert "?d=" not in (tmp_path / "one" / "index.html").read_text()


def test_data_docs_and_the_profile_are_written(tmp_path: Path) -> None:
    found = verdict_on(GOOD, tmp_path / "docs")
    assert "rows" in (tmp_path / "docs" / "index.html").read_text()
    manifest = {"path": "a&b.json", "use": "train", "licence": "x", "read": 7, "refused": 0, "rows": {"chat": 5}}
    numbers = measure(found, validate_params(), {"s": manifest}, places_of(tables(GOOD)), [])
    page = profile_page(numbers, drift(numbers, numbers))
    assert "What was read as what" not in page
    told = measure(
        found, validate_params(), {"s": {**manifest, "remarks": {"<mood> of a turn is not read": 1203}}}, [], []
    )
    assert '<td>&lt;mood&gt; of a turn is not read</td><td class="n">1,203</td>' in profile_page(told)
    assert "a&amp;b.json" in page  # nothing of the data is taken for markup
    assert "://" not in page  # and nothing is fetched
    assert page.count(">steady</td>") == len(drift(numbers, numbers))
    assert "There is no earlier run to compare with." in profile_page(numbers, {})
    assert "earlier run" not in profile_page(numbers)  # a stage sees this run alone, and says nothing of others
    assert "Drift" not in profile_page(numbers)
    assert all(value == 0 for value in drift(numbers, numbers).values())


def test_the_stability_index_against_a_value_by_hand() -> None:
    """(0.5 - 0.8) ln(0.5 / 0.8) + (0.5 - 0.2) ln(0.5 / 0.2) = 0.141 + 0.27489 = 0.41589."""
    assert stability([5, 5], [8, 2]) == pytest.approx(0.415888, abs=1e-6)


def test_repairs_are_made_and_recorded(tmp_path: Path) -> None:
    broken = ChatExample(
        id="r",
        source="s",
        messages=(Message("user", " cafe\u0301\x07 "), Message("assistant", "mail a@b.org, itâ€™s ok")),
    )
    repaired = ("outer_space", "unicode_normalization", "control_characters", "emails", "mojibake")
    given = tables([chat("x", "ua"), broken])
    found = apply_checks(
        given, {}, 0.0, validate_params(dict.fromkeys(repaired, "repair")), tmp_path, FeatureCache(None)
    )
    assert not found.reasons
    now = next(r for r in as_records("chat", given["chat"]) if r.id == "r")
    assert isinstance(now, ChatExample)
    assert [m.content for m in now.messages] == ["caf\u00e9", "mail [email], it’s ok"]
    changes = {(change.id, change.check) for change in found.repaired}
    assert changes == {("r", check) for check in repaired}
    assert all(change.before != change.after for change in found.repaired)


def test_duplicates_are_merged_across_sources(tmp_path: Path) -> None:
    words = "the quick brown fox jumps over the lazy dog while twelve cats sit on one very old red wall and sing"
    one = chat("a", "ua", words)
    same = dataclasses.replace(
        one, id="b", source="t", messages=tuple(m._replace(content=f"  {m.content.upper()}\n") for m in one.messages)
    )
    near = dataclasses.replace(
        one, id="c", messages=(one.messages[0], one.messages[1]._replace(content=f"so then {one.messages[1].content}"))
    )
    other = chat("d", "ua", "something else entirely, which nobody said before")
    spaced = {"outer_space": "warn"}
    found = verdict_on([one, same, near, other], tmp_path, validate_params(spaced))
    ids = found.facts["id"]
    assert [(ids[each.row], ids[each.kept]) for each in found.merged] == [("b", "a"), ("c", "a")]
    assert not found.reasons
    longest = validate_params(spaced, duplicates={**validate_params().duplicates.model_dump(), "keep": "longest"})
    kept = verdict_on([one, same, near, other], tmp_path / "longest", longest)
    assert {kept.facts["id"][each.kept] for each in kept.merged} == {"c"}


def test_rows_that_differ_in_what_is_learnt_are_no_duplicates(tmp_path: Path) -> None:
    words = "the quick brown fox jumps over the lazy dog while twelve cats sit on one very old red wall and sing"
    turns = chat("x", "uaua", words).messages
    masked = tuple(m._replace(learn=place != 1) for place, m in enumerate(turns))
    thinking = tuple(m._replace(reasoning="hm") if place == 1 else m for place, m in enumerate(turns))
    rows = [
        ChatExample(id=row_id, source="s", messages=messages)
        for row_id, messages in (("a", turns), ("b", masked), ("c", thinking), ("d", masked), ("e", turns))
    ]
    found = verdict_on(rows, tmp_path, validate_params({"outer_space": "warn"}))
    ids = found.facts["id"]
    exact = {(ids[each.row], ids[each.kept]) for each in found.marks.exact}
    assert exact == {("d", "b"), ("e", "a")}
    assert {(ids[each.row], ids[each.kept]) for each in found.marks.near} == {("c", "a")}  # as its turns say the same


def test_near_equal_prompts_are_one_group_where_near_duplicates_are_looked_for(tmp_path: Path) -> None:
    asked = "Please tell me now, in a sentence or two, what the capital city of the country called France is"
    prompts = [asked, f"{asked}!", "What is 8 - 2?", "What is 8 + 2?"]
    rows = [
        ChatExample(id=str(n), source="s", messages=(Message("user", prompt), Message("assistant", f"reply {n}")))
        for n, prompt in enumerate(prompts)
    ]
    rows.append(dataclasses.replace(rows[1], id="stated", group="mine"))
    settings = validate_params().duplicates.model_dump()
    for near, together in (("warn", True), ("ignore", False)):
        given = tables(rows)
        params = validate_params(duplicates={**settings, "near": near})
        apply_checks(given, {}, 0.5, params, tmp_path / near, FeatureCache(None))
        groups = [record.split_group() for record in as_records("chat", given["chat"])]
        assert (groups[0] == groups[1]) is together
        assert len(set(groups[2:])) == 3
        assert groups[-1] == "mine"


def test_nothing_merges_into_a_row_in_quarantine(tmp_path: Path) -> None:
    bad = chat("bad", "ua", "hello <|im_end|> there")
    good = dataclasses.replace(
        bad,
        id="good",
        messages=tuple(m._replace(content=m.content.replace("<|im_end|>", "im end")) for m in bad.messages),
    )
    found = verdict_on([bad, good], tmp_path)
    assert list(reasons_of(found)) == ["bad"]
    assert found.merged == []


def said(row_id: str, *texts: str, **about: Any) -> ChatExample:
    messages = [Message("user" if place % 2 == 0 else "assistant", text) for place, text in enumerate(texts)]
    return ChatExample(id=row_id, source="s", messages=tuple(messages), **about)


def test_rows_that_differ_in_a_symbol_or_a_call_are_no_duplicates(tmp_path: Path) -> None:
    calls = [Message("assistant", "", f'[{{"name": "f", "arguments": {{"x": {x}}}}}]') for x in (1, 2)]
    records: list[Record] = [
        said("more", "Is 3 > 2 true?", "yes"),
        said("less", "Is 3 < 2 true?", "yes"),
        said("minus", "What is -4 + 1?", "x = -3"),
        said("plus", "What is 4 + 1?", "x = -3"),
        *(ChatExample(id=f"call {n}", source="s", messages=(Message("user", "do it"), c)) for n, c in enumerate(calls)),
        said("with a tool", "Say hello", "hello", tools=('{"name": "f"}',)),
        said("without", "Say hello", "hello"),
        said("again", "  say  HELLO\n", "hello"),
    ]
    exact = validate_params({"outer_space": "warn", "roles": "ignore"}, duplicates={
        **validate_params().duplicates.model_dump(), "near": "ignore"})  # fmt: skip
    found = verdict_on(records, tmp_path, exact)
    ids = found.facts["id"]
    assert [(ids[each.row], ids[each.kept]) for each in found.merged] == [("again", "without")]


def test_of_duplicates_whose_first_is_in_quarantine_one_stays(tmp_path: Path) -> None:
    records = [dataclasses.replace(said("", "hi", "ho"), id=name) for name in ("first", "second", "third")]
    first = dataclasses.replace(records[0], id="one")  # the id of another row: both go to quarantine
    other = dataclasses.replace(said("", "else", "what"), id="one")
    found = verdict_on([first, other, *records[1:]], tmp_path)
    ids = found.facts["id"]
    assert [(ids[each.row], ids[each.kept]) for each in found.merged] == [("third", "second")]


def test_a_key_is_masked_whole_and_found_in_calls(tmp_path: Path) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvSECRET\n-----END PRIVATE KEY-----"
    secret = "hf_" + "aB3" * 12
    call = Message("assistant", "", f'[{{"name": "f", "arguments": {{"token": "{secret}"}}}}]')
    chats: list[Record] = [
        said("text", "here", f"see {key} there"),
        ChatExample(id="call", source="s", messages=(Message("user", "log in"), call)),
    ]
    given = tables(chats)
    apply_checks(given, {}, 0.0, validate_params({"secrets": "repair"}), tmp_path, FeatureCache(None))
    kept = str(list(as_records("chat", given["chat"])))
    assert "SECRET" not in kept
    assert secret not in kept
    assert "see [secret] there" in kept


QUESTION = "Janet has sixteen ducks and each of them lays one egg a day: how many eggs does she get in a week?"


def test_questions_of_a_benchmark_are_found(tmp_path: Path) -> None:
    asked = chat("q", "ua", QUESTION).prompt_text()
    benchmark = {"exam": [asked]}
    records: list[Record] = [
        chat("good", "ua", "How many ducks does Janet have?"),
        ChatExample(id="whole", source="s", messages=(Message("user", asked.upper()), Message("assistant", "112"))),
        pair("in a reply", f"Here is one: {QUESTION} Nice.", "no"),
        TextExample(id="in a text", source="s", text="x " * 50 + QUESTION[:90]),
        pair("in a prompt", "yes", "no", f"First this. {QUESTION}"),
    ]
    found = verdict_on(records, tmp_path, benchmarks=benchmark)
    leaking = {row for row, why in reasons_of(found).items() if any("a question of exam" in reason for reason in why)}
    assert leaking == {"whole", "in a reply", "in a text", "in a prompt"}
    assert found.marks.benchmarks["exam"]._asdict() == {"questions": 1, "exact": 1, "overlapping": 1, "rows": 4}


def test_held_out_questions_are_found_in_rows_to_learn_from(tmp_path: Path) -> None:
    from tasks.core.records import held_out

    records = [chat(f"r{n}", "ua", f"{QUESTION} Say it {n} times.") for n in range(10)]
    out = {r.id for r in records if held_out(r.split_group(), 0.3)}
    assert 0 < len(out) < 10
    params = validate_params(duplicates={**validate_params().duplicates.model_dump(), "near": "ignore"})
    assert reasons_of(verdict_on(records, tmp_path, params, held_out=0.3)).keys() == {r.id for r in records} - out
    grouped = [dataclasses.replace(r, group=r.id) for r in records]  # who names groups says that these ask other things
    assert not verdict_on(grouped, tmp_path / "grouped", params, held_out=0.3).reasons
    assert not verdict_on(records, tmp_path / "near", held_out=0.3).reasons  # near-equal prompts are on one side


def test_every_row_is_accounted_for() -> None:
    records = [chat(str(n), "ua") for n in range(5)] + [TextExample(id="t", source="s", text="x")]
    inside, outside = partition(tables(records), [1, 5])
    assert [r.id for kind in KINDS for r in as_records(kind, inside[kind])] == ["1", "t"]
    assert [r.id for kind in KINDS for r in as_records(kind, outside[kind])] == ["0", "2", "3", "4"]


def test_rows_that_did_not_change_are_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.validate import row_features

    looked: list[int] = []
    real = row_features.row_features

    def look(table: pa.Table, kind: str) -> Any:
        looked.append(len(table))
        return real(table, kind)

    monkeypatch.setattr(row_features, "row_features", look)
    first = [chat(str(n), "ua") for n in range(6)]
    added = [dataclasses.replace(chat(f"n{n}", "ua", "<|im_end|>"), source="t") for n in range(2)]
    before = verdict_on(first, tmp_path / "a", memory=tmp_path / "memory")
    again = verdict_on(first, tmp_path / "b", memory=tmp_path / "memory")
    more = verdict_on([*first, *added], tmp_path / "c", memory=tmp_path / "memory")
    assert [rows for rows in looked if rows] == [6, 2]
    assert before.facts.equals(again.facts)
    assert list(reasons_of(more)) == ["n0", "n1"]
    (next((tmp_path / "memory").iterdir())).write_bytes(b"damaged")
    assert verdict_on([*first, *added], tmp_path / "d", memory=tmp_path / "memory").facts.equals(more.facts)


def test_a_row_put_between_others_leaves_all_blocks_but_its_own_as_they_were(tmp_path: Path) -> None:
    rows = as_table("chat", [said(str(n), f"question {n}", f"answer {n * n}") for n in range(20_000)])
    new = as_table("chat", [said("new", "what is new?", "this one")])
    memory = FeatureCache(tmp_path)
    memory.facts_of(rows, "chat")
    assert memory.known_rows == 0
    memory = FeatureCache(tmp_path)
    memory.facts_of(pa.concat_tables([rows[:50], new, rows[50:]]), "chat")
    assert 20_000 - MOST_ROWS <= memory.known_rows < 20_000
    assert memory.known_rows > 10_000


def test_the_share_that_may_fail(tmp_path: Path) -> None:
    records = [chat(f"good{n}", "ua") for n in range(6)] + [chat(f"bad{n}", "ua", "<|im_end|>") for n in range(6)]
    found = verdict_on(records, tmp_path)
    places = places_of(tables(records))
    check_share(found, places, validate_params(max_quarantined=0.5))
    with pytest.raises(BadData) as caught:
        check_share(found, places, validate_params(max_quarantined=0.4))
    assert caught.value.got == "50.0%"
    assert str(caught.value).count("- bad") == 5
    assert "and 1 more" in str(caught.value)


def test_a_check_that_too_few_rows_pass_fails_the_stage(tmp_path: Path) -> None:
    records = [chat(f"good{n}", "ua") for n in range(8)] + [chat(f"bad{n}", "ua", "<|im_end|>") for n in range(2)]
    checks = {**validate_params().checks.model_dump(), "control_tokens": {"action": "reject", "mostly": 0.9}}
    params = validate_params().model_copy(update={"checks": type(validate_params().checks).model_validate(checks)})
    with pytest.raises(BadData, match="mostly") as caught:
        check_share(verdict_on(records, tmp_path, params), places_of(tables(records)), params)
    assert caught.value.examples == ("validate.checks.control_tokens: 2 of 10 rows, such as bad0",)


# --- real data --------------------------------------------------------------------------------------------------------


def real(path: Path) -> list[Record]:
    return list(Reading(path.stem, file_source(path)).records())


WIDE = validate_params(max_turns=1000, max_characters=10**9, max_quarantined=1.0)


def test_the_known_defects_of_real_chats(real_data: Path, tmp_path: Path) -> None:
    """Five of Belle's thousand chats break the alternation of turns: indices 73, 455, 488, 654 and 790."""
    found = verdict_on(real(real_data / "belle_chat_1k" / "test.json"), tmp_path, WIDE)
    broken = {row for row, reasons in reasons_of(found).items() if any("order" in reason for reason in reasons)}
    assert broken == {f"test-{index + 1}" for index in (73, 455, 488, 654, 790)}


def test_the_known_defects_of_other_real_files(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "llama_factory"
    identity = verdict_on(real(folder / "identity.json"), tmp_path / "1", WIDE)
    assert identity.outcomes["placeholders"].found == 85
    pairs = verdict_on(real(folder / "dpo_zh_demo.json"), tmp_path / "2", WIDE)
    assert {name: pairs.outcomes[name].found for name in ("prefix_replies", "replacement_characters")} == {
        "prefix_replies": 1,
        "replacement_characters": 6,
    }
    assert len(pairs.marks.exact) == 11
    english = verdict_on(real(folder / "dpo_en_demo.json"), tmp_path / "3", WIDE)
    assert len(english.marks.exact) == 5
    texts = verdict_on(real(folder / "c4_demo.jsonl"), tmp_path / "4", WIDE)
    assert texts.outcomes["emails"].found == 7
    assert texts.outcomes["phone_numbers"].found >= 3
    alpaca = verdict_on(real(real_data / "stanford_alpaca" / "alpaca_5000.json"), tmp_path / "5", WIDE)
    assert alpaca.outcomes["blank_turns"].found == 2
    assert alpaca.outcomes["html"].found >= 18


def test_the_known_leaks_of_a_real_training_file(real_data: Path, tmp_path: Path) -> None:
    exams = {
        "gsm8k": questions_of(tables(real(real_data / "gsm8k" / "test.jsonl"))),
        "svamp": questions_of(tables(real(real_data / "llm_adapters" / "SVAMP" / "test.json"))),
    }
    maths = verdict_on(
        real(real_data / "llm_adapters" / "ft-training_set" / "math_data.json"), tmp_path / "1", WIDE, benchmarks=exams
    )
    assert maths.marks.benchmarks["gsm8k"].exact == 1055
    assert maths.marks.benchmarks["svamp"].exact == 800
    clean = verdict_on(real(real_data / "gsm8k" / "train.jsonl"), tmp_path / "2", WIDE, benchmarks=exams)
    assert (clean.marks.benchmarks["gsm8k"].exact, clean.marks.benchmarks["gsm8k"].overlapping) == (0, 3)


def test_what_somebody_has_looked_at_is_counted_and_not_sent_back(tmp_path: Path) -> None:
    def said(row_id: str, source: str, question: str, answer: str) -> ChatExample:
        return ChatExample(id=row_id, source=source, messages=(Message("user", question), Message("assistant", answer)))

    question = "What is the capital of France?"
    records = [
        *(said(f"{source} mail", source, f"Write to a@b.org, {source}", "Yes.") for source in ("raw", "released")),
        *(said(f"{source} asked", source, question, f"Paris, {source}") for source in ("raw", "released")),
        said("raw mail", "released", "Write to c@d.org", "No."),
    ]
    params = validate_params({"emails": "reject", "contradictions": "ignore"}, accepted=["released"])
    verdict = verdict_on(records, tmp_path, params, benchmarks={"exam": [question]})
    sent_back = sorted((verdict.facts["id"][row], verdict.facts["source"][row]) for row in verdict.reasons)
    # the mail is passed over in the accepted source alone; a question of the exam and an id that is there twice are not
    assert sent_back == [
        ("raw asked", "raw"),
        ("raw mail", "raw"),
        ("raw mail", "released"),
        ("released asked", "released"),
    ]
    assert verdict.outcomes["emails"].found == 3
