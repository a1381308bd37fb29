"""Messages to token ids, by the model's own chat template: the one place that training, evaluation and serving share.

A prompt and its reply are tokenised apart and joined, because that is what a model sees when it answers: first the
whole prompt, then its own tokens. Text that would merge across the seam can therefore never make training differ from
serving. Tokenizers that mark the beginning of every text are given the whole text instead, and a row is refused if its
prompt's tokens do not stay what they are when it is answered. Templates run in the immutable Jinja sandbox, in a
process with little time and little memory (`tasks/core/limited_process.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from tasks.core.errors import BadData, BadModel
from tasks.core.limited_process import FAILURES, REFUSED, WORKER, Failure, Result
from tasks.core.records import Message
from tasks.tokenization.architecture import DECODER, architecture_in
from tasks.tokenization.template_form import DAY, TemplateForm, as_template_input, dated, find_calls, find_reasoning
from tasks.tokenization.tokenizer import encode, encode_answers, encode_pieces, encode_rows, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RowT = TypeVar("RowT")

TemplateRow: TypeAlias = tuple[Sequence[Mapping[str, Any]], Any]
"""Messages and the schemas of tools, as a template is given them."""


class Chat(NamedTuple):
    """Chat as a template's input: the turns, and JSON schemas of tools as text."""

    messages: Sequence[Message]
    tools: Sequence[str] = ()


class Rendered(NamedTuple):
    """A chat as tokens: `mask` is true where the loss falls, `prompt_tokens` the length of what comes before that."""

    ids: list[int]
    mask: list[bool]
    prompt_tokens: int


class Answered(NamedTuple):
    """One prompt and several replies to it, as tokens; each reply ends with the stop token."""

    prompt: list[int]
    replies: list[list[int]]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a model folder's tokenizer, with a stop token that is not the padding, and a decoder's chat template.

    Where the template ends replies with another token than `eos_token`, as Phi's and Gemma's do, that one is the stop
    token here, in training and in serving.

    Raises:
        BadModel: it does not load, or lacks one of these.
    """
    WORKER.start()  # it gets ready while the tokenizer is read
    tokenizer = read_tokenizer(folder)
    chats = architecture_in(folder) is DECODER  # what an encoder reads is no chat
    if chats and not tokenizer.chat_template:
        raise BadModel(
            "its tokenizer has no chat template",
            where=str(folder),
            fix="put a chat_template.jinja beside tokenizer.json",
        )
    if chats:
        if isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = dated(tokenizer.chat_template, DAY)
        _find_stop_token(tokenizer)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BadModel(
            "its tokenizer has no stop token of its own: padding equal to the stop token would hide the end of a turn",
            where=str(folder),
            got=f"eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}",
            fix="set eos_token and a different pad_token in tokenizer_config.json",
        )
    return tokenizer


def _find_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the added token that the template writes first after a reply the stop token, unless its own stands there.

    Phi's own stands only at the end of a conversation, so that a model trained on it would not stop before.
    """
    asked, answered, again = (Message(role, f"qxzv{n}") for n, role in enumerate(("user", "assistant", "user")))
    (text,) = _texts(tokenizer, [Chat([asked, answered, again])], answering=False)
    if isinstance(text, BadData) or answered.content not in text.text:
        return  # what is wrong with the template is told where a row is rendered
    tail = text.text.partition(answered.content)[2].partition(again.content)[0]
    written = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in tail]
    if written and str(tokenizer.eos_token) not in written:
        tokenizer.eos_token = min(written, key=lambda token: (tail.index(token), -len(token)))


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute the SHA-256 of the chat template, equal for models that are prompted alike; empty without one."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() if tokenizer.chat_template else ""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[str] = ()
) -> list[int]:
    """Render a conversation up to where the assistant begins to answer, as token ids.

    Raises:
        BadData: the template refuses it, or drops a turn.
    """
    (text,) = _texts(tokenizer, [Chat(messages, tools)], answering=True)
    return encode(tokenizer, [_whole(text).text])[0]


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, answering: bool) -> str:
    """Render plain messages as text, up to where the assistant begins, or goes on with the last one.

    Raises:
        BadData: the template refuses it, or drops the message that is to be continued.
    """
    if answering:
        return str(_whole(_apply(tokenizer, [(messages, None)], answering=True)[0]).text)
    last = messages[-1]
    marked = [*messages[:-1], {**last, "content": f"{last['content']}{_GO_ON}"}]
    text = _whole(_apply(tokenizer, [(marked, None)], answering=False)[0]).text
    end = text.rfind(_GO_ON.strip())
    if end < 0 or last["content"].strip() not in text:
        raise BadData("the chat template drops or changes the text that is to be continued", got=repr(text[-60:]))
    return str(text[:end] if text.startswith(_GO_ON, end) else text[:end].rstrip())  # where it trims texts


_GO_ON = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of a message that is to be continued, as in transformers."""


def render_reply(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], reply: str) -> list[int]:
    """Render a reply to `prompt` as token ids, up to and including the stop token.

    Raises:
        BadData: the template rewrites what came before the reply, drops the reply, or does not end it with the stop
            token.
    """
    (answered,) = render_replies(tokenizer, [Chat(prompt)], [[reply]])
    answer: Answered = _whole(answered)
    return answer.replies[0]


def render_replies(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Chat], replies: Sequence[Sequence[str]]
) -> list[Answered | BadData]:
    """Render prompts with one or more replies each as tokens; a row that cannot be rendered gets the reason."""
    return tokens_of_replies(tokenizer, texts_of_replies(tokenizer, prompts, replies))


def texts_of_replies(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Chat], replies: Sequence[Sequence[str]]
) -> list[list[str] | BadData]:
    """Run the template's half of `render_replies`: of each row the text of its prompt, then those of its replies."""
    asked = _texts(tokenizer, prompts, answering=True)
    each = [(place, Message("assistant", text)) for place, texts in enumerate(replies) for text in texts]
    given = _texts(
        tokenizer,
        [Chat([*prompts[place].messages, reply], prompts[place].tools) for place, reply in each],
        answering=False,
    )
    pieces: list[Any] = [text if isinstance(text, BadData) else [text.text] for text in asked]
    for (place, reply), after in zip(each, given, strict=True):
        if not isinstance(pieces[place], BadData):
            piece = _reply_text(tokenizer, asked[place], after, reply)
            pieces[place] = piece if isinstance(piece, BadData) else [*pieces[place], piece]
    return pieces


def tokens_of_replies(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str] | BadData]
) -> list[Answered | BadData]:
    """Run the tokenizer's half of `render_replies`; it may run in another thread than the template's."""
    return encode_rows(tokenizer, texts, encode_answers, lambda ids: Answered(ids[0], ids[1:]))


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[str] = (), loss_on: str = "all"
) -> Rendered:
    """Render a chat as tokens, with the loss on the assistant's turns and their stop tokens; see `render_chats`.

    Raises:
        BadData: there are no target tokens, or the tokens of a turn change once a later one is added.
    """
    rendered: Rendered = _whole(render_chats(tokenizer, [Chat(messages, tools)], loss_on)[0])
    return rendered


def render_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], loss_on: str = "all"
) -> list[Rendered | BadData]:
    """Render chats as tokens; one that cannot be rendered gets the reason.

    Args:
        tokenizer: with its template.
        chats: any number of them; they are rendered and tokenised together.
        loss_on: `all` of the assistant's turns, or the `last` one. Turns with `learn` false are never trained on.

    Where a template marks by `{% generation %}` the assistant's text, the loss falls on what is marked, else on all
    that it adds for the turn to the prompt for answering; never on what follows the stop token. What stands after the
    last turn that is trained on is left out: no loss falls on it.
    """
    return tokens_of_chats(tokenizer, texts_of_chats(tokenizer, chats, loss_on))


def texts_of_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], loss_on: str = "all"
) -> list[list[str] | BadData]:
    """Run the template's half of `render_chats`: each chat in parts, by turns context and target."""
    targets = [_target_turns(chat, loss_on) for chat in chats]
    turns = [(place, index) for place, places in enumerate(targets) for index in places]
    asked = _texts(tokenizer, [Chat(chats[p].messages[:i], chats[p].tools) for p, i in turns], answering=True)
    given = _texts(tokenizer, [Chat(chats[p].messages[: i + 1], chats[p].tools) for p, i in turns], answering=False)
    pieces: list[Any] = [[] if places else BadData(_nothing(chat)) for chat, places in zip(chats, targets, strict=True)]
    for (place, index), before, after in zip(turns, asked, given, strict=True):
        if isinstance(pieces[place], BadData):
            continue
        reply = _reply_text(tokenizer, before, after, chats[place].messages[index])
        if isinstance(reply, BadData):
            pieces[place] = reply
            continue
        so_far, prompt = "".join(pieces[place]), _whole(before).text
        if not prompt.startswith(so_far):
            pieces[place] = BadData(
                "the tokens of an earlier turn change when the next is added",
                got=f"turn {index + 1}",
                fix="set render.loss_on to last (--loss-on last), so that only the last reply is trained on",
            )
            continue
        target_parts = _marked(reply, len(prompt), _whole(after).beside)
        if isinstance(target_parts, BadData):
            pieces[place] = target_parts
        else:
            pieces[place] += [prompt[len(so_far) :] + target_parts[0], *target_parts[1:]]
    return pieces


def tokens_of_chats(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str] | BadData]
) -> list[Rendered | BadData]:
    """Run the tokenizer's half of `render_chats`; it may run in another thread than the template's."""
    return encode_rows(tokenizer, texts, encode_pieces, _joined)


def _joined(pieces: Sequence[Sequence[int]]) -> Rendered:
    """Join pieces that are by turns context and target into one row with its loss mask."""
    ids, mask = list[int](), list[bool]()
    for place, piece in enumerate(pieces):
        ids += piece
        mask += [place % 2 == 1] * len(piece)
    return Rendered(ids, mask, len(pieces[0]))


def _target_turns(chat: Chat, loss_on: str) -> list[int]:
    places = [i for i, message in enumerate(chat.messages) if message.role == "assistant" and message.learn]
    return places[-1:] if loss_on == "last" else places


def _nothing(chat: Chat) -> str:
    some = any(message.role == "assistant" for message in chat.messages)
    return "has nothing to learn from (" + ("every assistant turn has weight 0)" if some else "no assistant turn)")


def _whole(value: Any) -> Any:
    if isinstance(value, BadData):
        raise value
    return value


def _reply_text(
    tokenizer: PreTrainedTokenizerBase, before: Result | BadData, after: Result | BadData, reply: Message
) -> str | BadData:
    """Return what the template adds for a reply, up to and including the stop token."""
    for text in (before, after):
        if isinstance(text, BadData):
            return text
    prompt, answered = _whole(before).text, _whole(after).text
    if not answered.startswith(prompt):
        return BadData("the chat template rewrites the prompt once it is answered, so no loss mask can be told")
    added = answered[len(prompt) :]
    missing = [call["name"] for call in json.loads(reply.calls or "[]") if call["name"] not in added]
    if missing:
        return BadData("the chat template drops the assistant's tool calls", got=", ".join(missing))
    if reply.reasoning.strip() not in added:
        return BadData(
            "the chat template drops the assistant's reasoning",
            got=repr(reply.reasoning[:60]),
            fix="set render.reasoning to drop (--reasoning drop), or take another template",
        )
    said = reply.content.strip()
    place = added.find(said)
    if place < 0:
        reasoning, _, said = said.rpartition("</think>")  # templates may set reasoning apart
        if reasoning.replace("<think>", "").strip() not in added:
            return BadData("the chat template drops the assistant's reasoning", got=repr(reasoning[:60]))
        said = said.strip()
        place = added.find(said)
    if place < 0:
        return BadData("the chat template drops or changes the assistant's text", got=repr(added[:60]))
    stop = str(tokenizer.eos_token)
    end = added.find(stop, place + len(said))
    if end < 0:
        return BadData("the chat template does not end a reply with the stop token", expected=repr(stop))
    return str(added[: end + len(stop)])


def _marked(reply: str, start: int, marks: Sequence[tuple[int, int]] | None) -> list[str] | BadData:
    """Split the reply by its marks into parts, by turns context, even if empty, and target; `start` is its place."""
    if marks is None:
        return ["", reply]
    parts, place = [], 0
    for first, last in marks:
        first, last = max(first - start, place), min(last - start, len(reply))
        if first < last:
            parts += [reply[place:first], reply[first:last]]
            place = last
    if not parts or place < len(reply):
        return BadData(
            "the chat template's generation marks leave out the stop token, which would never be trained on",
            got=repr(reply[place:][-60:]),
            fix="mark it too, or take the marks out: then all that the template adds for a reply is trained on",
        )
    return parts


def _texts(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], *, answering: bool) -> list[Result | BadData]:
    """Render each conversation by the template; `answering` adds what comes before an answer."""
    form = form_of(tokenizer, chats)
    schemas = {tools: [json.loads(tool) for tool in tools] or None for tools in {tuple(chat.tools) for chat in chats}}
    rows = [(as_template_input(chat.messages, form), schemas[tuple(chat.tools)]) for chat in chats]
    texts = _apply(tokenizer, rows, answering=answering)
    return [
        _dropped(text.text, chat, partial(_reads, tokenizer, row)) or text if isinstance(text, Result) else text
        for chat, row, text in zip(chats, rows, texts, strict=True)
    ]


def _reads(tokenizer: PreTrainedTokenizerBase, row: TemplateRow, place: int) -> bool:
    """Return whether the template writes all of a turn's text in some form: it writes another one for another text."""
    messages, tools = row

    def changed(content: str) -> TemplateRow:
        return [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]], tools

    content = messages[place]["content"]
    tried = [changed(each) for each in (content, f"qxzv{content}", f"{content}qxzv")]
    texts = _apply(tokenizer, tried, answering=False)
    return not any(isinstance(text, BadData) for text in texts) and len({_whole(text).text for text in texts}) == len(
        texts
    )


def _apply(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[TemplateRow], *, answering: bool
) -> list[Result | BadData]:
    """Apply the template as the tokenizer's `apply_chat_template` does, in the worker with its limits.

    Raises:
        BadModel: it has taken too long too often.
    """
    special: Mapping[str, Any] = tokenizer.special_tokens_map
    tokens = {
        name: [str(each) for each in token] if isinstance(token, list) else str(token)
        for name, token in special.items()
    }
    result: list[Any] = [None] * len(rows)
    for with_tools in (False, True):  # some have another template for these
        places = [place for place, (_, tools) in enumerate(rows) if bool(tools) is with_tools]
        if not places:
            continue
        source = tokenizer.get_chat_template(tools=rows[places[0]][1])
        common = (source, {"add_generation_prompt": answering} | tokens, not answering and bool(_MARKED.search(source)))
        try:
            found = WORKER.map(_RENDERER, common, [rows[n] for n in places])
        except BadModel as error:
            error.where, error.fix = f"{tokenizer.name_or_path}: its chat template", "take another template"
            raise
        for place, made in zip(places, found, strict=True):
            result[place] = made if isinstance(made, Result) else _refusal(made)
    return result


def _refusal(failure: Failure) -> BadData:
    """Say why the template made no text."""
    if failure.kind == REFUSED:
        return BadData("the chat template refuses this conversation", got=failure.text)
    return BadData(f"the chat template {FAILURES[failure.kind]}", got=failure.text)


_RENDERER = "tasks.tokenization.template_worker:chat_renderer"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def form_of(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> TemplateForm:
    """Return what the template reads of turns, as far as these chats have it; each template is tried once."""
    turns = [turn for chat in chats for turn in chat.messages if turn.calls or turn.reasoning]
    if not turns:
        return TemplateForm()
    known = _FORMS.setdefault(str(tokenizer.chat_template), {})

    def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
        return _whole(_apply(tokenizer, [(messages, tools)], answering=False)[0]).text  # type: ignore[no-any-return]

    if "reasoning" not in known and any(message.reasoning for message in turns):
        known["reasoning"] = find_reasoning(render)
    if "calls" not in known and any(message.calls for message in turns):
        known["calls"] = find_calls(render)
    return TemplateForm(known.get("reasoning", ""), *known.get("calls", (False, False)))


_FORMS: dict[str, dict[str, Any]] = {}
"""What was found of each template."""


def _dropped(text: str, chat: Chat, reads: Callable[[int], bool]) -> BadData | None:
    """Check that a template leaves out nothing of the system's or the user's turns; return the problem, if any.

    Args:
        text: what it made of the chat.
        chat: the chat.
        reads: tells whether it writes a turn's text in another form, such as JSON or HTML; asked where it is not found.
    """
    for tool in chat.tools:
        schema = json.loads(tool)
        name = schema.get("function", schema).get("name") if isinstance(schema, dict) else None
        if name and name not in text:
            return BadData("the chat template drops the tools", got=str(name), fix="take a template that knows tools")
    for place, message in enumerate(chat.messages):
        if message.role != "assistant" and message.content.strip() not in text and not reads(place):
            return BadData(
                f"the chat template drops the {message.role} turn",
                got=repr(message.content[:60]),
                fix="put its text into the user's turn, or take another template",
            )
    return None
