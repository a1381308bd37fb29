"""The server before the process of another engine, which is a pretended one: its start, its answers, its failures."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from flows.serve.engines.keeper import environment_of
from flows.serve.engines.parity import PROBE_TOKENS
from flows.serve.engines.process import program_of
from flows.serve.engines.start import DIALECTS, engine_choice
from flows.serve.routing import Models, Plan
from flows.serve.versions import LoadedVersion, Reference, Settings, Slot, Source, reference_of
from tasks.adapters.package import package
from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadModel, BadParams, NotEquivalent
from tasks.core.records import Message
from tasks.inference.chat import Reply, answer
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer
from tests.conftest import ROOT, Beside, wait_for
from tests.flows.serve.engines.programs import pretended
from tests.flows.serve.registry import MODEL, give
from tests.flows.serve.serving import serving
from tests.tasks.adapters.test_files import published

TINY = ROOT / "models" / "tiny"
ASKED = "数一数动物：牛，猪"
"""Answered in Chinese, of which a character may have several tokens."""
VERSION = f"tiny@{hashlib.sha256((TINY / 'manifest.json').read_bytes()).hexdigest()[:12]}"
MESSAGES: Any = [{"role": "user", "content": ASKED}]


def engines_of(owner: int) -> list[psutil.Process]:
    """The processes that hold an engine for this one, and what these started."""
    children = psutil.Process(owner).children()
    keepers = [each for each in children if "flows.serve.engines.keeper" in each.cmdline()]
    return [found for keeper in keepers for found in (keeper, *keeper.children(recursive=True))]


class Started:
    """What a test has started, beside what others have."""

    def __init__(self) -> None:
        self._before = set(engines_of(os.getpid()))

    def processes(self) -> list[psutil.Process]:
        return [each for each in engines_of(os.getpid()) if each not in self._before]


@pytest.fixture
def started() -> Started:
    return Started()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


class Served(NamedTuple):
    """A server before a pretended engine."""

    name: str
    address: str
    said: list[str]

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.address}/v1/{path}", json={"model": "tiny", **body}, timeout=60)

    def chat(self, **body: Any) -> Any:
        response = self.post("chat/completions", messages=MESSAGES, **body)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module", params=["vllm", "llama.cpp"])
def served(
    request: pytest.FixtureRequest, pico_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    choice = pretended(request.param, tmp_path_factory.mktemp("program"))
    said: list[str] = []
    with serving(TINY, settings=Settings(slots=2, context=200, engine=choice), say=said.append) as address:
        yield Served(request.param, address, said)
        running = engines_of(os.getpid())
        assert len(running) >= 2
    assert gone(running)


def expected(tokens: int) -> Reply:
    return answer(load_model(TINY), load_tokenizer(TINY), [Message("user", ASKED)], tokens)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_that_of_temper_whole_and_streamed(served: Served) -> None:
    reply = expected(24)
    whole = served.chat(max_tokens=24)
    assert whole["choices"][0]["message"]["content"] == reply.text
    assert whole["choices"][0]["finish_reason"] == ("stop" if reply.stopped else "length")
    assert whole["usage"]["completion_tokens"] == reply.tokens
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "stream": True}
    with httpx.stream("POST", f"{served.address}/v1/chat/completions", json=body, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(deltas) == reply.text
    assert len(deltas) > 3


def test_texts_end_and_are_cut_as_by_temper(served: Served) -> None:
    text = expected(24).text
    stop = text[6:8]
    cut = served.chat(max_tokens=24, stop=[stop])["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (text[: text.index(stop)].rstrip(), "stop")
    several = served.post("completions", prompt=[[5, 6, 7], [8, 9]], max_tokens=3, n=2).json()
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert served.post("chat/completions", messages=MESSAGES, max_tokens=500).json()["error"]["code"] == (
        "context_length_exceeded"
    )


def test_a_seed_makes_a_draw_the_same_again(served: Served) -> None:
    drawn = [served.chat(max_tokens=12, temperature=2.0, seed=seed)["choices"][0]["message"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_the_engine_cannot_do_is_refused_by_name(served: Served) -> None:
    asked: dict[str, Any] = {
        "response_format": {"response_format": {"type": "json_object"}},
        "repetition_penalty": {"repetition_penalty": 1.5},
    }
    if served.name == "llama.cpp":
        asked["logprobs"] = {"logprobs": True}
    for field, body in asked.items():
        response = served.post("chat/completions", messages=MESSAGES, max_tokens=3, **body)
        assert response.status_code == 400
        told = response.json()["error"]
        assert (told["param"], told["code"]) == (field, "unsupported_parameter")
        assert served.name in told["message"]
    if served.name == "vllm":
        content = served.chat(max_tokens=3, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
        with serving(TINY) as own:
            body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
            ours = httpx.post(f"{own}/v1/chat/completions", json=body, timeout=60).json()
        for one, other in zip(content, ours["choices"][0]["logprobs"]["content"], strict=True):
            assert one["token"] == other["token"]
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
            assert [each["token"] for each in one["top_logprobs"]] == [each["token"] for each in other["top_logprobs"]]


def test_what_was_compared_is_said(served: Served) -> None:
    (told,) = httpx.get(f"{served.address}/health").json()["models"]
    assert told["engine"].startswith(f"{served.name}, ")
    assert told["engine"].endswith("tokens of 5 prompts as temper's own")
    assert sum(told["engine"] in line for line in served.said) == 1
    metrics = httpx.get(f"{served.address}/metrics").text
    assert f'temper_engine_running{{model="tiny",version="{VERSION}"}} 0.0' in metrics


def test_a_client_that_goes_away_ends_its_answer(served: Served) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{served.address}/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(600):
        if (
            f'temper_engine_running{{model="tiny",version="{VERSION}"}} 0.0'
            in httpx.get(f"{served.address}/metrics").text
        ):
            break
        time.sleep(0.05)
    else:
        pytest.fail("it goes on")
    assert served.chat(max_tokens=1)["usage"]["completion_tokens"] == 1


# --- what fails -------------------------------------------------------------------------------------------------------


def test_an_engine_that_writes_other_tokens_is_refused(pico_base: Path, tmp_path: Path, started: Started) -> None:
    settings = Settings(slots=2, engine=pretended("vllm", tmp_path, "--second-best"))
    with pytest.raises(NotEquivalent, match="other tokens than temper's own") as caught:
        LoadedVersion("m/1", pico_base, {}, settings, any_base=False)
    assert "m/1 by vllm, prompt 1, token 3" in str(caught.value)
    assert started.processes() == []


def test_a_context_without_room_to_compare_is_refused(pico_base: Path, tmp_path: Path, started: Started) -> None:
    settings = Settings(context=PROBE_TOKENS, engine=pretended("vllm", tmp_path))
    with pytest.raises(BadParams, match="leaves no room"):
        LoadedVersion("m/1", pico_base, {}, settings, any_base=False)
    assert started.processes() == []


def test_an_engine_that_does_not_start_says_why(pico_base: Path, tmp_path: Path, started: Started) -> None:
    settings = Settings(engine=pretended("llama.cpp", tmp_path, "--crash-at-start"))
    with pytest.raises(BadModel, match="does not start") as caught:
        LoadedVersion("m/1", pico_base, {}, settings, any_base=False)
    assert "exit code 3" in caught.value.got
    assert "no such device" in caught.value.got
    assert started.processes() == []


def test_an_engine_that_crashes_in_an_answer_is_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    settings = Settings(slots=2, engine=pretended("vllm", tmp_path, "--crash-after", "40"))
    with serving(TINY, settings=settings, say=said.append) as address:
        served = Served("vllm", address, said)
        response = served.post("chat/completions", messages=MESSAGES, max_tokens=60)
        assert response.status_code == 503, response.text
        told = response.json()["error"]
        assert (told["type"], told["code"]) == ("server_error", "unavailable")
        deadline = time.monotonic() + 120
        while (again := served.post("chat/completions", messages=MESSAGES, max_tokens=3)).status_code == 503:
            assert again.json()["error"]["code"] == "unavailable"
            assert again.headers["Retry-After"]
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        assert again.status_code == 200
    assert [line for line in said if "ended by itself, with code 9" in line]
    assert [line for line in said if "answers again" in line]


def test_an_alias_is_followed_by_a_process_beside_the_old_one(
    workspace: Path, tmp_path: Path, started: Started
) -> None:
    said: list[str] = []
    settings = Settings(slots=2, engine=pretended("vllm", tmp_path))
    slot = Slot(
        Source(reference_of(f"models:/{MODEL}@champion"), workspace, {}, settings, say=said.append), said.append
    )
    slot.begin()
    try:
        old = started.processes()
        give(workspace, champion=2)
        with slot.in_use() as before:
            assert before is not None
            slot.follow()
            assert slot.number == "2"
            assert len(started.processes()) == 2 * len(old)
            before.probe()  # what has begun ends on the old one
        for _ in range(600):
            if gone(old):
                break
            time.sleep(0.05)
        assert gone(old)
        assert [line.split(": ", 1)[1].split(",")[0] for line in said] == [
            f"{MODEL}/1 by vllm",
            f"{MODEL}/2 by vllm",
        ]
    finally:
        slot.close(finish=True)
    assert started.processes() == []


def test_the_engine_ends_with_the_server_whatever_ends_that(pico_base: Path, tmp_path: Path) -> None:
    choice = pretended("llama.cpp", tmp_path)
    place = tmp_path / "somewhere"
    place.mkdir()
    words = ("serve", str(pico_base), "--port", "0", "--engine", "llama.cpp", "--engine-path", str(choice.program))
    with Beside(place, *words) as server:
        wait_for("address", lambda: "serving base at" in server.said(), server)
        running = engines_of(server.process.pid)
        folder = Path(running[0].cmdline()[running[0].cmdline().index("flows.serve.engines.keeper") + 1])
        assert (folder / "model.gguf").is_file()
        server.process.send_signal(signal.SIGKILL)
        wait_for("end of the engine", lambda: gone(running), server)
        assert not folder.exists()
    assert "tokens of 5 prompts as temper's own" in server.said()


# --- what is refused at the start -------------------------------------------------------------------------------------


def test_a_program_is_found_or_how_to_get_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = pretended("vllm", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(BadParams, match="the engine is not there") as caught:
        program_of(DIALECTS["vllm"], None)
    assert "pip install vllm==" in caught.value.fix
    assert "TEMPER_VLLM" in caught.value.got
    monkeypatch.setenv("TEMPER_VLLM", str(choice.program))
    assert program_of(DIALECTS["vllm"], None) == choice.program
    with pytest.raises(BadParams, match="the engine is not there"):
        program_of(DIALECTS["llama.cpp"], tmp_path / "llama-server")
    monkeypatch.delenv("TEMPER_VLLM")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program_of(DIALECTS["vllm"], None) == choice.program


def test_choices_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    program = pretended("vllm", tmp_path).program
    assert engine_choice("temper", None, None, []) is None
    for given, said in (
        (("temper", program, None, []), "are for other engines"),
        (("sglang", None, None, []), "is no engine"),
        (("vllm", program, "q8_0", []), "is no number format of this engine"),
    ):
        with pytest.raises(BadParams, match=said):
            engine_choice(*given)


def test_models_that_the_engine_cannot_have_are_refused(pico_base: Path, tmp_path: Path) -> None:
    choice = pretended("vllm", tmp_path)
    adapter = published(pico_base, "loreft", tmp_path / "trained")
    with atomic_folder(tmp_path / "model") as draft:
        package(pico_base, adapter, draft, tmp_path / "model")
    with pytest.raises(BadModel, match="its adapter is beside the weights"):
        LoadedVersion("x", tmp_path / "model", {}, Settings(engine=choice), any_base=False)
    with pytest.raises(BadParams, match="has no adapters here"):
        Models(Plan([Reference(str(pico_base))], {"mine": adapter}, Settings(engine=choice)), None, print)
    settings = Settings(engine=pretended("llama.cpp", tmp_path), cache_bytes=1 << 20)
    with pytest.raises(BadParams, match="cannot be said"):
        LoadedVersion("x", pico_base, {}, settings, any_base=False)


def test_an_engine_gets_none_of_the_variables_of_this_environment() -> None:
    given = {"PATH": "/bin", "PYTHONPATH": ".", "VIRTUAL_ENV": "/v", "TEMPER_KEYS": "secret", "HF_HOME": "/h"}
    assert environment_of(given | {"LLAMA_API_KEY": "k", "OMP_WAIT_POLICY": "PASSIVE"}, "/e/bin/vllm") == {
        "PATH": "/e/bin:/bin",
        "HF_HOME": "/h",
        "LLAMA_API_KEY": "k",
    }
