"""Soaks `temper serve`: requests of all kinds for twenty minutes, and what its memory does meanwhile.

    .venv/bin/python -m bench.soak [--minutes 20] [--clients 8] [--model models/tiny] [--out soak.json]

Clients ask for answers whole and as streams, drawn, held to schemas and with logprobs, say what they think of them, go
away in the middle, send slowly, do not read, and send what is no request: each kind by its share, drawn with a fixed
seed. Every answer must have a status of its kind, every error OpenAI's form, and none may be a 500. The server keeps a
record all the while. In the end it is killed (kill -9) under load and started again: what it acknowledged, answers and
feedback, must be in the record.

Memory is the resident set of the server and its children, every second; its growth is the median of the last tenth of
the time over that of the tenth after the first fifth, in which caches fill and libraries are loaded. That takes a
minute and a half on two cores, so a soak of a few minutes measures its warm-up. Ends with 1 where memory grew by more
than 5%, a status was wrong, or something was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from bench.clock import machine
from bench.serve import served
from flows.serve.record import open_record

MOST_GROWTH = 1.05
LONG = 100
"""Tokens of an answer whose client does not wait for its end."""
_WARM, _TENTH = 0.2, 0.1
_CHAT, _TEXT, _SAY = "/v1/chat/completions", "/v1/completions", "/v1/feedback"


@dataclass
class Soak:
    """What all clients share: the server's address, and what came of the requests."""

    address: str
    model: str
    client: httpx.AsyncClient
    random: random.Random
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    """Ids of answers whose end was read: they are in the record."""
    votes: int = 0
    """Acknowledged feedback."""

    def chat(self, **fields: Any) -> dict[str, Any]:
        """Return a request for a chat, each another."""
        number = self.random.randrange(1 << 30)
        text = f"Count the animals: {'cat, ' * (1 + number % 7)}pig, table {number}."
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "user": f"user {number % 999}"}
        return {**body, "max_tokens": 1 + number % 8, **fields}

    def note(self, kind: str, status: int, body: bytes, expected: tuple[int, ...]) -> None:
        """Count a response, and hold it against what its kind may get; a full queue is always an answer."""
        self.statuses[kind, status] += 1
        if status not in (*expected, 429):
            self.wrong.append(f"{kind}: {status} {body[:300]!r}")
        elif status >= 400 and json.loads(body)["error"].keys() != {"message", "type", "param", "code"}:
            self.wrong.append(f"{kind}: {status} without OpenAI's form: {body[:300]!r}")

    async def post(self, kind: str, path: str, body: Any, *expected: int) -> dict[str, Any] | None:
        """Send a body, and return what was answered, if it was no error."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await self.client.post(path, content=content, headers={"Content-Type": "application/json"})
        self.note(kind, response.status_code, response.content, expected)
        return response.json() if response.status_code == httpx.codes.OK else None


async def whole(soak: Soak) -> None:
    """Ask for an answer, of one of the forms there are."""
    schema = {"type": "object", "properties": {f"key_{soak.random.randrange(10_000)}": {"type": "boolean"}}}
    held = {"type": "json_schema", "json_schema": {"name": "a", "schema": {**schema, "additionalProperties": False}}}
    fields: dict[str, Any] = soak.random.choice(
        [
            {},
            {"temperature": 1.0, "n": 3},
            {"temperature": 1.0, "seed": 5, "stop": ["a", "the"]},
            {"logprobs": True, "top_logprobs": 3},
            {"response_format": held},
        ]
    )
    if answer := await soak.post("whole", _CHAT, soak.chat(**fields), 200):
        soak.answers.append(answer["id"])


async def completion(soak: Soak) -> None:
    """Ask how two texts go on."""
    body = {"model": soak.model, "prompt": [f"One {soak.random.random()}", "Two"], "max_tokens": 4}
    if answer := await soak.post("completion", _TEXT, body, 200):
        soak.answers.append(answer["id"])


async def stream(soak: Soak, *, cut: bool = False) -> None:
    """Read a stream to its end, or go away after its first line."""
    async with soak.client.stream("POST", _CHAT, json=soak.chat(stream=True, max_tokens=8 + LONG * cut)) as response:
        if response.status_code != httpx.codes.OK:
            soak.note("stream", response.status_code, await response.aread(), (200,))
            return
        soak.statuses["cut stream" if cut else "stream", 200] += 1
        last = ""
        async for line in response.aiter_lines():
            if cut:
                return
            last = line or last
    if last == "data: [DONE]":
        soak.answers.append(response.headers["x-request-id"])
    else:
        soak.wrong.append(f"stream: ended with {last[:300]}")


async def cut_stream(soak: Soak) -> None:
    """Go away in the middle of a stream."""
    await stream(soak, cut=True)


async def gone(soak: Soak) -> None:
    """Go away before the answer is there."""
    with suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            await soak.post("gone", _CHAT, soak.chat(max_tokens=LONG), 200)
    soak.statuses["gone", 499] += 1


async def vote(soak: Soak) -> None:
    """Say something of an answer that was given."""
    name = soak.random.choice(soak.answers) if soak.answers else "nobody"
    said = soak.random.choice([{"thumb": "up"}, {"thumb": "down"}, {"better": "Say it so."}])
    if await soak.post("feedback", _SAY, {"id": name, **said}, 200 if soak.answers else 404):
        soak.votes += 1


async def looked_at(soak: Soak) -> None:
    """Look at what a server tells of itself."""
    path = soak.random.choice(["/metrics", "/health", "/v1/models", f"/v1/models/{soak.model}"])
    response = await soak.client.get(path)
    soak.note("look", response.status_code, response.content, (200,))


async def refused(soak: Soak) -> None:
    """Send what is no request, or none that can be answered."""
    cases: list[tuple[Any, int]] = [
        (b'{"model": ', 400),
        (b'{"model": "\xc3\x28"}', 400),
        (b"[" * 10_000, 400),
        (soak.chat(model=f"unknown {soak.random.random()}"), 404),
        (soak.chat(temprature=1), 400),
        (soak.chat(max_tokens=1 << 30), 400),
        (soak.chat(messages=[{"role": "user", "content": "word " * 20_000}]), 400),
        (soak.chat(messages=[{"role": "user", "content": "Hi"}] * 10_000), 400),
        (soak.chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}), 400),
    ]
    body, status = soak.random.choice(cases)
    await soak.post("refused", _CHAT, body, status)


async def too_large(soak: Soak) -> None:
    """Send a prompt of 10 MB."""
    await soak.post("too large", _CHAT, soak.chat(messages=[{"role": "user", "content": "x" * (10 << 20)}]), 413)


async def slow(soak: Soak) -> None:
    """Send half of a request, wait, and go away; or ask for a stream, and do not read it."""
    place = urlsplit(soak.address)
    _, writer = await asyncio.open_connection(place.hostname, place.port)
    body = json.dumps(soak.chat(stream=True, max_tokens=LONG)).encode()
    head = f"POST {_CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    sent = head.encode() + b"\r\n\r\n" + body
    writer.write(sent[: soak.random.choice([len(sent) // 2, len(head) // 2, len(sent)])])
    with suppress(ConnectionError):
        await writer.drain()
        await asyncio.sleep(0.3)
        writer.close()
        await writer.wait_closed()
    soak.statuses["slow", 499] += 1


KINDS: dict[Callable[[Soak], Coroutine[Any, Any, None]], int] = {
    whole: 30,
    completion: 8,
    stream: 20,
    cut_stream: 8,
    gone: 8,
    vote: 10,
    looked_at: 4,
    refused: 10,
    too_large: 1,
    slow: 1,
}
"""What clients do, and how often in a hundred."""


async def one_client(soak: Soak, until: float) -> None:
    """Do one thing after another until a time, of `time.monotonic`."""
    while time.monotonic() < until:
        (act,) = soak.random.choices(list(KINDS), list(KINDS.values()))
        await act(soak)


async def all_clients(
    address: str, model: str, clients: int, until: float, beside: Callable[[Soak], Awaitable[None]]
) -> Soak:
    """Let clients ask until a time, and do something beside them; what they were at when the server died is nothing."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        soak = Soak(address, model, client, random.Random(0))
        tasks = [asyncio.create_task(one_client(soak, until)) for _ in range(clients)]
        await beside(soak)
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, BaseException) and not isinstance(ended, httpx.TransportError | OSError):
                raise ended
    return soak


def resident(process: psutil.Process) -> int:
    """Return the memory of a server and its children, bytes."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


def growth_of(samples: list[int]) -> float:
    """Compute the ratio of the last tenth of the samples to the tenth after the warm-up."""
    tenth, warm = max(1, int(len(samples) * _TENTH)), int(len(samples) * _WARM)
    return statistics.median(samples[-tenth:]) / statistics.median(samples[warm : warm + tenth])


def lost(record: Path, soak: Soak) -> tuple[int, int]:
    """Count acknowledged answers and votes that a record has not."""
    with closing(open_record(record)) as kept:
        answers = {each.id for each in kept.conversations()}
        votes = sum(1 for _ in kept.votes())
    return len(set(soak.answers) - answers), max(0, soak.votes - votes)


def soaked(model: Path, minutes: float, clients: int, record: Path) -> dict[str, Any]:
    """Soak a server and return what came of it."""
    samples: list[int] = []
    words = ("--record", str(record), "--queue", "64")
    with served("temper", model, *words) as (address, process):
        begun = time.monotonic()
        until = begun + minutes * 60

        async def watch(soak: Soak) -> None:
            while time.monotonic() < until:
                samples.append(resident(process))
                await asyncio.sleep(1)
            process.kill()  # under load: the clients stop a little later

        soak = asyncio.run(all_clients(address, model.name, clients, until + 2, watch))
        seconds = time.monotonic() - begun
    with served("temper", model, *words):  # it starts again, on the same record
        lost_answers, lost_votes = lost(record, soak)
    by_kind: dict[str, dict[str, int]] = {}
    for (kind, status), count in sorted(soak.statuses.items()):
        by_kind.setdefault(kind, {})[str(status)] = count
    return {
        "minutes": round(seconds / 60, 1),
        "requests": sum(soak.statuses.values()),
        "requests_per_s": round(sum(soak.statuses.values()) / seconds, 1),
        "growth": round(growth_of(samples), 4),
        "memory_mib": [size >> 20 for size in samples[:: max(1, len(samples) // 20)]],
        "record_mib": sum(file.stat().st_size for file in record.parent.glob(f"{record.name}*")) >> 20,
        "acknowledged": len(soak.answers) + soak.votes,
        "lost": lost_answers + lost_votes,
        "wrong": soak.wrong[:20],
        "statuses": by_kind,
    }


def main() -> None:
    """Print the machine and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", type=Path, default=Path("models/tiny"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = soaked(given.model.resolve(), given.minutes, given.clients, Path(folder) / "said.db")
    told = json.dumps(found, indent=1)
    print(told)
    if given.out:
        given.out.write_text(told)
    if found["growth"] > MOST_GROWTH or found["wrong"] or found["lost"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
