"""llama.cpp: `llama-server` on a GGUF file that is written of the model folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.serve.engines.dialect import MODEL, Dialect, Event, Launch, failed, penalty_of
from flows.serve.engines.pieces import Pieces
from tasks.inference.decoding import Asked, Written

_REASONS = {"eos": "stop", "word": "stop", "limit": "length"}


class LlamaCpp(Dialect):
    """llama.cpp's server, asked at `/completion`, which takes tokens and tells them."""

    name, program, variable = "llama.cpp", "llama-server", "TEMPER_LLAMA_SERVER"
    install = (
        "git clone https://github.com/ggml-org/llama.cpp",
        "cmake -S llama.cpp -B llama.cpp/build -DCMAKE_BUILD_TYPE=Release",
        "cmake --build llama.cpp/build --target llama-server",
        "export TEMPER_LLAMA_SERVER=$PWD/llama.cpp/build/bin/llama-server",
    )
    dtypes = ("float32", "bfloat16", "float16", "q8_0")
    limits_cache = False
    start_s = 600.0

    def prepare(self, folder: Path, dtype: str, scratch: Path) -> Path:
        """Write the model folder as a GGUF file."""
        from tasks.merge.export.formats import GGUF
        from tasks.merge.export.gguf import write_gguf

        write_gguf(folder, scratch / GGUF, dtype)
        return scratch / GGUF

    def command(self, launch: Launch) -> list[str]:
        """Return the command line that starts it; each slot has the whole context."""
        words = [str(launch.program), "--model", str(launch.model), "--alias", MODEL, "--offline", "--no-ui"]
        words += ["--host", "127.0.0.1", "--port", str(launch.port), "--log-verbosity", "2"]
        words += ["--parallel", str(launch.slots), "--no-kv-unified", "--no-context-shift", "--no-slots"]
        if launch.context is not None:
            words += ["--ctx-size", str(launch.context * launch.slots)]
        if launch.dtype == "float32":
            words += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
        return [*words, *launch.options]

    def environment(self, key: str) -> Mapping[str, str]:
        """Return the variables that it gets besides."""
        return {"LLAMA_API_KEY": key}

    def refused(self, asked: Asked) -> str:
        """Return the field of a request that it cannot do: it tells no probabilities of tokens within a character."""
        if asked.constraint:
            return "response_format"
        return "logprobs" if asked.logprobs is not None else penalty_of(asked.generation)

    def request(self, asked: Asked, end_ids: Collection[int], *, stream: bool) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request; its samplers stand in the order of temper's own."""
        how = asked.generation
        greedy = {"samplers": ["top_k"], "top_k": 1}
        drawn = {
            "samplers": ["temperature", "top_k", "top_p"],
            "temperature": how.temperature,
            "top_k": how.top_k,
            "top_p": how.top_p,
            "seed": how.seed,
        }
        return "/completion", {
            "prompt": list(asked.prompt),
            "n_predict": asked.max_tokens,
            "return_tokens": True,
            "stream": stream,
            **(drawn if how.temperature > 0 else greedy),
        }

    def reader(self, end_ids: Collection[int], pieces: Pieces) -> LlamaReader:
        """Return what reads the events of one answer."""
        return LlamaReader(end_ids, pieces)


class LlamaReader:
    """Reads answers of `/completion`.

    A stream has no event for a token that ends within a character: the next event has the text of both, and a count
    that tells how many were left out. Tokens of the same bytes stand for these, so that text and count are the answer's
    own; where a character is never finished, end tokens do, which have no text.

    Args:
        end_ids: tokens that end an answer.
        pieces: the bytes of tokens.
    """

    def __init__(self, end_ids: Collection[int], pieces: Pieces) -> None:
        self._end_ids, self._pieces = end_ids, pieces
        self._told = 0

    def read(self, event: Mapping[str, Any]) -> Event:
        """Return what an event says."""
        if "tokens" not in event or "tokens_predicted" not in event:
            raise failed(event)
        tokens, ended = list(event["tokens"]), bool(event["stop"])
        if missing := event["tokens_predicted"] - self._told - len(tokens):
            tokens = self._left_out(missing, event["content"].encode(), tokens) + tokens
        self._told = event["tokens_predicted"]
        if not ended:
            return Event([Written(token) for token in tokens])
        if event["stop_type"] not in _REASONS:
            raise failed({"error": {"type": f"stop_type {event['stop_type']}"}})
        return Event([Written(token) for token in tokens], _REASONS[event["stop_type"]])

    def _left_out(self, count: int, text: bytes, tokens: Sequence[int]) -> list[int]:
        """Return tokens for those that were left out before the ones that an event has."""
        known = self._pieces.join(tokens)
        found = self._pieces.spell(text.removesuffix(known), count) if text.endswith(known) else None
        return found or [next(iter(self._end_ids))] * count
