"""A model under examination: what it is, by digests, and the model itself, loaded when it is first asked something."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tasks.adapters.attach import attach, load_packaged
from tasks.adapters.files import CONFIG, WEIGHTS, check_base_folder
from tasks.adapters.package import FOLDER as PACKAGED
from tasks.adapters.package import base_in
from tasks.adapters.params import Int8Adapter, QloraAdapter
from tasks.core.artifacts import MANIFEST, digest, read_object
from tasks.core.errors import BadModel
from tasks.core.progress import Progress
from tasks.core.records import Message
from tasks.evaluate.answer_cache import BATCHES, AnswerCache, cache_key, code_digest, parts
from tasks.evaluate.lm_eval_backend import language_model
from tasks.evaluate.params import Evaluate
from tasks.evaluate.requests import Request, continuation_tokens
from tasks.models.device import compute_dtype, device, seed_everything
from tasks.models.loader import MODEL_FILES, Model, load_model, model_files
from tasks.tokenization.architecture import ENCODER_DECODER, architecture_in, positions_of
from tasks.tokenization.chat_template import load_tokenizer, render_prompt, template_digest
from tasks.tokenization.model_config import read_config
from tasks.tokenization.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

MOST_TOKENS = 256
"""In an answer, where a task of lm-eval does not say."""


class Effort(NamedTuple):
    """Work that was done anew: its `seconds`, and the tokens that were read and written in it."""

    seconds: float
    tokens: int


class ModelUnderTest:
    """One model with what it is asked with.

    Args:
        folder: a model folder; one that `merge` packaged brings its adapter along.
        params: batch size, generation and seed.
        journals: the folder of all journals; None to keep none.
        chats: whether its chat template is used: then it must have one, and a stop token of its own.
        adapter: the folder of an adapter to put on the model.
        quantized_for: the form that the base is loaded in, where that adapter was trained on it.
        any_base: also an adapter that names another base.

    Raises:
        BadModel: the folder is no model, or its tokenizer does not fit.
    """

    def __init__(
        self,
        folder: Path,
        params: Evaluate,
        journals: Path | None,
        *,
        chats: bool,
        adapter: Path | None = None,
        quantized_for: QloraAdapter | Int8Adapter | None = None,
        any_base: bool = False,
    ) -> None:
        self._base = base_in(folder)
        files = [*model_files(self._base), *(file for each in MODEL_FILES for file in folder.glob(each))]
        self.folder, self.params, self.adapter, self._any_base = folder, params, adapter, any_base
        self._quantized_for = quantized_for
        if adapter:  # before anything is remembered: answers that are known do not make it fit
            self._check(adapter, any_base)
        self.architecture = architecture_in(folder)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder) if chats else read_tokenizer(folder)
        self.tokens: dict[str, list[int]] = {}
        self.journal = AnswerCache(journals, self._identity(files))
        self.effort = Effort(0.0, 0)

    def _check(self, adapter: Path, any_base: bool) -> None:
        if (self.folder / PACKAGED).is_dir():
            raise BadModel("has an adapter already", where=str(self.folder), fix="name the base model's own folder")
        if not any_base:
            check_base_folder(adapter, self.folder)

    def _identity(self, files: Sequence[Path]) -> dict[str, str]:
        """Return everything that an answer depends on besides the question."""
        adapters = [adapter for adapter in (self.folder / PACKAGED, self.adapter) if adapter and adapter.is_dir()]
        settings = {
            "batch_size": self.params.batch_size,
            "generation": self.params.generation.model_dump(),
            "quantized_for": self._quantized_for.model_dump() if self._quantized_for else None,
            "computes": f"{device().type} {compute_dtype()}",
        }
        prose = ("README", "LICENSE")
        weights = [file for file in dict.fromkeys(files) if not file.name.startswith(prose)]
        known = self._checked_digests()
        return {
            "weights": cache_key(sorted([file.name, known.get(file) or digest(file)] for file in weights)),
            "adapter": cache_key([{n: digest(each / n) for n in (CONFIG, WEIGHTS) if (each / n).is_file()}
                               for each in adapters]),
            "template": template_digest(self.tokenizer),
            "settings": cache_key(settings),
            "code": code_digest(),
        }  # fmt: skip

    def _checked_digests(self) -> dict[Path, str]:
        """Give the digests of another folder's files, which `base_in` has just checked against its manifest."""
        if self._base == self.folder or not (self._base / MANIFEST).is_file():
            return {}
        files = read_object(self._base / MANIFEST)["files"]
        return {self._base / name: told["sha256"] for name, told in files.items()}

    @cached_property
    def model(self) -> Model:
        """Load the model, ready to run.

        Raises:
            BadModel: it or its adapter cannot be used.
        """
        seed_everything(self.params.seed)
        if self.adapter is None:
            return load_packaged(self.folder, self._base, checked=True)
        quantization = self._quantized_for.base_quantization if self._quantized_for else None
        return attach(load_model(self.folder, quantization), self.adapter, any_base=self._any_base)

    @property
    def encodes(self) -> bool:
        """Return whether it is an encoder-decoder."""
        return self.architecture is ENCODER_DECODER

    # --- prompts ------------------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[Message]) -> str:
        """Render a conversation by the model's own chat template, up to where the assistant answers."""
        ids = render_prompt(self.tokenizer, messages)
        text = str(self.tokenizer.decode(ids))
        self.tokens[text] = ids
        return text

    def counter(self, *, chat: bool) -> Callable[[str, str], int]:
        """Build a function that counts the tokens of a continuation after a context."""
        return continuation_tokens(self.tokenizer, apart=chat or self.encodes)

    def cut(self, requests: Sequence[Request]) -> int:
        """Count the requests that are longer than the model can read, so that their beginning is cut off."""
        return sum(self._length(request) > self.room for request in requests)

    @cached_property
    def room(self) -> float:
        """Return how many tokens the model can read; infinity for families that set no limit."""
        return positions_of(read_config(self.folder))

    def _length(self, request: Request) -> int:
        context, *ending = request.arguments
        if request.kind == "loglikelihood_rolling" or self.encodes:
            return 0  # read in windows; and what an encoder-decoder cannot read is refused
        known = self.tokens.get(context) or self.tokenizer(context)["input_ids"]
        if request.kind == "generate_until":
            return len(known) + int(ending[0].get("max_gen_toks", MOST_TOKENS))
        return len(known) + self.counter(chat=context in self.tokens)(context, ending[0]) - 1

    # --- replies ------------------------------------------------------------------------------------------------------

    def replies(self, requests: Sequence[Request], label: str) -> list[Any]:
        """Return the model's replies to requests of one kind, in order; those in the journal are not computed again.

        Raises:
            BadModel: a log-probability is not finite.
        """
        found: dict[int, Any] = {}
        contexts = [str(request.arguments[0]) for request in requests]
        with Progress(label, len(requests), "requests") as progress:
            for places in parts([len(text) for text in contexts], contexts, BATCHES * self.params.batch_size):
                asked = [requests[place] for place in places]
                known = [self.tokens.get(contexts[place]) for place in places]
                tokens = partial(self._read_and_written, asked)
                replies = self.recall([[list(each) for each in asked], known], partial(self._ask, asked), tokens)
                found |= zip(places, replies, strict=True)
                progress.step(by=len(places))
        return [found[place] for place in range(len(requests))]

    def recall(self, asked: Any, work: Callable[[], T], tokens: Callable[[T], int]) -> T:
        """Return what `work` gives: from the journal, or done now; `tokens` counts the effort in its result."""

        def timed() -> T:
            _ = self.model  # loading it is no part of the effort
            began = time.monotonic()
            result = work()
            seconds, before = self.effort
            self.effort = Effort(seconds + time.monotonic() - began, before + tokens(result))
            return result

        return self.journal.recall(asked, timed)

    def _read_and_written(self, requests: Sequence[Request], replies: Sequence[Any]) -> int:
        read = [len(self.tokenizer("".join(map(str, r.arguments[: 1 + (r.kind == "loglikelihood")])))["input_ids"])
                for r in requests]  # fmt: skip
        written = [len(self.tokenizer(reply)["input_ids"]) for reply in replies if isinstance(reply, str)]
        return sum(read) + sum(written)

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        from lm_eval.api.instance import Instance

        kind = requests[0].kind
        instances = [Instance(kind, {}, request.arguments, 0) for request in requests]
        replies = list(getattr(self._driven, kind)(instances))
        if kind == "generate_until":
            return replies
        plain = [[float(each[0]), bool(each[1])] if kind == "loglikelihood" else float(each) for each in replies]
        logps = [each[0] if isinstance(each, list) else each for each in plain]
        if broken := sum(not math.isfinite(logp) for logp in logps):
            raise BadModel(
                f"{broken} of {len(logps)} log-probabilities are not finite; nothing is reported",
                where=str(self.adapter or self.folder),
                fix="look for NaN in the weights of the model or its adapter",
            )
        return plain

    @cached_property
    def _driven(self) -> Any:
        return language_model(
            self.model,
            self.tokenizer,
            batch_size=self.params.batch_size,
            generation=self.params.generation,
            tokens=self.tokens,
        )
