"""Asking a model: a registered one through MLflow, as any consumer would, or a plain folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core import pipeline
from tasks.core.errors import BadModel, BadParams
from tasks.core.stage import quiet_libraries
from tasks.inference.params import GREEDY, Generation
from tasks.orchestration.params import load_params
from tasks.registry.client import connect
from tasks.registry.names import CHAMPION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.models.loader import Model

REGISTRY_SCHEMES = ("models:/", "runs:/")
"""What the address of a model in MLflow begins with; anything else is a folder."""


def champion_uri(workspace: Path) -> str:
    """Return the address of the workspace's champion in the registry."""
    return f"models:/{load_params(workspace / pipeline.PARAMS).register_.model}@{CHAMPION}"


def ask(
    workspace: Path, model: str, turns: Sequence[tuple[str, str]], max_tokens: int, generation: Generation = GREEDY
) -> str:
    """Generate the reply to a conversation of (role, text) turns; an encoder-decoder model reads the last one alone.

    Raises:
        BadParams: the registry has no such model, or only one that knows no options.
        BadModel: the folder is no model folder.
    """
    if not model.startswith(REGISTRY_SCHEMES):
        return _ask_folder(Path(model), turns, max_tokens, generation)
    quiet_libraries()
    connect(workspace)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        loaded = mlflow.pyfunc.load_model(model)
    except MlflowException as error:
        raise BadParams(
            "cannot be loaded from the registry",
            where=model,
            got=str(error).split("\n")[0],
            fix="run `temper status` to see what there is",
        ) from error
    names = set(loaded.metadata.signature.inputs.input_names())
    asked = dict(generation.model_dump().items() - GREEDY.model_dump().items())
    if unknown := sorted(asked.keys() - names):
        raise BadParams(
            f"was registered before models could be asked with {', '.join(unknown)}",  # MLflow would leave them out
            where=model,
            fix="register it anew with `temper run`, or ask for a greedy reply",
        )
    if "input" in names:
        return str(loaded.predict({"input": turns[-1][1], "max_tokens": max_tokens, **asked})[0]["output"])
    messages = [{"role": role, "content": content} for role, content in turns]
    reply = loaded.predict({"messages": messages, "max_tokens": max_tokens, **asked})
    return str(reply[0]["choices"][0]["message"]["content"])


def _ask_folder(folder: Path, turns: Sequence[tuple[str, str]], max_tokens: int, generation: Generation) -> str:
    from tasks.adapters.attach import load_packaged
    from tasks.tokenization.chat_template import load_tokenizer

    if not folder.is_dir():
        raise BadModel("there is no such folder", where=str(folder), expected="models:/NAME@ALIAS, or a model folder")
    return _reply(load_packaged(folder), load_tokenizer(folder), turns, max_tokens, generation)


def _reply(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[tuple[str, str]],
    max_tokens: int,
    generation: Generation,
) -> str:
    """Generate the reply of a model in memory to a conversation; an encoder-decoder is given the last turn alone."""
    from tasks.core.records import Message
    from tasks.inference.chat import answer, answer_text
    from tasks.tokenization.architecture import ENCODER_DECODER, architecture_of

    if architecture_of(model) is ENCODER_DECODER:
        return answer_text(model, tokenizer, turns[-1][1], max_tokens, generation).text
    return answer(model, tokenizer, [Message(*turn) for turn in turns], max_tokens, generation).text


def ask_adapters(
    workspace: Path,
    base: Path,
    references: Sequence[str],
    text: str,
    max_tokens: int,
    generation: Generation = GREEDY,
    *,
    any_base: bool,
) -> Iterator[tuple[str, str]]:
    """Generate one base's reply with each of some adapters, as (reference, reply); the base is loaded once.

    Args:
        workspace: whose registry `models:/` references are of.
        base: the model folder that the adapters go on.
        references: where the adapters come from.
        text: what the user says.
        max_tokens: the most tokens in a reply.
        generation: how tokens are chosen.
        any_base: also with adapters that name another base.

    Raises:
        BadParams, BadModel: a reference, an adapter or the base cannot be used.
        Transient: the hub or MLflow does not answer.
    """
    from flows.chat.adapter_pool import AdapterPool
    from tasks.models.loader import load_model
    from tasks.registry.adapter_refs import fetch_adapter_ref
    from tasks.tokenization.chat_template import load_tokenizer

    folders = {reference: fetch_adapter_ref(reference, workspace) for reference in references}
    if not base.is_dir():
        raise BadModel("there is no such folder", where=str(base), expected="the model folder that adapters go on")
    resident, tokenizer = AdapterPool(load_model(base)), load_tokenizer(base)
    for reference, folder in folders.items():
        resident.load(reference, folder, any_base=any_base)
    for reference in folders:
        with resident.using(reference) as model:
            reply = _reply(model, tokenizer, [("user", text)], max_tokens, generation)
        yield reference, reply


def sample(workspace: Path) -> tuple[list[tuple[str, str]], str]:
    """Return a held-out conversation or input that every model answered, and what the row expects."""
    from tasks.core.layout import EXAMPLES
    from tasks.core.parquet import read_records, read_rows
    from tasks.core.records import SeqPair

    nodes = pipeline.load(workspace)
    report = next(out for out in nodes["baseline"].outs if out.endswith(EXAMPLES))
    clean = next(out for out in nodes["validate"].outs if out.endswith("clean"))
    first = read_rows(workspace / report)[0]
    records = read_records(workspace / clean, ("chat", "pair"))
    record = next(record for record in records if record.id == first["id"])
    if isinstance(record, SeqPair):
        return [("user", record.input)], record.target
    return [(m.role, m.content) for m in record.messages[:-1]], record.messages[-1].content  # type: ignore[attr-defined]
