"""Go templates for Ollama: written from pieces, and run here by a reader of the few constructs that they use."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadModel
from tasks.core.records import Message
from tasks.merge.export.ollama import go_template, modelfile, pieces_of
from tasks.tokenization.chat_template import load_tokenizer, render_prompt
from tests.conftest import ROOT

TEMPLATES = sorted((ROOT / "data" / "templates").glob("*.jinja"))
TALK = [
    Message("user", "Hello {{ .System }}"),
    Message("assistant", "Hi\n"),
    Message("user", "Bye"),
    Message("assistant", "ok"),
    Message("user", "?"),
]
SYSTEM = Message("system", "Be kind.")


class Go:
    """What Go's text/template makes of the constructs that are used: if, else, range, one variable, fields, texts."""

    def __init__(self, template: str, messages: Sequence[Message]) -> None:
        self.parts = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
        self.system = "".join(message.content for message in messages if message.role == "system")
        self.messages, self.later = messages, False

    def text(self) -> str:
        return self.run(0, len(self.parts), None)

    def run(self, start: int, stop: int, message: Message | None) -> str:
        """The parts from `start` to `stop`, where blocks are whole."""
        text, place = "", start
        while place < stop:
            part = self.parts[place]
            action = part[2:-2].strip() if part.startswith("{{") else ""
            if action.startswith(("if ", "range ")):
                marks = self.block(place)
                text += self.branch(action, marks, message)
                place = marks[-1] + 1
                continue
            text += self.plain(action, message) if action else part
            place += 1
        return text

    def block(self, place: int) -> list[int]:
        """Where a block begins, where its else parts do, and where it ends."""
        depth, marks = 0, [place]
        for number in range(place, len(self.parts)):
            action = self.parts[number][2:-2].strip() if self.parts[number].startswith("{{") else ""
            depth += action.startswith(("if ", "range ")) - (action == "end")
            if depth == 1 and action.startswith("else"):
                marks.append(number)
            if depth == 0:
                return [*marks, number]
        raise AssertionError("a block has no end")

    def branch(self, action: str, marks: list[int], message: Message | None) -> str:
        if action.startswith("range "):
            return "".join(self.run(marks[0] + 1, marks[1], each) for each in self.messages)
        for begin, end in itertools.pairwise(marks):
            condition = self.parts[begin][2:-2].strip().removeprefix("else").strip()
            if not condition or self.holds(condition, message):
                return self.run(begin + 1, end, message)
        return ""

    def holds(self, condition: str, message: Message | None) -> bool:
        if condition in ("if .System", "if $later"):
            return bool(self.system) if condition == "if .System" else self.later
        (role,) = re.findall(r'^if eq .Role "(\w+)"$', condition)
        return message is not None and message.role == str(role)

    def plain(self, action: str, message: Message | None) -> str:
        if action in ("$later := false", "$later = true"):
            self.later = action.endswith("true")
            return ""
        return {".System": self.system, ".Content": message.content if message else "", '"{{"': "{{"}[action]


def go(template: str, messages: Sequence[Message]) -> str:
    return Go(template, messages).text()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("messages", [TALK[:1], TALK, [SYSTEM, *TALK[:1]], [SYSTEM, *TALK]], ids=["1", "5", "s1", "s5"])
def test_the_go_template_writes_what_the_chat_template_writes(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, path: Path, messages: list[Message]
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", path.read_text())
    monkeypatch.setattr(tokenizer, "add_bos_token", False, raising=False)
    if path.stem in ("mistral", "plain", "alpaca", "vicuna", "zephyr", "baichuan", "phi", "gemma"):
        messages = [Message(m.role, m.content.strip()) for m in messages]  # these trim what is said
    want = str(tokenizer.decode(render_prompt(tokenizer, messages)))
    assert go(go_template(pieces_of(tokenizer), ""), messages) == want


def test_a_template_that_looks_at_more_than_turns_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", numbered)
    with pytest.raises(BadModel, match="none that can be written for Ollama"):
        pieces_of(tokenizer)


def test_what_begins_texts_is_left_to_ollama_and_braces_are_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = pieces_of(tokenizer)._replace(start="<s>{{x}}\n", system=("<s>[", "]"))
    template = go_template(pieces, "<s>")
    assert "<s>" not in template
    assert go(template, TALK[:1]).startswith("{{x}}\nHello")
    assert go(template, [SYSTEM, *TALK[:1]]).startswith("[Be kind.]Hello")


def test_the_modelfile_of_the_shipped_model() -> None:
    text = modelfile(load_tokenizer(ROOT / "models" / "tiny"), "model.gguf", 512)
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 512\nPARAMETER temperature 0\n')
