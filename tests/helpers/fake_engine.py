"""An engine for tests, as a program of its own: speaks as `vllm serve` or as `llama-server` does, by transformers.

It knows nothing of temper. Its command line begins with `serve MODEL` for the one, and has `--model FILE` for the
other. Further words make it fail: by `--second-best` the third token of an answer is not the likeliest, by
`--crash-after N` it ends at the N-th token of an answer, by `--crash-at-start` before it listens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any


def arguments() -> argparse.Namespace:
    """The words of the command line that matter here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--second-best", action="store_true")
    parser.add_argument("--crash-after", type=int, default=0)
    parser.add_argument("--crash-at-start", action="store_true")
    return parser.parse_known_args()[0]


GIVEN = arguments()
VLLM = GIVEN.words[:1] == ["serve"]
KEY = os.environ["VLLM_API_KEY" if VLLM else "LLAMA_API_KEY"]
LOCK = Lock()
if GIVEN.crash_at_start:
    print("no such device", file=sys.stderr, flush=True)
    os._exit(3)

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def loaded() -> tuple[Any, Any]:
    """The model and its tokenizer, of a folder or of a GGUF file."""
    if VLLM:
        source, more = Path(GIVEN.words[1]), {}
    else:
        file = Path(GIVEN.model)
        source, more = file.parent, {"gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **more)
    return model.eval(), AutoTokenizer.from_pretrained(source, **more)


MODEL, TOKENIZER = loaded()


def written(body: dict[str, Any], end_ids: list[int], most: int) -> Iterator[tuple[int, Any, str]]:
    """Each token with the log-probabilities at its place, and at the end the reason."""
    ids, generator = list(body["prompt"]), torch.Generator().manual_seed(body.get("seed", 0))
    drawn = body.get("temperature", 0.0)
    for number in range(1, most + 1):
        with LOCK, torch.no_grad():
            logp = MODEL(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        if drawn:
            token = int(torch.multinomial((logp / drawn).softmax(-1), 1, generator=generator))
        else:
            token = int(logp.topk(2).indices[1 if GIVEN.second_best and number == 3 else 0])
        if number == GIVEN.crash_after:
            os._exit(9)
        ids.append(token)
        yield token, logp, "stop" if token in end_ids else "length" if number == most else ""
        if token in end_ids:
            return


def vllm_choices(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A choice for each token, as `CompletionStreamResponse` has it."""
    for token, logp, reason in written(body, body["stop_token_ids"], body["max_tokens"]):
        choice = {"index": 0, "text": "", "token_ids": [token], "logprobs": None, "finish_reason": reason or None}
        if (count := body.get("logprobs")) is not None:
            top = logp.topk(count + 1)
            told = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            told = dict(list(told.items())[:count]) | {token: float(logp[token])}
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}"],
                "token_logprobs": [float(logp[token])],
                "top_logprobs": [{f"token_id:{each}": value for each, value in told.items()}],
            }
        yield choice


def llama_events(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of `/completion`; none for a token that ends within a character."""
    ids: list[int] = []
    sent, reason = "", "limit"
    for token, _, why in written(body, [TOKENIZER.eos_token_id], body["n_predict"]):
        ids.append(token)
        reason = "eos" if why == "stop" else "limit"
        text = TOKENIZER.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield {"tokens": [token], "content": text[len(sent) :], "stop": False, "tokens_predicted": len(ids)}
            sent = text
    last = {"tokens": [], "content": "", "stop": True, "tokens_predicted": len(ids), "stop_type": reason}
    yield last | ({} if body["stream"] else {"tokens": ids})


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """`/health`."""
        self._whole({"status": "ok"})

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self._whole({"error": {"type": "authentication_error"}}, 401)
        elif (self.path == "/v1/completions") is not VLLM:
            self._whole({"error": {"type": "not_found"}}, 404)
        elif VLLM and not body["stream"]:
            choices = list(vllm_choices(body))
            tokens = [token for choice in choices for token in choice["token_ids"]]
            self._whole({"choices": [{**choices[-1], "token_ids": tokens}]})
        elif not body["stream"]:
            self._whole(list(llama_events(body))[-1])
        else:
            self._stream(({"choices": [each]} for each in vllm_choices(body)) if VLLM else llama_events(body))

    def _whole(self, told: Any, status: int = 200) -> None:
        text = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, events: Iterator[Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        if VLLM:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


torch.set_num_threads(1)
ThreadingHTTPServer(("127.0.0.1", GIVEN.port), Handler).serve_forever()
