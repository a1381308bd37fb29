from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks.errors import BadData, BadModel
from tasks.records import Message
from tasks.templates import load_tokenizer, render_chat, render_prompt, render_reply, template_digest

CHAT = [
    Message("user", "What is 17 plus 25?"),
    Message("assistant", "42"),
    Message("user", "狗?"),
    Message("assistant", "dog"),
]


def test_the_loss_falls_on_the_replies_and_their_stop_tokens_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask, prompt_tokens = render_chat(tokenizer, CHAT)
    scored = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert scored == "42<|im_end|>dog<|im_end|>"
    assert (
        tokenizer.decode(ids[:prompt_tokens])
        == "<|im_start|>user\nWhat is 17 plus 25?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[-1] == tokenizer.eos_token_id
    assert not any(mask[:prompt_tokens])
    assert mask[prompt_tokens]


def test_the_text_is_that_of_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """The whole chat, decoded, is what the template makes of it, up to the last stop token."""
    whole = tokenizer.apply_chat_template([m._asdict() for m in CHAT], tokenize=False)
    assert str(whole).startswith(str(tokenizer.decode(render_chat(tokenizer, CHAT).ids)))


@pytest.mark.parametrize("reply", ["42", "\n42", " 42", "a\n\nb", "<", "<|im", "42 <|im_start|>", "é\u0301", "🙂"])
def test_training_sees_the_tokens_that_serving_sees(tokenizer: PreTrainedTokenizerBase, reply: str) -> None:
    """The prompt's tokens never depend on the reply, whatever it begins with."""
    prompt = CHAT[:1]
    trained = render_chat(tokenizer, [*prompt, Message("assistant", reply)])
    served = render_prompt(tokenizer, prompt)
    assert trained.ids[: trained.prompt_tokens] == served
    assert trained.ids == served + render_reply(tokenizer, prompt, reply)


def test_a_chat_without_a_reply_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadData, match="nothing to learn"):
        render_chat(tokenizer, CHAT[:1])


TEMPLATES = {
    "drops the reply": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}<|im_end|>",
        "drops or changes",
    ),
    "changes the reply": ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "drops or changes"),
    "no stop token": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "stop token"),
    "rewrites the prompt": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "rewrites",
    ),
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "undefined": ("{{ messages[9].content.upper() }}", "refuses"),
    "reaches for attributes": (
        "{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "unsafe",
    ),
    "calls what it may not": ("{{ messages.append({'role': 'x'}) }}", "unsafe"),
    "syntax": ("{% for m in messages %}", "refuses"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_does_not_fit_is_refused(
    tokenizer: PreTrainedTokenizerBase, name: str, pico_base: Path
) -> None:
    template, said = TEMPLATES[name]
    broken = load_tokenizer(pico_base)
    broken.chat_template = template
    with pytest.raises(BadData) as caught:
        render_chat(broken, CHAT[2:])
    assert said in str(caught.value)


def test_the_digest_tells_templates_apart(tokenizer: PreTrainedTokenizerBase, pico_base: Path) -> None:
    other = load_tokenizer(pico_base)
    assert template_digest(tokenizer) == template_digest(other)
    other.chat_template = str(other.chat_template) + " "
    assert template_digest(tokenizer) != template_digest(other)


def changed(folder: Path, target: Path, change: Callable[[Path], None]) -> Path:
    import shutil

    shutil.copytree(folder, target)
    change(target)
    return target


def set_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "does not load"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "does not load"),
        (set_config(eos_token=None), "no stop token of its own"),
        (set_config(pad_token="<|im_end|>"), "no stop token of its own"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(
    pico_base: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    with pytest.raises(BadModel) as caught:
        load_tokenizer(changed(pico_base, tmp_path / "base", change))
    assert said in str(caught.value)


REAL = ["qwen2.5", "qwen3", "phi-4-mini", "phi-4-base"]


@pytest.mark.parametrize("name", REAL)
def test_real_templates_end_their_replies_with_the_stop_token(real_data: Path, pico_base: Path, name: str) -> None:
    """The templates of published models, over a tokenizer that knows their control tokens."""
    config = json.loads((real_data / "tokenizers_ort" / name / "tokenizer_config.json").read_text())
    stop = config["eos_token"] if isinstance(config["eos_token"], str) else config["eos_token"]["content"]
    template = config["chat_template"]
    if name.startswith("phi"):
        stop = "<|end|>" if "<|end|>" in template else "<|im_end|>"
    real = PreTrainedTokenizerFast.from_pretrained(pico_base)
    real.add_special_tokens({"eos_token": stop})
    real.chat_template = template
    ids, mask, _ = render_chat(real, CHAT[:2])
    scored = real.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert scored.endswith("42" + stop)
    assert ids.count(real.eos_token_id) >= 1
