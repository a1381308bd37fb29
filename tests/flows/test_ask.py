from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from flows.ask import ask
from flows.cli import chat
from tasks.chat import answer
from tasks.errors import BadParams
from tasks.generation_params import GREEDY, generation_of
from tasks.models import load_model
from tasks.records import Message
from tests.conftest import temper

TURNS = [("user", "Hello")]


def test_chat_passes_its_options_on(workspace: Path, pico_base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"temperature": 1.5, "top_k": 80, "top_p": 0.9, "repetition_penalty": 1.3, "repetition_range": 3}
    drawn = generation_of({**options, "seed": 8}, "here")
    expected = answer(load_model(pico_base), tokenizer, [Message("user", "Hello")], 8, drawn).text
    words = [w for name, value in (*options.items(), ("seed", 8)) for w in (f"--{name.replace('_', '-')}", str(value))]
    done = temper(workspace, "chat", "Hello", "--model", str(pico_base), "--max-tokens", "8", *words)
    assert done.stdout.removesuffix("\n") == expected
    assert expected != answer(load_model(pico_base), tokenizer, [Message("user", "Hello")], 8).text


def test_chat_refuses_bad_options_at_once(workspace: Path) -> None:
    words = ["--temperature", "-1", "--top-p", "0", "--top-k", "-1", "--repetition-penalty", "0"]
    done = temper(workspace, "chat", "Hello", *words, "--repetition-range", "-1", code=65)
    assert done.stderr.startswith("error: temper chat: text cannot be generated like this")
    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "repetition_range"):
        assert f"- {name}: Input should be" in done.stderr


def test_chat_is_greedy_by_default() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(chat).parameters.items()}
    assert {name: defaults[name] for name in GREEDY.model_dump()} == GREEDY.model_dump()


class Version:
    """A loaded version whose signature has some inputs; it notes what it is asked."""

    def __init__(self, *inputs: str) -> None:
        names = SimpleNamespace(input_names=lambda: list(inputs))
        self.metadata = SimpleNamespace(signature=SimpleNamespace(inputs=names))
        self.asked: dict[str, Any] = {}

    def predict(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        self.asked = request
        return [{"choices": [{"message": {"content": "hello"}}]}]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a version in the place of the registry's."""
    import mlflow.pyfunc  # not the stand-in that `import mlflow` leaves there

    monkeypatch.setattr("flows.ask.connect", lambda workspace: None)
    return lambda version: monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda uri: version)


def test_a_registered_model_is_asked_for_what_is_not_greedy(load: Any, tmp_path: Path) -> None:
    version = Version("messages", "max_tokens", *GREEDY.model_dump())
    load(version)
    assert ask(tmp_path, "models:/m/1", TURNS, 5, generation_of({"temperature": 0.7, "seed": 2}, "")) == "hello"
    assert version.asked == {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 5,
        "temperature": 0.7,
        "seed": 2,
    }


def test_a_version_from_before_there_were_options_still_answers_greedily(load: Any, tmp_path: Path) -> None:
    version = Version("messages", "max_tokens")
    load(version)
    assert ask(tmp_path, "models:/m/1", TURNS, 5) == "hello"
    assert set(version.asked) == {"messages", "max_tokens"}
    with pytest.raises(BadParams, match="registered before models could be asked with seed, temperature"):
        ask(tmp_path, "models:/m/1", TURNS, 5, generation_of({"temperature": 0.7, "seed": 2}, ""))
