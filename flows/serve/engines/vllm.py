"""vLLM: `vllm serve`, by the sources of 0.33.0 (`vllm/entrypoints/openai/completion`); it was never run here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flows.serve.engines.dialect import MODEL, Dialect, Event, Launch, failed, penalty_of
from flows.serve.engines.pieces import Pieces
from tasks.inference.decoding import Asked, Written

_NUMBER = "token_id:"
"""Precedes the number of a token where it stands for its text."""
_SHARE = 0.45
"""Of a GPU's memory, so that the next version has room beside the present one."""


class Vllm(Dialect):
    """vLLM's server of OpenAI's API, asked for completions of tokens."""

    name, program, variable = "vllm", "vllm", "TEMPER_VLLM"
    install = ("python -m venv ~/vllm", "~/vllm/bin/pip install vllm==0.33.0", "export TEMPER_VLLM=~/vllm/bin/vllm")
    dtypes = ("float32", "bfloat16", "float16")
    limits_cache = True
    start_s = 1800.0

    def prepare(self, folder: Path, dtype: str, scratch: Path) -> Path:
        """Return the folder itself."""
        return folder

    def command(self, launch: Launch) -> list[str]:
        """Return the command line that starts it."""
        words = [str(launch.program), "serve", str(launch.model), "--served-model-name", MODEL]
        words += ["--host", "127.0.0.1", "--port", str(launch.port), "--dtype", launch.dtype]
        words += ["--max-num-seqs", str(launch.slots), "--generation-config", "vllm", "--seed", "0"]
        words += ["--gpu-memory-utilization", str(_SHARE), "--uvicorn-log-level", "warning", "--disable-log-stats"]
        if launch.context is not None:
            words += ["--max-model-len", str(launch.context)]
        if launch.cache_bytes is not None:
            words += ["--kv-cache-memory-bytes", str(launch.cache_bytes)]
        return [*words, *launch.options]

    def environment(self, key: str) -> Mapping[str, str]:
        """Return the variables that it gets besides."""
        return {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}

    def refused(self, asked: Asked) -> str:
        """Return the field of a request that it cannot do."""
        return "response_format" if asked.constraint else penalty_of(asked.generation)

    def request(self, asked: Asked, end_ids: Collection[int], *, stream: bool) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request."""
        how = asked.generation
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": list(asked.prompt),
            "max_tokens": asked.max_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "seed": how.seed,
            "ignore_eos": True,  # which tokens end an answer is said here, not by its reading of the folder
            "stop_token_ids": sorted(end_ids),
            "return_token_ids": True,
            "stream": stream,
        }
        if asked.logprobs is not None:
            body |= {"logprobs": asked.logprobs, "return_tokens_as_token_ids": True}
        return "/v1/completions", body

    def reader(self, end_ids: Collection[int], pieces: Pieces) -> VllmReader:
        """Return what reads the events of one answer."""
        return VllmReader()


class VllmReader:
    """Reads completions and their chunks: `choices[0].token_ids`, its `logprobs` and its `finish_reason`."""

    def read(self, event: Mapping[str, Any]) -> Event:
        """Return what an event says."""
        if "choices" not in event:
            raise failed(event)
        if not event["choices"]:  # of usage alone
            return Event()
        choice = event["choices"][0]
        reason = choice.get("finish_reason") or ""
        if reason not in ("", "stop", "length"):
            raise failed({"error": {"type": f"finish_reason {reason}"}})
        tokens, told = choice.get("token_ids") or [], choice.get("logprobs")
        if told is None:
            return Event([Written(token) for token in tokens], reason)
        each = zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True)
        return Event([Written(token, logprob, _likeliest(top)) for token, logprob, top in each], reason)


def _likeliest(top: Mapping[str, float] | None) -> tuple[tuple[int, float], ...]:
    """Return tokens with their log-probabilities, the likeliest first."""
    found = [(int(token.removeprefix(_NUMBER)), logprob) for token, logprob in (top or {}).items()]
    return tuple(sorted(found, key=lambda pair: -pair[1]))
