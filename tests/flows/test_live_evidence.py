"""What a record says of two versions, counted, and what `temper promote` makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bench.registered import made, model_and_sources, workspace_at
from flows.registry.live import live_evidence
from flows.registry.promotion import promote
from flows.registry.verdict import TAG_CHARACTERS, keep_verdict
from flows.serve.record import Conversation, Vote, open_record
from flows.serve.requests import FeedbackRequest
from tasks.gate.live import LiveEvidence, LiveFigures
from tasks.gate.tallies import tally_of
from tasks.register.stage import register
from tasks.registry import names as tag
from tasks.registry.alias_log import moves
from tasks.registry.client import connect
from tasks.registry.versions import version_of
from tests.conftest import temper
from tests.flows.serve.test_record import conversation

OLD, NEW = "temper-tiny/1", "temper-tiny/2"


def said(name: str, version: str, route: str = "served", text: str = "Hi", **fields: Any) -> Conversation:
    answers = [{"role": "assistant", "content": text, "finish_reason": fields.pop("finish", "stop")}]
    return conversation(name, version=version, route=route, answers=answers, **fields)


def votes(*given: tuple[str, str, str] | tuple[str, str, str, str]) -> list[Vote]:
    """Client, answer and thumb; or client, the preferred one, `over`, the other."""
    found = []
    for number, (client, name, value, *other) in enumerate(given):
        kind, value = ("preferred_over", other[0]) if other else ("thumb", value)
        found.append(Vote(number, 0.0, client, name, kind, value))
    return found


def counted(conversations: Iterable[Conversation], given: Iterable[Vote] = ()) -> LiveEvidence:
    return live_evidence(conversations, given, NEW, OLD, source="said.db", until=86_400.0)


def test_each_client_has_one_vote_on_an_answer_and_a_users_votes_stand_together() -> None:
    found = counted(
        [
            said("0", OLD, user="early"),  # before the version's first answer
            said("a", NEW, "canary", user="ann"),
            said("b", NEW, "canary", user="ann"),
            said("c", NEW, "canary", user="bob"),
            said("d", OLD, user="cid"),
            said("e", OLD, prompt=[{"role": "user", "content": "one opening"}]),
            said("f", OLD, prompt=[{"role": "user", "content": "one opening"}, {"role": "user", "content": "on"}]),
            said("g", NEW, "shadow", user="dan"),
            said("h", "temper-tiny/3", user="eve"),
            said("i", NEW, user="fay", adapter="mine"),
        ],
        votes(
            ("app", "a", "down"),
            ("app", "a", "up"),  # its last one counts
            ("tool", "a", "down"),
            ("app", "b", "up"),
            ("app", "c", "down"),
            ("app", "d", "up"),
            ("app", "e", "up"),
            ("app", "f", "down"),
            ("app", "0", "down"),
            ("app", "g", "down"),  # a shadow's
            ("app", "h", "down"),  # another version's
            ("app", "i", "down"),  # an adapter's
        ),
    )
    assert found.version.thumbs.as_dict() == {"0/1": 1, "2/3": 1}
    assert found.champion.thumbs.as_dict() == {"1/1": 1, "1/2": 1}
    assert (found.version.answers, found.champion.answers) == (4, 3)


def test_of_two_answers_the_last_word_of_a_client_counts() -> None:
    conversations = [said("a", NEW, "canary", user="ann"), said("b", OLD, user="bob"), said("c", NEW, user="cid")]
    found = counted(
        conversations,
        votes(
            ("app", "a", "over", "b"),
            ("app", "b", "over", "a"),
            ("tool", "a", "over", "b"),
            ("app", "c", "over", "a"),  # two of the same version
            ("app", "c", "over", "gone"),
        ),
    )
    assert found.preferences.votes == 2
    assert found.preferences.yes == 1


def test_a_shadow_agrees_where_it_says_and_calls_the_same() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = [{"role": "assistant", "content": None, "tool_calls": [call], "finish_reason": "tool_calls"}]
    other_id = [{**calls[0], "tool_calls": [{**call, "id": "2"}]}]
    found = counted(
        [
            said("x-shadow", NEW, "shadow", "Hi", user="a"),
            said("x", OLD, text="Hi", user="a"),
            said("y", OLD, text="Hi", user="a"),
            said("y-shadow", NEW, "shadow", "Ho", user="a"),
            said("z", OLD, user="b")._replace(answers=calls),
            said("z-shadow", NEW, "shadow", user="b")._replace(answers=other_id),
            said("v", NEW, "canary", user="c"),  # both were the version's
            said("v-shadow", NEW, "shadow", user="c"),
            said("w-shadow", NEW, "shadow", user="c"),  # its client went away
        ]
    )
    assert found.agreement.as_dict() == {"1/1": 1, "1/2": 1}


def test_answers_are_complete_that_say_something_and_were_not_cut() -> None:
    found = counted(
        [
            said("a", NEW, user="a", answer_tokens=10, seconds=1.0, first_token_s=None),
            said("b", NEW, user="b", text=" ", answer_tokens=20, seconds=2.0),
            said("c", NEW, user="c", finish="length", answer_tokens=60, seconds=9.0),
        ]
    )
    assert found.version.complete.as_dict() == {"0/1": 2, "1/1": 1}
    assert (found.version.answer_tokens, found.version.seconds, found.version.first_token_s) == (30, 2.0, 0.1)
    assert found.champion.told() == "0 answers"


# --- the gate ---------------------------------------------------------------------------------------------------------


def ask(workspace: Path, **uses: str) -> None:
    """Set what the gate asks of a record."""
    file, yaml = workspace / "params.yaml", YAML(typ="safe")
    content = yaml.load(file)
    content["promote"]["live"] = {name: {"use": use} for name, use in uses.items()}
    yaml.dump(content, file)


@pytest.fixture(scope="module")
def registered(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A champion, and a version that answers more of the held-out rows."""
    folder = tmp_path_factory.mktemp("registered")
    workspace = workspace_at(folder / "workspace")
    for number, right in (("1", 150), ("2", 190)):
        (folder / number).mkdir()
        outputs = made(folder / number, pico_base, right)
        register(workspace, "qlora", outputs, f"content-{number}", *model_and_sources(workspace))
    assert promote(workspace, "1").passed
    ask(workspace, thumbs="taken", preferences="taken")
    return workspace


@pytest.fixture
def workspace(registered: Path, tmp_path: Path) -> Path:
    target = tmp_path / "workspace"
    shutil.copytree(registered, target)
    return target


def a_record(file: Path, up: int, of: int = 60) -> None:
    """Sixty users of each version: the champion's answers got 54 thumbs up, those of the version so many."""
    with closing(open_record(file, write=True)) as record:
        for version, liked in ((NEW, up), (OLD, 54)):
            for number in range(of):
                name = f"{version}-{number}"
                record.add(said(name, version, "canary" if version == NEW else "served", user=name))
                record.say(FeedbackRequest(id=name, thumb="up" if number < liked else "down"), "app")


def test_a_version_that_people_like_less_is_refused_and_the_verdict_says_why(workspace: Path, tmp_path: Path) -> None:
    """30 of 60 beside 54 of 60: refused, though the held-out rows speak for it."""
    a_record(tmp_path / "said.db", up=30)
    done = temper(workspace, "promote", "--version", "2", "--record", str(tmp_path / "said.db"), code=65)
    assert "the gate refused it" in done.stderr
    client = connect(workspace)
    kept = json.loads(version_of(client, "temper-tiny", "2").tags[tag.VERDICT])
    failed = [each for each in kept["findings"] if not each["passed"]]
    assert [each["check"] for each in failed] == ["live thumbs"]
    assert "up 0.500 [0.377, 0.623] of 60 by 60, champion 1 0.900 [0.799, 0.953] of 60 by 60" in failed[0]["said"]
    assert f"; {tmp_path}/said.db since 20" in failed[0]["said"]
    assert failed[0]["difference"]["gain"] == pytest.approx(-0.4)
    assert kept["live"]["version"]["thumbs"] == {"0/1": 30, "1/1": 30}
    assert len(moves(client, "temper-tiny")) == 1
    done = temper(workspace, "promote", "--version=2", "--json", code=65, TEMPER_RECORD=str(tmp_path / "said.db"))
    told = json.loads(done.stdout)
    assert told["verdict"]["live"]["champion"]["thumbs"] == {"0/1": 6, "1/1": 54}


def test_a_version_that_people_like_as_much_is_promoted_and_the_ledger_has_their_votes(
    workspace: Path, tmp_path: Path
) -> None:
    a_record(tmp_path / "said.db", up=55)
    assert promote(workspace, "2", record=str(tmp_path / "said.db")).passed
    last = moves(connect(workspace), "temper-tiny")[-1]
    assert "live thumbs +0.017 [" in last.summary
    assert "of 60 by 60, champion 1 0.900" in last.summary
    assert "live preferences fewer than 50 users or conversations" in last.summary


def test_tallies_that_are_too_long_for_a_tag_are_in_the_verdicts_file(workspace: Path) -> None:
    """Two thousand users, each with another number of votes."""
    done = promote(workspace, "2")
    assert done.verdict is not None
    tallies = tally_of({f"{number}/{number}": 1 for number in range(1, 2001)})
    live = LiveEvidence("said.db", "", "", LiveFigures(2000, tallies), LiveFigures(2000, tallies), tallies)
    verdict = done.verdict._replace(live=live)
    assert len(json.dumps(verdict.as_dict(), indent=2)) > TAG_CHARACTERS
    client = connect(workspace)
    keep_verdict(client, version_of(client, "temper-tiny", "2"), verdict)
    version = version_of(client, "temper-tiny", "2")
    kept = json.loads(version.tags[tag.VERDICT])
    assert kept == {**verdict.as_dict(), "live": None}
    name = f"verdicts/version-2-{version.tags[tag.VERDICT_DIGEST][:12]}.json"
    path = client.download_artifacts(str(version.run_id), name, str(workspace))
    assert json.loads(Path(path).read_text()) == verdict.as_dict()


def test_where_votes_are_demanded_no_version_passes_without_a_record(workspace: Path) -> None:
    ask(workspace, thumbs="demanded")
    done = promote(workspace, "2")
    assert done.verdict is not None
    assert [each.said[-9:] for each in done.verdict.findings if not each.passed] == ["no record"]
    ask(workspace, thumbs="taken")
    assert promote(workspace, "2").passed
