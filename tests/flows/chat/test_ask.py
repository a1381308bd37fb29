from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from transformers import PreTrainedTokenizerBase

from flows.chat.ask import ask, ask_adapters
from flows.cli.main import chat
from tasks.adapters.attach import attach, init_adapter, save_adapter
from tasks.core.errors import BadModel, BadParams
from tasks.core.records import Message
from tasks.inference.chat import answer, answer_text
from tasks.inference.params import GREEDY, generation_of
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer
from tests.conftest import temper
from tests.helpers.encoder_decoders import LORA, make_base
from tests.helpers.samples import SFT, method

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

    monkeypatch.setattr("flows.chat.ask.connect", lambda workspace: None)
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


def test_an_encoder_decoder_answers_with_its_adapter(tmp_path: Path) -> None:
    texts = [f"the cat saw {n} birds on a mat" for n in range(300)]
    base = make_base(tmp_path / "t5", "t5", texts)
    published_on(base, tmp_path / "adapter")
    said = list(ask_adapters(tmp_path, base, [str(tmp_path / "adapter")], "the cat", 4, any_base=False))
    model = attach(load_model(base), tmp_path / "adapter")
    assert said == [(str(tmp_path / "adapter"), answer_text(model, load_tokenizer(base), "the cat", 4, GREEDY).text)]


def published_on(base: Path, folder: Path) -> None:
    folder.mkdir()
    save_adapter(init_adapter(base, method(LORA, SFT).adapter), folder)


def test_a_folder_that_is_no_adapter_is_told_so(tmp_path: Path, pico_base: Path) -> None:
    with pytest.raises(BadModel, match="is no adapter") as caught:
        list(ask_adapters(tmp_path, pico_base, [str(pico_base)], "Hello", 4, any_base=False))
    assert (caught.value.where, caught.value.got) == (str(pico_base), "no adapter_config.json")


def test_chat_says_in_what_form_the_base_of_an_adapter_is() -> None:
    said = get_args(inspect.get_annotations(chat, eval_str=True)["adapter"])[1].help
    assert "The base is not quantized, also for an adapter that was trained on it in 4 bits (NF4) or 8." in said
