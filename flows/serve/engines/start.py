"""From a model folder to an engine of another process that writes what temper's own would."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flows.serve.engines.dialect import Dialect, Launch
from flows.serve.engines.llama_cpp import LlamaCpp
from flows.serve.engines.parity import PROBE_TOKENS, Parity, check_parity, probe_prompts
from flows.serve.engines.pieces import Pieces
from flows.serve.engines.process import EngineProcess, program_of
from flows.serve.engines.remote import RemoteEngine
from flows.serve.engines.vllm import Vllm
from tasks.adapters.package import FOLDER
from tasks.core.errors import BadModel, BadParams
from tasks.core.memory import out_of_memory, ran_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "temper"
"""The engine that is none of these."""
DIALECTS: dict[str, Dialect] = {each.name: each for each in (Vllm(), LlamaCpp())}


class EngineChoice(NamedTuple):
    """Another engine that answers instead of temper's own.

    Attributes:
        dialect: which one.
        program: its executable.
        dtype: the number format of its weights; None: as the model folder has them.
        options: further words of its command line.
    """

    dialect: Dialect
    program: Path
    dtype: str | None = None
    options: tuple[str, ...] = ()


class Room(NamedTuple):
    """What an engine may take: requests at a time and waiting, tokens of one, and memory of keys and values."""

    slots: int
    queue: int
    context: int | None
    cache_bytes: int | None


def engine_choice(name: str, path: Path | None, dtype: str | None, options: Collection[str]) -> EngineChoice | None:
    """Read the choice of an engine; None for temper's own.

    Raises:
        BadParams: there is no such engine, it is not there, or it has no such number format.
    """
    if name == OWN:
        if path or dtype or options:
            raise BadParams(
                "are for other engines", where="--engine-path, --engine-dtype, --engine-option", fix="say --engine NAME"
            )
        return None
    if name not in DIALECTS:
        raise BadParams("is no engine", where=f"--engine {name}", expected=", ".join((OWN, *DIALECTS)))
    dialect = DIALECTS[name]
    if dtype and dtype not in dialect.dtypes:
        raise BadParams(
            "is no number format of this engine", where=f"--engine-dtype {dtype}", expected=", ".join(dialect.dtypes)
        )
    return EngineChoice(dialect, program_of(dialect, path), dtype, tuple(options))


def start_engine(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Pieces,
    end_ids: Collection[int],
    choice: EngineChoice,
    room: Room,
    where: str,
    say: Callable[[str], None],
) -> tuple[RemoteEngine, Parity]:
    """Start an engine on a merged model, and hold its greedy tokens against those of the model as temper has it.

    Args:
        folder: the model folder.
        tokenizer: of the model.
        pieces: the bytes of its tokens.
        end_ids: tokens that end an answer.
        choice: of the engine.
        room: what it may take.
        where: names the version, for errors.
        say: tells of what happens to its process, in one line.

    Raises:
        BadModel: the engine cannot have this model, or does not start on it.
        BadParams: it cannot be run so.
        NotEquivalent: it writes other tokens.
        OutOfMemory: there is none left to compare it.
        EngineFailed: it gives none.
    """
    dialect = choice.dialect
    if (folder / FOLDER).is_dir():
        raise BadModel(
            f"cannot be served by {dialect.name}: its adapter is beside the weights, not in them",
            where=str(folder),
            fix="serve it without --engine, or train by a method that can be merged",
        )
    if room.cache_bytes is not None and not dialect.limits_cache:
        raise BadParams(
            "cannot be said", where=f"--cache-mib with --engine {dialect.name}", fix="say --slots and --context"
        )
    dtype = choice.dtype or _dtype_of(folder, dialect)
    scratch = tempfile.TemporaryDirectory(prefix="temper-engine-", ignore_cleanup_errors=True)
    try:
        place = Path(scratch.name)
        launch = Launch(
            choice.program,
            dialect.prepare(folder, dtype, place),
            dtype,
            0,
            room.slots,
            room.context,
            room.cache_bytes,
            choice.options,
        )
        engine = RemoteEngine(
            dialect,
            lambda: EngineProcess(dialect, launch, place),
            end_ids,
            pieces,
            slots=room.slots,
            queue=room.queue,
            say=lambda line: say(f"{where}: {line}"),
            ended=scratch.cleanup,
        )
    except BaseException:
        scratch.cleanup()
        raise
    try:
        return engine, _parity(engine, folder, tokenizer, end_ids, dtype, room.context, f"{where} by {dialect.name}")
    except BaseException:
        engine.close(finish=False)
        raise


def _parity(
    engine: RemoteEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int],
    dtype: str,
    context: int | None,
    where: str,
) -> Parity:
    """Load the model as temper has it, compare, and let go of it."""
    import torch

    from tasks.adapters.attach import load_packaged

    prompts = probe_prompts(tokenizer, context)
    if not prompts:
        raise BadParams(
            "leaves no room for a prompt to compare the engine on",
            where="--context",
            got=str(context),
            expected=f"at least {min(map(len, probe_prompts(tokenizer, None))) + PROBE_TOKENS} tokens",
        )
    try:
        model = load_packaged(folder)
        exact = dtype == "float32" and model.dtype == torch.float32
        return check_parity(engine.written, model, tokenizer, prompts, end_ids, exact=exact, where=where)
    except Exception as error:
        if not ran_out(error):
            raise
        fix = "leave some to temper, which computes a few tokens itself to compare: docs/serving.md, Other engines"
        raise out_of_memory(error, where=where, fix=fix) from error
    finally:
        model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _dtype_of(folder: Path, dialect: Dialect) -> str:
    from tasks.core.artifacts import read_object

    config = read_object(folder / "config.json")
    found = str(config.get("dtype") or config.get("torch_dtype"))
    if found not in dialect.dtypes:
        raise BadModel(
            f"has weights in a number format that {dialect.name} does not take",
            where=str(folder / "config.json"),
            got=found,
            expected=", ".join(dialect.dtypes),
            fix="name one by --engine-dtype",
        )
    return found
