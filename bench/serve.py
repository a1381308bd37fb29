"""Times `temper serve` under 1, 8 and 32 clients, side by side with `transformers serve` on the same model folder.

    .venv/bin/python -m bench.serve [--model models/tiny] [--requests 64] [--tokens 64] [--out serve.json]
                                    [--registered models:/temper-tiny/1]

With `--registered` a version of the registry that MLflow finds (MLFLOW_TRACKING_URI) is asked through `mlflow models
serve`, too, which gives an answer as a whole.

Every client asks again as soon as it is answered, by /v1/chat/completions as a stream, greedily, each time another
question. transformers serves with continuous batching and without, its cache of keys and values bounded, since it takes
what memory there is. One server runs at a time, each in a process of its own; who is first changes nothing, as each is
asked once by every client before. Reported for each number of clients: tokens/s, seconds to the first text (median and
95th percentile), the server's memory, and how many texts differ from those that the same server gives one client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from bench.clock import machine

CLIENTS = (1, 8, 32)
MLFLOW = "mlflow"
SIDES = ("temper", "transformers, batching", "transformers", MLFLOW)
STARTS_S = 180.0


class Answer(NamedTuple):
    """What came of one request: seconds to the first text and to the end, and the text."""

    first_s: float
    seconds: float
    text: str


class Load(NamedTuple):
    """What came of all requests of some clients."""

    seconds: float
    answers: list[Answer]


def command_of(side: str, model: str, port: int) -> list[str]:
    """Return the command line of a server."""
    if side == "temper":
        return [sys.executable, "-m", "flows.cli", "serve", model, "--port", str(port)]
    if side == MLFLOW:
        mlflow = str(Path(sys.executable).with_name("mlflow"))
        return [mlflow, "models", "serve", "-m", model, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    batching = ["--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "2048"]
    return [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        model,
        *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"),
        *(batching if side.endswith("batching") else ["--no-continuous-batching"]),
    ]


@contextmanager
def served(side: str, model: str | Path, *words: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server within this block, with further words of its command line; gives its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where MLflow looks for uvicorn
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command_of(side, str(model), port), *words],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path},
        )
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_S
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{side} does not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.5)
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


async def ask(client: httpx.AsyncClient, model: str, question: str, tokens: int) -> Answer:
    """Ask one question, and read the answer as it comes."""
    begun, first, text = time.perf_counter(), 0.0, ""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "stream": True,
        "temperature": 0.0,
    }
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        if response.status_code != httpx.codes.OK:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
            said = choices[0].get("delta", {}).get("content") or ""
            first = first or (time.perf_counter() - begun if said else 0.0)
            text += said
    return Answer(first, time.perf_counter() - begun, text)


async def ask_mlflow(client: httpx.AsyncClient, model: str, question: str, tokens: int) -> Answer:
    """Ask one question of MLflow's server, which knows no streams: there is no first text."""
    begun = time.perf_counter()
    asked = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    response = await client.post("/invocations", json=asked)
    response.raise_for_status()
    (answer,) = response.json()
    return Answer(0.0, time.perf_counter() - begun, answer["choices"][0]["message"]["content"])


async def load(address: str, model: str, questions: Sequence[str], clients: int, tokens: int) -> Load:
    """Let clients ask questions, each its own after one another."""
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        async def one(number: int) -> list[Answer]:
            put = ask_mlflow if model == MLFLOW else ask
            return [await put(client, model, question, tokens) for question in questions[number::clients]]

        begun = time.perf_counter()
        answers = await asyncio.gather(*(one(number) for number in range(clients)))
        seconds = time.perf_counter() - begun
    in_order = [answers[number % clients][number // clients] for number in range(len(questions))]
    return Load(seconds, in_order)


def measured(
    side: str, model: Path, registered: str, questions: Sequence[str], tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield a server's figures for each number of clients."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with served(side, registered if side == MLFLOW else str(model)) as (address, process):
        name = {"temper": model.name, MLFLOW: MLFLOW}.get(side, str(model))
        asyncio.run(load(address, name, questions[: max(CLIENTS)], max(CLIENTS), 4))  # warm
        alone: list[str] = []
        for clients in CLIENTS:
            found = asyncio.run(load(address, name, questions, clients, tokens))
            texts = [answer.text for answer in found.answers]
            alone = alone or texts
            written = sum(len(tokenizer(text)["input_ids"]) for text in texts)
            firsts = sorted(answer.first_s for answer in found.answers if answer.first_s)
            yield {
                "server": side,
                "clients": clients,
                "tokens_per_s": round(written / found.seconds, 1),
                "first_s": round(statistics.median(firsts), 3) if firsts else None,
                "first_p95_s": round(firsts[int(0.95 * (len(firsts) - 1))], 3) if firsts else None,
                "memory_mib": sum(each.memory_info().rss for each in (process, *process.children(True))) >> 20,
                "texts_that_differ": sum(one != other for one, other in zip(texts, alone, strict=True)),
            }


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/tiny"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--registered", default="")
    parser.add_argument("--side", action="append", choices=SIDES)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(machine())
    questions = [
        f"Count the animals: {'cat, ' * (1 + n % 7)}pig, table {n}. Then sort {n} 8 3." for n in range(given.requests)
    ]
    rows: list[dict[str, Any]] = []
    for side in given.side or [each for each in SIDES if each != MLFLOW or given.registered]:
        for row in measured(side, given.model.resolve(), given.registered, questions, given.tokens):
            if not rows:
                print("\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
            rows.append(row)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
