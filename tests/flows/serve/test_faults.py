"""Clients that are slow, cut off or no clients at all; and a short soak, at the end of which the server is killed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from transformers import PreTrainedTokenizerBase

from bench.soak import KINDS, growth_of, soaked
from flows.serve.record import Record
from tasks.inference.decoding import Ended
from tasks.tokenization.chat_template import load_tokenizer
from tests.conftest import ROOT
from tests.flows.serve.serving import scripted, serving
from tests.flows.serve.test_app import SCRIPTED, in_background, post


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ROOT / "models" / "tiny")


def connected(address: str) -> socket.socket:
    place = urlsplit(address)
    return socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=60)


def written(body: bytes, size: int | None = None) -> bytes:
    """A request as it goes over the wire, which says that its body has so many bytes."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if size is None else size}\r\nConnection: close\r\n\r\n".encode() + body


def received(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def test_a_request_that_comes_byte_by_byte_is_answered(tokenizer: PreTrainedTokenizerBase) -> None:
    with scripted(tokenizer) as (address, engine), connected(address) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in written(json.dumps(SCRIPTED).encode()):
            client.sendall(bytes([byte]))
        engine.submitted.acquire()
        engine.tells[0](Ended("stop"))
        assert received(client).startswith(b"HTTP/1.1 200 OK\r\n")


def test_requests_that_are_cut_ask_the_engine_nothing_and_the_next_one_is_answered(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = written(json.dumps(SCRIPTED).encode())
    with scripted(tokenizer) as (address, engine):
        for end in (1, 20, len(whole) // 2, len(whole) - 1):
            with connected(address) as client:
                client.sendall(whole[:end])
        with connected(address) as client:  # it says that there is more, and then sends no more
            client.sendall(written(json.dumps(SCRIPTED).encode(), size=1 << 20))
            client.shutdown(socket.SHUT_WR)
            received(client)
        thread, responses = in_background(address, SCRIPTED)
        engine.submitted.acquire()
        engine.tells[0](Ended("stop"))
        thread.join()
        assert responses[0].status_code == 200
        assert len(engine.asked) == 1
    assert "failed" not in capsys.readouterr().err


def test_what_is_no_http_is_answered_as_such(tokenizer: PreTrainedTokenizerBase) -> None:
    with scripted(tokenizer) as (address, engine):
        for sent in (b"\x00\xff\xfe\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 40):
            with connected(address) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                assert not received(client).startswith(b"HTTP/1.1 5")
        assert post(address, b"{").status_code == 400
        assert not engine.asked


@pytest.fixture
def address(pico_base: Path, tmp_path: Path) -> Iterator[str]:
    record = Record(tmp_path / "said.db")
    with serving(pico_base, record) as address:
        yield address
    record.close()


def test_many_that_connect_and_say_nothing_hold_up_nobody(address: str) -> None:
    silent = [connected(address) for _ in range(100)]
    try:
        body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        statuses: list[int] = []
        clients = [threading.Thread(target=lambda: statuses.append(post(address, body).status_code)) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert statuses == [200] * 4
    finally:
        for each in silent:
            each.close()


def test_growth_is_that_after_the_warm_up() -> None:
    """Of a hundred samples twenty are warm-up: what they rise by is none, what comes after is."""
    assert growth_of([*range(20), *[100] * 80]) == 1
    assert growth_of([*[100] * 90, *[110] * 10]) == pytest.approx(1.1)


def test_a_soak_that_ends_with_kill_9_loses_nothing_that_was_acknowledged(pico_base: Path, tmp_path: Path) -> None:
    assert sum(KINDS.values()) == 100
    found = soaked(pico_base, 0.1, 4, tmp_path / "said.db")
    assert found["wrong"] == []
    assert found["lost"] == 0
    assert found["acknowledged"] > 0
    assert "500" not in json.dumps(found["statuses"])
