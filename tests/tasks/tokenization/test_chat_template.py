from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks.core.errors import BadData, BadModel
from tasks.core.records import Message
from tasks.tokenization.chat_template import (
    Answered,
    Chat,
    _find_stop_token,
    _texts,
    load_tokenizer,
    render_chat,
    render_chats,
    render_prompt,
    render_replies,
    render_reply,
    template_digest,
)

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


def without_stop(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    set_config(eos_token=None)(folder)


def test_the_stop_token_is_the_one_that_the_template_writes(pico_base: Path, tmp_path: Path) -> None:
    assert load_tokenizer(changed(pico_base, tmp_path / "base", set_config(eos_token=None))).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "does not load"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "does not load"),
        (without_stop, "no stop token of its own"),
        (set_config(pad_token="<|im_end|>"), "no stop token of its own"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(
    pico_base: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    with pytest.raises(BadModel) as caught:
        load_tokenizer(changed(pico_base, tmp_path / "base", change))
    assert said in str(caught.value)


REAL = ["phi-3-mini", "added-tokens", "phi-4-mini", "phi-4-base", "qwen2.5", "qwen3", "v5/smollm3", "gpt-oss"]


def real_tokenizer(folder: Path, pico_base: Path) -> PreTrainedTokenizerBase:
    """A published template over its own tokenizer, or over one that knows its control tokens."""
    if folder.name == "phi-3-mini":
        return load_tokenizer(folder)
    real: PreTrainedTokenizerBase
    if folder.name == "added-tokens":  # its vocabulary has no letters, which `read_tokenizer` refuses
        with pytest.raises(BadModel, match="its tokenizer loses text"):
            load_tokenizer(folder)
        real = AutoTokenizer.from_pretrained(folder)
        _find_stop_token(real)
        return real
    real = PreTrainedTokenizerFast.from_pretrained(pico_base)
    if (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text())
        names = [entry["content"] for entry in config["added_tokens_decoder"].values()]
        real.chat_template = config["chat_template"]
    else:
        real.chat_template = (folder / "chat_template.jinja").read_text()
        names = ["<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>"]
    real.add_tokens([AddedToken(name, special=True) for name in names])
    _find_stop_token(real)
    return real


STOPS = {
    "phi-3-mini": "<|end|>",
    "added-tokens": "<|end|>",
    "phi-4-mini": "<|end|>",
    "phi-4-base": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "v5/smollm3": "<|im_end|>",
    "gpt-oss": "<|end|>",
}


@pytest.mark.parametrize("loss_on", ["all", "last"])
@pytest.mark.parametrize("name", REAL)
def test_the_guarantees_hold_for_real_templates(real_data: Path, pico_base: Path, name: str, loss_on: str) -> None:
    real = real_tokenizer(real_data / "tokenizers_ort" / name, pico_base)
    assert real.eos_token == STOPS[name]
    if name == "qwen3" and loss_on == "all":  # it drops the reasoning of earlier turns, so their tokens change
        with pytest.raises(BadData, match="earlier turn change"):
            render_chat(real, CHAT)
        return
    ids, mask, prompt_tokens = render_chat(real, CHAT, loss_on=loss_on)
    scored = [token for token, trained in zip(ids, mask, strict=True) if trained]
    assert scored.count(real.eos_token_id) == (2 if loss_on == "all" else 1)  # the stop token is in the loss
    assert ids[-1] == real.eos_token_id  # and nothing comes after it, no second one either
    assert ids.count(real.bos_token_id) <= 1 if real.bos_token_id is not None else True
    first = 1 if loss_on == "all" else 3
    assert ids[:prompt_tokens] == render_prompt(real, CHAT[:first])  # training's prompt is serving's, token by token
    if name != "added-tokens":  # its vocabulary has no letters
        assert ("42" in real.decode(scored)) == (loss_on == "all")
        assert "dog" in real.decode(scored)


def test_a_template_that_drops_the_system_turn_is_noticed(real_data: Path, pico_base: Path) -> None:
    real = real_tokenizer(real_data / "tokenizers_ort" / "added-tokens", pico_base)
    with pytest.raises(BadData, match="drops the system turn"):
        render_chat(real, [Message("system", "Be brief."), *CHAT])


def test_turns_of_weight_0_are_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask, _ = render_chat(tokenizer, [CHAT[0], CHAT[1]._replace(learn=False), *CHAT[2:]])
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "dog<|im_end|>"
    with pytest.raises(BadData, match="weight 0"):
        render_chat(tokenizer, [CHAT[0], CHAT[1]._replace(learn=False)])


def test_tools_and_calls_reach_the_template(pico_base: Path) -> None:
    other = load_tokenizer(pico_base)
    other.chat_template = (
        "{% if tools %}{{ tools[0].name }};{% endif %}{% for m in messages %}{{ m.role }}:"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.x }}){% endfor %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    calling = Message("assistant", "", '[{"name": "find", "arguments": {"x": 1}}]')
    chat = [Message("user", "q"), calling, Message("tool", "r"), Message("assistant", "a")]
    ids, mask, _ = render_chat(other, chat, ('{"name": "find"}',))
    assert other.decode(ids) == "find;user:q<|im_end|>assistant:find(1)<|im_end|>tool:r<|im_end|>assistant:a<|im_end|>"
    assert other.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "find(1)<|im_end|>a<|im_end|>"


def test_a_template_without_end_is_stopped(pico_base: Path, small_limits: None) -> None:
    other = load_tokenizer(pico_base)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    other.chat_template = loop + "{{ messages[0].content }}"
    with pytest.raises(BadData, match="does not come to an end"):
        render_prompt(other, CHAT[:1])


def test_one_row_at_fault_does_not_take_the_others_along(tokenizer: PreTrainedTokenizerBase, pico_base: Path) -> None:
    strict = load_tokenizer(pico_base)
    strict.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + str(
        strict.chat_template
    )
    good, bad, again = render_chats(strict, [Chat(CHAT), Chat([Message("system", "s"), *CHAT]), Chat(CHAT)])
    assert good == again == render_chat(tokenizer, CHAT)
    assert isinstance(bad, BadData)
    assert "user first" in bad.got


def test_several_replies_share_their_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    both, lost = render_replies(tokenizer, [Chat(CHAT[:1]), Chat(CHAT[:3])], [["a", "b"], ["c"]])
    assert isinstance(both, Answered)
    assert isinstance(lost, Answered)
    assert both.prompt == render_prompt(tokenizer, CHAT[:1])
    assert both.replies == [render_reply(tokenizer, CHAT[:1], reply) for reply in ("a", "b")]
    assert lost.replies == [render_reply(tokenizer, CHAT[:3], "c")]


# --- against the masks of transformers --------------------------------------------------------------------------------

MARKED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
"""Templates of many families in which TRL marks what the assistant says, for transformers' own masks."""

NOT_RENDERED = {
    "deepseek_r1_distill": "rewrites the prompt",  # asks for reasoning that the training text does not have
    "deepseekv3": "rewrites the prompt",
    "nemotron_3": "rewrites the prompt",
    "gptoss": "does not end a reply",  # the last turn ends with another token than those before
    "idefics3": "drops the user turn",  # of pictures: content is a list of parts
    "llava_next": "drops the user turn",
    "smolvlm": "drops the user turn",
}


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_masks_agree_with_the_marks_of_trls_training_templates(path: Path, pico_base: Path) -> None:
    """Token by token the same text; what is trained is trained there too.

    Besides, they learn only white space after stop tokens and what serving's prompt already holds.
    """
    real: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(pico_base)
    real.chat_template = path.read_text()
    names = re.findall(
        r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[/?INST\]|<｜[^｜]+｜>", real.chat_template
    )
    real.add_tokens([AddedToken(name, special=True) for name in sorted(set(names))])
    _find_stop_token(real)
    refused = next((why for family, why in NOT_RENDERED.items() if path.stem.startswith(family)), "")
    if refused:
        with pytest.raises(BadData, match=refused):
            render_chat(real, CHAT)
        return
    ids, mask, prompt_tokens = render_chat(real, CHAT)
    plain = [{"role": m.role, "content": m.content} for m in CHAT]
    theirs: Any = real.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"][: len(ids)] == ids
    marks = [bool(mark) for mark in theirs["assistant_masks"][: len(ids)]]
    assert all(theirs_too for trained, theirs_too in zip(mask, marks, strict=True) if trained)
    for stop in [place for place, token in enumerate(ids) if token == real.eos_token_id and mask[place]]:
        assert marks[stop]
    besides = [place for place in range(len(ids)) if marks[place] and not mask[place]]
    served = set(range(prompt_tokens)) | set(range(mask.index(False, prompt_tokens), len(ids)))
    assert served.issuperset(besides)
    assert sum(mask) >= 4


def test_the_loss_is_where_a_template_marks_it(pico_base: Path) -> None:
    """By the marks of a template that has the model read its reasoning and not learn it."""
    real = load_tokenizer(pico_base)
    real.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}thought. "
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids, mask, _ = render_chat(real, CHAT)
    trained = [m.content for m in CHAT if m.role == "assistant"]
    assert real.decode([token for token, on in zip(ids, mask, strict=True) if on]) == "".join(
        f"{text}<|im_end|>" for text in trained
    )
    assert real.decode(ids).count("assistant\nthought. ") == len(trained)
    assert sum(render_chat(real, CHAT, loss_on="last").mask) == sum(mask[len(mask) - mask[::-1].index(False) :])
    real.chat_template = real.chat_template.replace(
        "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
    )
    with pytest.raises(BadData, match="leave out the stop token"):
        render_chat(real, CHAT)


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_texts_are_those_of_the_tokenizers_own_call(path: Path, pico_base: Path) -> None:
    real: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(pico_base)
    real.chat_template = path.read_text()
    plain = [{"role": m.role, "content": m.content} for m in CHAT]
    for answering in (True, False):
        (ours,) = _texts(real, [Chat(CHAT)], answering=answering)
        if isinstance(ours, BadData):
            continue  # a template of pictures
        assert ours.text == real.apply_chat_template(plain, tokenize=False, add_generation_prompt=answering)


# --- what a template must not drop ------------------------------------------------------------------------------------

CALLING = Message("assistant", "", '[{"name": "find", "arguments": {"x": 1}}]')


def test_dropped_tools_calls_and_reasoning_are_noticed(tokenizer: PreTrainedTokenizerBase, pico_base: Path) -> None:
    """ChatML knows no tools: without this the model would learn to answer nothing at all."""
    for what, messages, tools in (
        ("drops the tools", CHAT, ('{"name": "find"}',)),
        ("drops the assistant's tool calls", [CHAT[0], CALLING, Message("tool", "r"), *CHAT[1:]], ()),
    ):
        with pytest.raises(BadData, match=what):
            render_chat(tokenizer, messages, tools)
    dropping = load_tokenizer(pico_base)
    dropping.chat_template = str(dropping.chat_template).replace(
        "{{ message.content }}", "{{ message.content.split('</think>')[-1] }}"
    )
    with pytest.raises(BadData, match="drops the assistant's reasoning"):
        render_chat(dropping, [CHAT[0], Message("assistant", "<think>secret</think>Yes")])


def test_what_a_training_saved_in_the_tokenizer_cuts_nothing(pico_base: Path, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        saved = json.loads(path.read_text())
        saved["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        saved["padding"] = {
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>",
        }  # fmt: skip
        path.write_text(json.dumps(saved))

    spoiled = load_tokenizer(changed(pico_base, tmp_path / "base", spoil))
    assert render_chat(spoiled, CHAT) == render_chat(load_tokenizer(pico_base), CHAT)
