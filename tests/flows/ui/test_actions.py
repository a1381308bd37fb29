"""What is done on the pages, and what it leaves behind: in the ledger, the registry, the record and the workspace."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from flows.review import quarantine
from flows.review.side_by_side import pairs
from flows.serve.feedback import snapshot
from flows.ui import chat
from flows.ui.compare import question, sides
from flows.ui.quarantine import as_sent
from tasks.core.errors import BadData
from tasks.core.parquet import write_records
from tasks.core.records import ChatExample, Message, PreferencePair, Record, TextExample, held_out
from tasks.orchestration.params import load_params
from tasks.registry.alias_log import moves
from tasks.registry.client import connect
from tests.conftest import Beside, wait_for
from tests.flows.serve.registry import MODEL
from tests.flows.ui.team import NAMES, ROWS, Person, Team


def ledger(team: Team) -> list[tuple[str, str, str, str, str]]:
    found = moves(connect(team.root), MODEL)
    return [(move.action, move.before, move.to, move.by, move.reason) for move in found[1:]]


def notice(person: Person, answer: Any) -> str:
    """What the page says to which an action leads; it says it once."""
    assert answer.status_code == 303, answer.text
    found = re.search(r'class="done">(.*?)</p>', person.read(answer.headers["location"]))
    assert found is not None
    assert 'class="done"' not in person.read(answer.headers["location"])
    return unescape(found[1])


# --- promotions and rollbacks -----------------------------------------------------------------------------------------


def test_an_approver_promotes_and_rolls_back_and_the_ledger_says_who_and_why(team: Team) -> None:
    anna = team.client("approver")
    page = anna.read("/ui/promotions/2")
    assert "6" not in re.findall(r"FAILED", page)
    for said in ("against base", "against champion", "score 0.950, champion 1 0.750: +0.200", "Approve", "Refuse"):
        assert said in page
    assert anna.submit("/ui/promotions/2", decision="approve", reason=" ").status_code == 400
    assert notice(anna, anna.submit("/ui/promotions/2", decision="approve", reason="<b>better</b>")) == (
        "Version 2 (qlora) is champion now."
    )
    assert "&lt;b&gt;better&lt;/b&gt;" in anna.read("/ui/history")
    assert notice(anna, anna.submit("/ui/history", to="1", reason="rude")) == "Version 1 (qlora) is champion again."
    assert ledger(team) == [("promote", "1", "2", "anna", "<b>better</b>"), ("rollback", "2", "1", "anna", "rude")]
    assert "Approve" not in team.client("labeller").read("/ui/promotions/2")
    assert "It is champion" in anna.read("/ui/promotions/1")


def test_what_does_not_pass_the_gate_is_not_promoted_and_what_is_refused_is_in_the_ledger(team: Team) -> None:
    anna = team.client("approver")
    assert "FAILED" in anna.read("/ui/promotions/3")
    assert notice(anna, anna.submit("/ui/promotions/3", decision="approve", reason="please")) == (
        "Version 3 did not pass the gate."
    )
    assert notice(anna, anna.submit("/ui/promotions/2", decision="refuse", reason="rude")) == "Version 2 is refused."
    assert ledger(team) == [("refuse", "1", "2", "anna", "rude")]
    assert anna.submit("/ui/history", to="2", reason="no").status_code == 400
    assert anna.get("/ui/promotions/99").status_code == 400


def test_while_something_else_holds_the_workspace_nothing_is_moved(team: Team) -> None:
    anna = team.client("approver")
    token = anna.token()
    with FileLock(team.root / ".temper" / "lock"):  # as another process does
        answer = anna.post("/ui/promotions/2", data={"csrf": token, "decision": "refuse", "reason": "no"})
    assert answer.status_code == 503
    assert "holds the workspace" in answer.text
    assert ledger(team) == []


def test_a_promotion_that_waits_gets_its_word_from_the_page(team: Team) -> None:
    yaml = YAML(typ="safe")
    params = yaml.load(team.root / "params.yaml")
    params["promote"] |= {"approval": "human", "approval_timeout_s": 300}
    yaml.dump(params, team.root / "params.yaml")
    anna = team.client("approver")
    with Beside(team.root, "promote", "--version", "2", "--reason", "retrained") as promotion:
        wait_for("question", lambda: "waiting for approval" in promotion.said(), promotion)
        wait_for("note", lambda: "waits for approval" in anna.read("/ui/live"), promotion)
        assert "Version 2 waits for a word." in anna.read("/ui/promotions")
        said = notice(anna, anna.submit("/ui/promotions/2", decision="approve", reason="looks good"))
        assert said == "Version 2: approved; the promotion that waited goes on."
        assert promotion.process.wait(timeout=120) == 0, promotion.said()
    ((action, before, to, _, reason),) = ledger(team)
    assert (action, before, to) == ("promote", "1", "2")
    assert reason == "retrained; approved by anna; looks good"
    assert "waits for approval" not in anna.read("/ui/live")


# --- votes ------------------------------------------------------------------------------------------------------------


def test_ten_votes_side_by_side_are_evidence_and_never_training_data(team: Team, tmp_path: Path) -> None:
    lena = team.client("labeller")
    both = pairs(team.root, "1", "2")
    assert len(both) == 40  # of 200, one is right on 150 and the other on 190
    assert all(pair.answers["1"].prediction != pair.answers["2"].prediction for pair in both)
    versions = {"first": "1", "second": "2"}
    for number in range(10):
        values = question(team.root, team.service.record, NAMES["labeller"], "1", "2")
        assert values["left"] == 40 - number
        part = lena.post(
            "/ui/compare",
            data={"csrf": lena.token(), **versions, "item": values["pair"].name, "better": "21"[number % 5 == 0]},
            headers={"HX-Request": "true"},
        )
        assert part.status_code == 200
        assert f"You preferred version {'21'[number % 5 == 0]}" in part.text
        assert "<html" not in part.text
    assert "version 1: 2 votes, version 2: 8 votes" in lena.read("/ui/compare", **versions).replace("\n", " ")
    assert "8 of 10" in team.client("viewer").read("/ui/promotions/2")
    again = question(team.root, team.service.record, "somebody else", "1", "2")
    assert again["left"] == 40
    with pytest.raises(BadData, match="holds nothing to train on") as caught:
        snapshot(tmp_path / "said.db", tmp_path / "rows")
    assert caught.value.examples == ("an item that models are evaluated with: 20",)


def test_of_somebodys_votes_on_an_item_the_last_one_counts(team: Team) -> None:
    lena, item = team.client("labeller"), pairs(team.root, "1", "2")[0].name
    for better in ("1", "2", "1"):
        answer = lena.submit("/ui/compare", first="2", second="1", item=item, better=better)
        assert answer.status_code == 303
    assert "version 1: 1 vote, version 2: 0 votes" in lena.read("/ui/compare", first="1", second="2")
    for wrong in ({"item": "none"}, {"better": "3"}, {"second": "1", "first": "1"}, {"second": "99"}):
        fields = {"first": "1", "second": "2", "item": item, "better": "1", **wrong}
        assert lena.submit("/ui/compare", **fields).status_code == 400, wrong


def test_which_version_is_left_is_the_same_for_a_voter_and_even_over_items(workspace: Path) -> None:
    both = pairs(workspace, "1", "2")
    order = [sides(pair, "lena") for pair in both]
    assert order == [sides(pair, "lena") for pair in both]
    assert 8 <= order.count(("1", "2")) <= 32  # of 40; a fair coin leaves this range once in 10,000


def test_skipping_goes_through_all_items_and_comes_back(workspace: Path) -> None:
    seen, after = [], ""
    for _ in range(41):
        after = question(workspace, None, "lena", "1", "2", after)["pair"].name
        seen.append(after)
    assert len(set(seen)) == 40
    assert seen[40] == seen[0]


@pytest.fixture
def talking(workspace: Path, pico_base: Path, tmp_path: Path) -> Any:
    """The pages with a model in memory, which answers whatever it is asked."""
    with Team.at(workspace, tmp_path / "said.db", pico_base) as team:
        yield team


def fields_of(part: str) -> list[dict[str, str]]:
    """The hidden fields of each form of a page."""
    forms = re.findall(r"<form.*?</form>", part, re.DOTALL)
    found = [re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form) for form in forms]
    return [{name: unescape(value) for name, value in fields} for fields in found]


def test_a_vote_in_the_chat_becomes_a_pair_to_learn_from(talking: Team, tmp_path: Path) -> None:
    lena = talking.client("labeller")
    htmx = {"HX-Request": "true"}
    asked = {"csrf": lena.token(), "prompt": 'What is "2" + 2?', "messages": "[]", "first": "base", "second": "base"}
    part = lena.post("/ui/chat/ask", data=asked, headers=htmx).text
    left, right = fields_of(part)
    assert left["better"] == right["other"]
    texts = [json.loads(each["text"]) for each in (left, right)]
    assert texts[0] != texts[1]  # one model answers twice, drawn
    assert "base@" not in re.sub(r'value="[^"]*"', "", part).replace("<option", "")
    after = lena.post("/ui/chat/vote", data=right, headers=htmx).text
    assert "You preferred base" in after
    (more,) = fields_of(after)
    talk = [{"role": "user", "content": 'What is "2" + 2?'}, {"role": "assistant", "content": texts[1]}]
    assert json.loads(more["messages"]) == talk
    assert snapshot(tmp_path / "said.db", tmp_path / "rows").counts() == {"preferences.jsonl": 1}
    row = json.loads((tmp_path / "rows" / "preferences.jsonl").read_text())
    assert (row["prompt"], row["chosen"], row["rejected"]) == (talk[:1], texts[1], texts[0])
    # somebody changes their mind: the pair is turned round, and not there twice
    lena.post("/ui/chat/vote", data=left, headers=htmx)
    assert snapshot(tmp_path / "said.db", tmp_path / "rows").counts() == {"preferences.jsonl": 1}
    row = json.loads((tmp_path / "rows" / "preferences.jsonl").read_text())
    assert (row["chosen"], row["rejected"]) == tuple(texts)


def test_a_talk_goes_on_and_whole_pages_do_without_scripts(talking: Team) -> None:
    lena = talking.client("labeller")
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    fields = {"prompt": "3", "messages": json.dumps(turns), "first": "base", "second": "base", "drawn": "on"}
    page = lena.submit("/ui/chat/ask", **fields)
    assert page.status_code == 200
    assert page.text.startswith("<!doctype html>")
    assert json.loads(fields_of(page.text)[-1]["messages"]) == [*turns, {"role": "user", "content": "3"}]


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"first": "none"}, 404), ({"messages": "[1]"}, 400), ({"messages": "{"}, 400), ({"prompt": "x" * 9000}, 400)],
)
def test_what_cannot_be_asked_is_said(talking: Team, fields: dict[str, str], status: int) -> None:
    lena = talking.client("labeller")
    sent = {"prompt": "Hello", "messages": "[]", "first": "base", "second": "base", **fields}
    assert lena.submit("/ui/chat/ask", **sent).status_code == status
    assert lena.submit("/ui/chat/vote", better="a", other="b", messages="[]", text='""').status_code == 404


def test_a_drawn_question_is_never_one_that_is_held_out(talking: Team) -> None:
    lena, root = talking.client("labeller"), talking.root
    assert lena.get("/ui/chat/suggest").status_code == 409
    share = load_params(root / "params.yaml").render.held_out
    assert share == 0.1
    rows: list[Record] = [chat_of(str(number)) for number in range(60)]
    kept_out = {row.prompt_text() for row in rows if held_out(row.split_group(), share)}
    assert kept_out
    more = chat_of("more", Message("user", "a second question"))
    pair = PreferencePair(id="p", source="s", prompt=(Message("user", "a pair?"),), chosen="a", rejected="b")
    folder = root / "data" / "clean"
    folder.mkdir()
    write_records(folder, [*rows, more, pair])
    drawn = {chat.drawn_question(root) for _ in range(2000)}
    assert drawn == {row.prompt_text() for row in rows} - kept_out | {"a pair?"}
    assert "<textarea" in lena.read("/ui/chat/suggest")


def chat_of(name: str, *more: Message) -> ChatExample:
    turns = (Message("user", f"question {name}"), Message("assistant", "yes"), *more)
    return ChatExample(id=name, source="s", messages=turns)


# --- quarantine -------------------------------------------------------------------------------------------------------


def test_what_a_page_shows_otherwise_is_not_edited_by_it() -> None:
    old = "bell\x07 and\r\nmore\x07"
    row = quarantine.Quarantined(TextExample(id="t", source="s", text=old), "t", [], None)
    assert as_sent(row, ["bell␇ and\nmore␇"]) == [old]
    assert as_sent(row, ["bell␇ and\nless␇␀"]) == ["bell\x07 and\nless\x07␀"]
    assert as_sent(row, ["one", "two"]) == ["one", "two"]


def test_rows_are_listed_with_their_reasons_and_shown_as_text(team: Team) -> None:
    vera = team.client("viewer")
    page = vera.read("/ui/quarantine")
    assert page.count("it is odd") == len(ROWS) + 1
    assert "it names a person (1)" in page
    assert "&lt;b&gt;me&lt;/b&gt;" in page
    assert "chats.jsonl:3" in page
    assert vera.read("/ui/quarantine", reason="it names a person", page="99").count("/ui/quarantine/row?") == 1
    row = vera.read("/ui/quarantine/row", id="c/1 & 2")
    assert "readonly" in row
    assert "Release" not in row
    assert vera.get("/ui/quarantine/row", params={"id": "none"}).status_code == 400


def test_a_row_is_released_edited_and_the_release_is_taken_back(team: Team) -> None:
    lena, before = team.client("labeller"), [each.record for each in quarantine.quarantined(team.root)]
    place = "/ui/quarantine/row"
    edited = {"id": "c/1 & 2", "text": ["Mail me\r\nat [email]", "Yes."], "decision": "release"}
    assert lena.submit(place, **edited, why="").status_code == 400
    assert lena.submit(place, **{**edited, "text": ["one"]}, why="fine").status_code == 400
    said = notice(lena, lena.submit(place, **edited, why="masked by hand"))
    assert said == "c/1 & 2 is released into data/released/rows."
    lena.submit(place, id="l", text=["Is it?", "No\nidea"], decision="release", why="as it is")
    rows = team.root / "data" / "released" / "rows"
    assert json.loads((rows / "chat.jsonl").read_text()) == {
        "messages": [{"role": "user", "content": "Mail me\nat [email]"}, {"role": "assistant", "content": "Yes."}]
    }
    labelled = json.loads((rows / "labelled.jsonl").read_text())
    assert labelled["messages"][1]["content"] == "No\r\nidea"  # a browser's line ends are no edit
    assert lena.read("/ui/quarantine").count(">released<") == 3  # two rows, and the count
    notice(lena, lena.submit(place, id="c/1 & 2", text=edited["text"], decision="withdraw", why="a doubt"))
    assert (rows / "chat.jsonl").read_text() == ""
    made = list(quarantine.decisions(team.root))
    assert [(each.id, each.action, each.by, each.why) for each in made] == [
        ("c/1 & 2", "release", "lena", "masked by hand"),
        ("l", "release", "lena", "as it is"),
        ("c/1 & 2", "withdraw", "lena", "a doubt"),
    ]
    assert made[0].before["messages"][0]["content"] == "Mail <b>me</b>\nat a@b.org"
    assert [each.record for each in quarantine.quarantined(team.root)] == before
    assert "masked by hand" in lena.read(place, id="c/1 & 2")
