"""What engines are told and what they say, by their documentation and by events that a real one sent."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from flows.serve.engines.dialect import Dialect, EngineFailed, Launch
from flows.serve.engines.llama_cpp import LlamaCpp
from flows.serve.engines.pieces import Pieces
from flows.serve.engines.vllm import Vllm
from tasks.inference.decoding import Asked, Constraint, Written
from tasks.inference.params import GREEDY, Generation

BYTES = [bytes([number]) for number in range(256)] + [b"<end>", "é".encode(), b"ab", "牛".encode()[:2]]
END = 256
LAUNCH = Launch(Path("/e/engine"), Path("/m/model"), "bfloat16", 4711, 8, 4096)


def pieces() -> Pieces:
    return Pieces(lambda: BYTES)


def pairs(words: list[str]) -> dict[str, str]:
    """Options with their values."""
    return {name: value for name, value in pairwise(words) if name.startswith("--")}


def test_the_command_line_of_vllm() -> None:
    words = Vllm().command(LAUNCH._replace(cache_bytes=1 << 30, options=["--gpu-memory-utilization", "0.9"]))
    assert words[:3] == ["/e/engine", "serve", "/m/model"]
    said = pairs(words)
    assert (said["--host"], said["--port"], said["--dtype"]) == ("127.0.0.1", "4711", "bfloat16")
    assert (said["--max-model-len"], said["--max-num-seqs"]) == ("4096", "8")
    assert said["--generation-config"] == "vllm"  # else the folder's generation_config.json would change answers
    assert said["--kv-cache-memory-bytes"] == "1073741824"
    assert words[-2:] == ["--gpu-memory-utilization", "0.9"]  # the last one counts
    assert "--max-model-len" not in Vllm().command(LAUNCH._replace(context=None))


def test_the_command_line_of_llama_cpp_gives_each_slot_the_whole_context() -> None:
    said = pairs(LlamaCpp().command(LAUNCH))
    assert (said["--model"], said["--host"], said["--port"]) == ("/m/model", "127.0.0.1", "4711")
    assert (said["--ctx-size"], said["--parallel"]) == ("32768", "8")
    assert "--cache-type-k" not in said
    exact = pairs(LlamaCpp().command(LAUNCH._replace(dtype="float32", context=None)))
    assert (exact["--cache-type-k"], exact["--cache-type-v"]) == ("f32", "f32")
    assert "--ctx-size" not in exact


@pytest.mark.parametrize("dialect", [Vllm(), LlamaCpp()], ids=lambda each: each.name)
def test_the_key_is_in_no_command_line(dialect: Dialect) -> None:
    assert "s3cret" in dialect.environment("s3cret").values()
    assert not any("key" in word for word in dialect.command(LAUNCH))


def test_requests_are_tokens_with_the_options_of_temper() -> None:
    drawn = Generation(temperature=0.7, top_k=5, top_p=0.9, seed=3)
    path, body = Vllm().request(Asked((1, 2), 9, drawn, logprobs=2), [END], stream=True)
    assert (path, body["prompt"], body["max_tokens"]) == ("/v1/completions", [1, 2], 9)
    assert (body["temperature"], body["top_k"], body["top_p"], body["seed"]) == (0.7, 5, 0.9, 3)
    assert (body["stop_token_ids"], body["ignore_eos"], body["return_token_ids"]) == ([END], True, True)
    assert (body["logprobs"], body["return_tokens_as_token_ids"]) == (2, True)
    path, body = LlamaCpp().request(Asked((1, 2), 9, drawn), [END], stream=False)
    assert (path, body["prompt"], body["n_predict"], body["stream"]) == ("/completion", [1, 2], 9, False)
    assert body["samplers"] == ["temperature", "top_k", "top_p"]
    assert (body["temperature"], body["top_k"], body["top_p"], body["seed"]) == (0.7, 5, 0.9, 3)
    _, body = LlamaCpp().request(Asked((1, 2), 9), [END], stream=False)
    assert (body["samplers"], body["top_k"]) == (["top_k"], 1)
    assert "logprobs" not in Vllm().request(Asked((1,), 9), [END], stream=True)[1]


def test_what_they_cannot_do_has_the_name_of_its_field() -> None:
    plain, penalty = Asked((1,), 2), Asked((1,), 2, GREEDY.model_copy(update={"repetition_penalty": 1.2}))
    held = plain._replace(constraint=cast(Constraint, object()))
    for dialect in (Vllm(), LlamaCpp()):
        assert [dialect.refused(each) for each in (plain, penalty, held)] == [
            "",
            "repetition_penalty",
            "response_format",
        ]
    assert Vllm().refused(plain._replace(logprobs=3)) == ""
    assert LlamaCpp().refused(plain._replace(logprobs=0)) == "logprobs"


def test_chunks_of_vllm() -> None:
    reader = Vllm().reader([END], pieces())
    assert reader.read({"choices": [{"token_ids": [5, 6], "finish_reason": None}]}).written == [Written(5), Written(6)]
    told = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:7": -0.5, "token_id:9": -0.25}]}
    event = reader.read({"choices": [{"token_ids": [7], "logprobs": told, "finish_reason": "length"}]})
    assert event.written == [Written(7, -0.5, ((9, -0.25), (7, -0.5)))]
    assert event.reason == "length"
    assert reader.read({"choices": [], "usage": {}}).written == ()
    for wrong in (
        {"error": {"type": "BadRequestError", "message": "secret"}},
        {"choices": [{"finish_reason": "abort"}]},
    ):
        with pytest.raises(EngineFailed) as caught:
            reader.read(wrong)
        assert "secret" not in str(caught.value)


def llama_event(tokens: list[int], content: str, count: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "content": content, "tokens_predicted": count, "stop": False, **more}


def test_events_of_llama_cpp_leave_out_tokens_within_a_character() -> None:
    """As `process_token` of its server-context.cpp sends them: one event, with the last token and the whole text."""
    reader = LlamaCpp().reader([END], pieces())
    assert reader.read(llama_event([97], "a", 1)).written == [Written(97)]
    first, second, third = "牛".encode()
    assert reader.read(llama_event([third], "牛", 4)).written == [Written(first), Written(second), Written(third)]
    assert reader.read(llama_event([END], "", 5)).written == [Written(END)]
    last = reader.read({**llama_event([], "", 5), "stop": True, "stop_type": "eos"})
    assert (last.written, last.reason) == ([], "stop")


def test_a_character_that_is_never_finished_counts_and_has_no_text() -> None:
    reader = LlamaCpp().reader([END], pieces())
    last = reader.read({**llama_event([], "", 2), "stop": True, "stop_type": "limit"})
    assert (last.written, last.reason) == ([Written(END), Written(END)], "length")


def test_a_whole_answer_of_llama_cpp_has_all_its_tokens() -> None:
    told = {**llama_event([97, 0xE7, END], "a", 3), "stop": True, "stop_type": "eos"}
    event = LlamaCpp().reader([END], pieces()).read(told)
    assert (event.written, event.reason) == ([Written(97), Written(0xE7), Written(END)], "stop")
    for wrong in ({"error": {"code": 500, "message": "secret"}}, {**told, "stop_type": "none"}):
        with pytest.raises(EngineFailed) as caught:
            LlamaCpp().reader([END], pieces()).read(wrong)
        assert "secret" not in str(caught.value)


def test_bytes_are_spelled_in_exactly_so_many_tokens() -> None:
    found = pieces().spell(b"abab", 3)
    assert found is not None
    assert (len(found), pieces().join(found)) == (3, b"abab")
    assert pieces().spell("é".encode(), 1) == [257]
    assert pieces().spell("牛".encode(), 2) == [259, "牛".encode()[2]]
    assert pieces().spell(b"ab", 3) is None
    assert pieces().spell(b"", 0) == []
