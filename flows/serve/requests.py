"""Requests in OpenAI's form: what is read of them, and what is refused by name.

A null is a field that is not there, as OpenAI's clients send them. A field that OpenAI has and this server does not is
refused unless its value asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from flows.serve.errors import ApiError, of_validation, path_of, unsupported
from tasks.core.records import Message
from tasks.inference.params import LEAST_TEMPERATURE, Generation

MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_DEPTH = 64
"""Nesting of a request's JSON; a schema of a real program has some twenty levels."""
SEEDS = 2**31
"""Seeds are taken modulo this."""

_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "reasoning_effort": ("none",),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that this server has not, each with the values that ask for nothing."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_NO_NUL = r"^[^\x00]*$"
"""The character that PostgreSQL has not; in JSON, as which messages are recorded, it is written with others."""

Text = Annotated[str, Field(max_length=1 << 22)]
Name = Annotated[str, Field(min_length=1, max_length=256, pattern=_NO_NUL)]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class TextPart(_Form):
    """A part of a message's content; other types than text are refused by their name."""

    type: str
    text: Text = ""

    @field_validator("type")
    @classmethod
    def _is_text(cls, kind: str) -> str:
        if kind != "text":
            raise ValueError(f"parts of type {kind[:40]!r} are not supported, only 'text'")
        return kind


class CalledFunction(_Form):
    """A call's function; `arguments` are a JSON object as text."""

    name: ToolName
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, text: str) -> str:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("must be a JSON object, as text")
        return text


class ToolCall(_Form):
    """A call of a tool in an earlier turn of the assistant."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


def _is_parts(content: Any) -> str:
    return "(parts)" if isinstance(content, list) else "(text)"


Content = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES), Tag("(parts)")],
    Discriminator(_is_parts),
]


class ChatMessage(_Form):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] = []
    annotations: Annotated[list[Any], Field(max_length=0)] = []

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant's turns have tool_calls")
        if self.tool_call_id and self.role != "tool":
            raise ValueError("only results of tools have a tool_call_id")
        return self

    def text(self) -> str:
        """Return the content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    def message(self) -> Message:
        """Convert it to the turn that chat templates are given."""
        calls = [
            {"name": c.function.name, "arguments": json.loads(c.function.arguments), "text": c.function.arguments}
            for c in self.tool_calls
        ]
        ids = self.tool_call_id or "\n".join(call.id.replace("\n", " ") for call in self.tool_calls)
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=self.text(),
            calls=json.dumps(calls, ensure_ascii=False) if calls else "",
            name=self.name or "",
            call_id=ids,
        )


class Function(_Form):
    """A tool's name, description and the JSON schema of its arguments."""

    name: ToolName
    description: Text = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(_Form):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class JsonSchema(_Form):
    """A named JSON schema."""

    name: Name
    description: Text = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool = True


class ResponseFormat(_Form):
    """Form that the answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and only with it")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """Return the JSON schema that answers are held to; None for any text."""
        if self.json_schema:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(_Form):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=4)]


class _Request(_Form):
    model: Name
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Stop = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    repetition_range: Annotated[int, Field(ge=0, lt=2**31)] = 0
    user: Annotated[str, Field(max_length=256, pattern=_NO_NUL)] = ""
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
    ] = {}

    @model_validator(mode="after")
    def _temperature_fits(self) -> _Request:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0, which is greedy, or at least {LEAST_TEMPERATURE}")
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    def generation(self, seed: int) -> Generation:
        """Return how tokens are chosen, with the seed of one of the answers.

        At temperature 0 the likeliest token is taken, which `top_k` and `top_p` always leave: so they change nothing.
        """
        drawn = self.temperature > 0
        return Generation(
            temperature=self.temperature,
            top_k=self.top_k if drawn else 0,
            top_p=self.top_p if drawn else 1.0,
            repetition_penalty=self.repetition_penalty,
            repetition_range=self.repetition_range,
            seed=seed % SEEDS,
        )


MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]


class ChatRequest(_Request):
    """Request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: str | dict[str, Any] = "auto"
    response_format: ResponseFormat = ResponseFormat(type="text")

    @model_validator(mode="after")
    def _fields_fit(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    def limit(self) -> int | None:
        """Return the most tokens of an answer; None for what the context leaves."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def opening(self) -> str:
        """Return the text of the first user turn, which stays the same as the conversation goes on."""
        return next((each.text() for each in self.messages if each.role == "user"), self.messages[0].text())

    def said(self) -> list[Any]:
        """Return the turns as they were sent."""
        return [each.model_dump(exclude_unset=True) for each in self.messages]

    def offered_tools(self) -> tuple[str, ...]:
        """Return the tools that the model is told of, as JSON."""
        if self.tool_choice == "none":
            return ()
        return tuple(json.dumps(tool.model_dump(exclude_unset=True), ensure_ascii=False) for tool in self.tools)


def _prompt_kind(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return "(text)"
    first = prompt[0] if prompt else ""
    return "(tokens)" if isinstance(first, int) else "(token lists)" if isinstance(first, list) else "(texts)"


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Tag("(texts)")]
    | Annotated[list[TokenId], Tag("(tokens)")]
    | Annotated[list[list[TokenId]], Tag("(token lists)")],
    Discriminator(_prompt_kind),
]


class CompletionRequest(_Request):
    """Request to /v1/completions: text that is gone on with, without a chat template."""

    prompt: Prompt
    max_tokens: MaxTokens = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def opening(self) -> str:
        """Return the first prompt."""
        return str(self.prompts()[0])

    def said(self) -> list[Any]:
        """Return the prompts."""
        return list(self.prompts())

    def offered_tools(self) -> tuple[str, ...]:
        """Return no tools: there is no template that would tell of them."""
        return ()

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, as texts or as tokens."""
        given = self.prompt
        found: Any = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not found or len(found) > MAX_PROMPTS:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"prompt: must be one prompt, or a list of at most {MAX_PROMPTS}",
                param="prompt",
                code="invalid_value",
            )
        return found  # type: ignore[no-any-return]


class FeedbackRequest(_Form):
    """Request to /v1/feedback: what somebody says of an answer."""

    id: Name
    thumb: Literal["up", "down"] | None = None
    better: Annotated[str, Field(min_length=1, max_length=1 << 20, pattern=_NO_NUL)] | None = None
    preferred_over: Name | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> FeedbackRequest:
        said = [each for each in (self.thumb, self.better, self.preferred_over) if each is not None]
        if len(said) != 1:
            raise ValueError("give one of thumb, better and preferred_over")
        if self.preferred_over == self.id:
            raise ValueError("preferred_over must be the id of another answer")
        return self


RequestT = TypeVar("RequestT", bound=_Form)


def parse(body: bytes, form: type[RequestT]) -> RequestT:
    """Read the body of a request.

    Raises:
        ApiError: it is no JSON object in UTF-8, or not of this form; the answer names the field.
    """
    given = _json(body)
    if not isinstance(given, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "The body must be a JSON object.", code="invalid_json")
    _check_texts(given)
    given = _without_nulls(given)
    for name in given.keys() - _fields(form):
        _refuse_field(name, given[name])
    known = {name: value for name, value in given.items() if name in _fields(form)}
    if isinstance(known.get("stop"), str):
        known["stop"] = [known["stop"]]
    if known.get("tool_choice", "auto") not in ("auto", "none"):
        raise unsupported("tool_choice", "tool_choice: only 'auto' and 'none' are supported")
    try:
        return form.model_validate(known)
    except ValidationError as error:
        raise of_validation(error) from error


def _fields(form: type[BaseModel]) -> set[str]:
    return set(form.model_fields)


def _refuse_field(name: str, value: Any) -> None:
    """Refuse a field that this server does not read, unless its value asks for nothing."""
    if name not in _NOTHING:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"Unrecognized request argument supplied: {name[:64]}",
            param=name[:64],
            code="unknown_parameter",
        )
    harmless = _NOTHING[name]
    if not any(value == each and isinstance(value, bool) is isinstance(each, bool) for each in harmless):
        instead = f", only {' or '.join(json.dumps(each) for each in harmless)}" if harmless else ""
        raise unsupported(name, f"{name} is not supported{instead}")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, f"The body is not UTF-8: byte {error.start}.", code="invalid_json"
        ) from error
    except (ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, json.JSONDecodeError | _NoNumber) else type(error).__name__
        raise ApiError(HTTPStatus.BAD_REQUEST, f"The body is not valid JSON: {said}.", code="invalid_json") from error


class _NoNumber(ValueError):
    """A number that JSON does not have."""


def _refuse_constant(name: str) -> Any:
    raise _NoNumber(f"{name} is no number of JSON")


def _without_nulls(value: Any) -> Any:
    """Leave out nulls, but for those in JSON schemas, where they are values."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {
            name: each if name in ("schema", "parameters") and isinstance(each, dict) else _without_nulls(each)
            for name, each in value.items()
            if each is not None
        }
    return value


def _check_texts(given: Any) -> None:
    """Refuse nesting without end, infinite numbers, and half characters, which JSON can write and UTF-8 cannot.

    Raises:
        ApiError: with the place.
    """
    for places, value in _leaves(given, ()):
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{path_of(places)}: the number is too large",
                param=path_of(places),
                code="invalid_value",
            )
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ApiError(
                    HTTPStatus.BAD_REQUEST,
                    f"{path_of(places)}: half of a character (a lone surrogate), at {error.start}",
                    param=path_of(places),
                    code="invalid_value",
                ) from None


def _leaves(value: Any, places: tuple[int | str, ...]) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    if len(places) > MAX_DEPTH:
        raise ApiError(HTTPStatus.BAD_REQUEST, "The body is nested too deeply.", code="invalid_json")
    if isinstance(value, dict):
        for name, each in value.items():
            yield places, name
            yield from _leaves(each, (*places, name if name.isascii() else "?"))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, (*places, number))
    else:
        yield places, value
