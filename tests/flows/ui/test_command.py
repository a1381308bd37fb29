"""`temper ui` and `temper vote` as processes: how they begin and end, and what they refuse."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import httpx
import pytest

from bench.registered import workspace_at
from flows.review.side_by_side import pairs
from flows.serve.record import Record
from tests.conftest import Beside, temper, wait_for


def address_in(server: Beside) -> str:
    wait_for("address", lambda: re.search(r"pages at \S+/ui;", server.said()), server)
    found = re.search(r"pages at (\S+)/ui;", server.said())
    assert found is not None
    return found[1]


@pytest.mark.parametrize("with_model", [True, False])
def test_the_pages_are_beside_the_api_until_a_signal(workspace: Path, with_model: bool) -> None:
    words = ["models:/temper-tiny@champion", "models:/temper-tiny/2"] if with_model else ["--no-model"]
    with Beside(workspace, "ui", *words, "--port", "0") as server:
        address = address_in(server)
        page = httpx.get(f"{address}/", follow_redirects=True)
        assert page.status_code == 200
        assert "What runs where" in page.text
        assert ("temper-tiny/2" in page.text) is with_model
        models = [each["id"] for each in httpx.get(f"{address}/v1/models").json()["data"]]
        assert models == (["temper-tiny", "temper-tiny/2"] if with_model else [])
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0, server.said()
    assert (workspace / ".temper" / "record.db").stat().st_mode & 0o777 == 0o600


def test_where_nothing_is_registered_there_are_pages_all_the_same(tmp_path: Path) -> None:
    with Beside(workspace_at(tmp_path / "new"), "ui", "--port", "0") as server:
        assert "No model is in memory" in httpx.get(f"{address_in(server)}/ui/").text


def test_a_new_key_has_its_role_and_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    root = workspace_at(tmp_path / "new")
    said = temper(root, "ui", "--new-key", "alice", "--role", "approver").stdout
    assert re.fullmatch(r"key, shown this once: temper-\S{43}\nline for --keys: +alice:[0-9a-f]{64}:approver\n", said)
    for words, wrong in (
        (("--new-key", "alice", "--role", "boss"), "is no role"),
        (("--no-model", "models:/m@champion"), "nothing is loaded"),
        (("--adapter", "a=b"), "there is none"),
        (("--host", "0.0.0.0"), "whoever reaches this address"),
    ):
        assert wrong in temper(root, "ui", *words, code=65).stderr


def test_a_vote_on_the_command_line_is_one_of_the_pages(workspace: Path) -> None:
    shown = json.loads(temper(workspace, "vote", "1", "2", "--by", "lena", "--json").stdout)
    both = pairs(workspace, "1", "2")
    assert shown["item"] == both[0].name
    assert shown["answers"] == {number: each.prediction for number, each in both[0].answers.items()}
    assert f"temper vote 1 2 {shown['item']} --better 1|2" in temper(workspace, "vote", "1", "2", "--by", "lena").stdout
    said = temper(workspace, "vote", "1", "2", shown["item"], "--better", "2", "--by", "lena").stdout
    assert said == "votes: version 1 0, version 2 1\n"
    record = Record(workspace / ".temper" / "record.db")
    assert [(vote.key_name, vote.kind) for vote in record.votes()] == [("lena", "preferred_over")]
    record.close()
    following = json.loads(temper(workspace, "vote", "1", "2", "--by", "lena", "--json").stdout)
    assert following["item"] == both[1].name
    temper(workspace, "vote", "1", "2", "none", "--better", "2", code=65)
    temper(workspace, "vote", "1", "1", code=65)
