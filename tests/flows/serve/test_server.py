"""`temper serve` as a process: how it begins and ends, and what it refuses before it loads a model."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import URL

from flows.serve.record import open_record
from tests.conftest import Beside, temper, wait_for
from tests.flows.serve.registry import MODEL, give
from tests.flows.serve.serving import serving
from tests.helpers.postgresql import PASSWORD, Cluster


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_its_streams_are_finished(pico_base: Path, tmp_path: Path, sent: signal.Signals) -> None:
    place = tmp_path / "somewhere"
    place.mkdir()
    with Beside(place, "serve", str(pico_base), "--port", "0") as server:
        wait_for("address", lambda: re.search(r"serving base at \S+/v1", server.said()), server)
        found = re.search(r"serving base at (\S+)/v1", server.said())
        assert found is not None
        body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "stream": True, "n": 4}
        body |= {"max_tokens": 60, "temperature": 2.0}
        streams: list[list[str]] = []
        begun = threading.Semaphore(0)

        def ask() -> None:
            with httpx.stream("POST", f"{found[1]}/v1/chat/completions", json=body, timeout=120) as response:
                lines = list[str]()
                for line in response.iter_lines():
                    if not lines:
                        begun.release()
                    lines.append(line)
                streams.append([line for line in lines if line])

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        for _ in clients:
            begun.acquire()
        server.process.send_signal(sent)
        for client in clients:
            client.join()
        assert server.process.wait(timeout=60) == 0, server.said()
        assert server.left() == []
        for lines in streams:
            assert lines[-1] == "data: [DONE]"
            finished = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]]
            assert len([each for each in finished if each]) == 4
        assert len(streams) == 3
        assert server.said().splitlines()[-1] == f"stopped by {sent.name}; what was being answered is answered"
        assert "Hello" not in server.said()


def test_the_champion_is_served_and_followed(workspace: Path) -> None:
    with Beside(workspace, "serve", "--port", "0", "--record", "said.db") as server:
        wait_for("address", lambda: re.search(r"serving temper-tiny at \S+/v1", server.said()), server)
        found = re.search(r"serving temper-tiny at (\S+)/v1", server.said())
        assert found is not None
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}

        def version() -> str:
            answer = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=60)
            return str(answer.raise_for_status().headers["x-temper-version"])

        assert version() == f"{MODEL}/1"
        give(workspace, champion=2)
        wait_for("version 2", lambda: version() == f"{MODEL}/2", server)
        give(workspace, champion=1)
        wait_for("version 1", lambda: version() == f"{MODEL}/1", server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0, server.said()
        assert server.said().count("models:/temper-tiny@champion: temper-tiny/") == 3
    with sqlite3.connect(workspace / "said.db") as database:
        found_versions = database.execute("select distinct version from conversations order by 1").fetchall()
    assert found_versions == [(f"{MODEL}/1",), (f"{MODEL}/2",)]


def test_kill_9_loses_nothing_that_was_said(
    pico_base: Path, tmp_path: Path, place: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPER_RECORD", place.render_as_string(hide_password=False))
    said: list[str] = []
    printed = ""
    for _ in range(2):
        with Beside(tmp_path, "serve", str(pico_base), "--port", "0") as server:
            wait_for("address", lambda: re.search(r"serving base at \S+/v1", server.said()), server)
            found = re.search(r"serving base at (\S+)/v1", server.said())
            assert found is not None
            for name in said:  # of what was answered before the kill something can still be said
                httpx.post(f"{found[1]}/v1/feedback", json={"id": name, "thumb": "down"}, timeout=60).raise_for_status()
            for _ in range(5):
                body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
                answer = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
                vote = {"id": answer["id"], "thumb": "up"}
                httpx.post(f"{found[1]}/v1/feedback", json=vote, timeout=60).raise_for_status()
                said.append(answer["id"])
            printed += str(httpx.get(found[1].replace("/v1", "/health")).json())
            lines = psutil.Process(server.process.pid).cmdline()
            server.process.kill()
            server.process.wait()
            printed += server.said() + str(lines)
    with closing(open_record(place)) as record:
        assert [each.id for each in record.conversations()] == said
        assert [vote.id for vote in record.votes() if vote.value == "up"] == said
        assert [vote.id for vote in record.votes() if vote.value == "down"] == said[:5]
    assert PASSWORD not in printed


def test_models_answer_while_the_database_is_away(
    pico_base: Path, postgresql: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    record = open_record(postgresql.database(), write=True)
    with closing(record), serving(pico_base, record) as address:

        def ask() -> str:
            body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).raise_for_status()
            return str(answer.json()["id"])

        def vote(name: str) -> httpx.Response:
            return httpx.post(f"{address}/v1/feedback", json={"id": name, "thumb": "up"}, timeout=60)

        first = ask()
        postgresql.kill()
        lost = ask()
        refused = vote(first)
        postgresql.begin()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["Retry-After"] == "1"
        assert vote(first).is_success
        assert vote(lost).status_code == 404
        assert vote(ask()).is_success
    said = capsys.readouterr().err
    assert said.count("a conversation could not be recorded") == 1
    for secret in (PASSWORD, "Hello"):
        assert secret not in said + refused.text


def test_what_it_cannot_do_it_says_at_once(pico_base: Path, tmp_path: Path) -> None:
    folder = str(pico_base)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in (
            ((folder, "--host", "0.0.0.0"), "whoever reaches this address could use the models"),
            ((folder, "--port", port), "cannot be listened on"),
            ((folder, "--keys", "nothing"), "the keys cannot be read"),
            (("nothing",), "is no model"),
            ((folder, "--adapter", "mine"), "is no adapter with a name"),
            ((folder, "--canary", "challenger"), "is no share of the conversations"),
            ((folder, "--record", "postgresql://ann:secret-word@h/d"), "has its password in a command line"),
            ((folder, "--record", "mysql://h/d"), "is no URL of a record"),
        ):
            told = temper(tmp_path, "serve", *words, code=65).stderr
            assert said in told
            assert "Traceback" not in told
            assert "secret-word" not in told


def test_a_new_key_is_shown_with_its_line(tmp_path: Path) -> None:
    said = temper(tmp_path, "serve", "--new-key", "alice").stdout
    assert re.fullmatch(r"key, shown this once: temper-\S{43}\nline for --keys: +alice:[0-9a-f]{64}\n", said)
