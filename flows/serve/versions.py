"""Model versions in memory: found by their reference, checked, loaded, and used by requests until they are released."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.serve.engines.start import OWN, EngineChoice, Room, start_engine
from flows.serve.json_schema import Grammars
from flows.serve.tool_calls import NO_TOOLS, tools_of
from tasks.core.errors import BadInput, BadModel, BadParams, Transient
from tasks.inference.continuous_batching import ContinuousBatching, Engine
from tasks.inference.decoding import Asked, Ended, Given, Written
from tasks.registry.client import answering, connect, connect_to_read
from tasks.registry.local_reader import RegistryReader
from tasks.tokenization.model_config import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from tasks.models.loader import Model

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What an adapter may be served as."""

_REFERENCE = re.compile(r"models:/([A-Za-z0-9][A-Za-z0-9._-]*)(?:/(\d+)|@([a-z0-9][a-z0-9_-]*))")
_PROBE_S = 120.0


class Reference(NamedTuple):
    """Where a model comes from: a version of the registry by its number or by an alias, or a folder."""

    text: str
    model: str = ""
    number: str = ""
    alias: str = ""

    @property
    def folder(self) -> Path | None:
        """The model folder, if it is one."""
        return None if self.model else Path(self.text)

    def names(self) -> tuple[str, str]:
        """Return the short name under which it is served, and the long one, which tells versions of a model apart."""
        if not self.model:
            return Path(self.text).name, Path(self.text).name
        return self.model, self.text.removeprefix("models:/")


def reference_of(text: str) -> Reference:
    """Read a reference.

    Raises:
        BadParams: it is neither an address of the registry nor a folder.
    """
    if found := _REFERENCE.fullmatch(text):
        return Reference(text, found[1], found[2] or "", found[3] or "")
    if text.startswith("models:/") or not Path(text).is_dir():
        raise BadParams(
            "is no model", where=text, expected="models:/NAME@ALIAS, models:/NAME/VERSION or a model folder"
        )
    return Reference(text)


class Settings(NamedTuple):
    """How models are run.

    Attributes:
        slots: requests at a time.
        cache_bytes: memory for their keys and values; None: as the engine sees fit.
        queue: so many requests may wait.
        context: the most tokens of a prompt and its answer; None: as many as the model reads.
        engine: another engine that runs them; None: temper's own.
    """

    slots: int = 32
    cache_bytes: int | None = None
    queue: int = 256
    context: int | None = None
    engine: EngineChoice | None = None


class LoadedVersion:
    """A model in memory with what answers its requests.

    Args:
        fingerprint: names it in responses: NAME/VERSION, or the folder's name with the digest of its manifest.
        folder: the model folder.
        adapters: folders of adapters on it, by name.
        settings: how it is run.
        any_base: also adapters that name another base.
        say: tells of what happens to the process of another engine, in one line.

    Raises:
        BadModel: it, or an adapter, cannot be used.
        NotEquivalent: another engine writes other tokens than temper's own.
    """

    def __init__(
        self,
        fingerprint: str,
        folder: Path,
        adapters: Mapping[str, Path],
        settings: Settings,
        *,
        any_base: bool,
        say: Callable[[str], None] = print,
    ) -> None:
        from tasks.tokenization.architecture import ENCODER_DECODER, architecture_in
        from tasks.tokenization.chat_template import load_tokenizer

        self.encodes = architecture_in(folder) is ENCODER_DECODER
        """Whether it reads an input and writes a target, and knows nothing of turns."""
        if self.encodes and settings.engine:
            raise BadModel("is an encoder-decoder, which temper's own engine alone runs", where=str(folder))
        self.fingerprint, self.adapters = fingerprint, tuple(adapters)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self.end_ids = frozenset([int(self.tokenizer.eos_token_id)])
        self.tools = NO_TOOLS if self.encodes else tools_of(self.tokenizer)
        self.made_by = OWN
        """The engine that writes, with what was found of its tokens, for people."""
        self.engine: Engine
        if settings.engine is None:
            model, given, virtual = _load(folder, adapters, any_base=any_base)
            self._read_shape(model.config, virtual, settings.context)
            self.engine = ContinuousBatching(
                given, self.end_ids, slots=settings.slots, cache_bytes=settings.cache_bytes, queue=settings.queue
            )
        else:
            self._read_shape(read_config(folder), 0, settings.context)
            room = Room(settings.slots, settings.queue, self.context, settings.cache_bytes)
            self.engine, parity = start_engine(
                folder, self.tokenizer, self.grammars.pieces, self.end_ids, settings.engine, room, fingerprint, say
            )
            self.made_by = f"{settings.engine.dialect.name}, {parity}"
        self._users, self._unused = 0, threading.Condition()

    def _read_shape(self, config: PreTrainedConfig, virtual: int, most: int | None) -> None:
        """Note what the model's configuration says of its vocabulary and of the longest text."""
        shape = config.get_text_config()
        self.vocabulary = int(shape.vocab_size)
        self.grammars = Grammars(self.tokenizer, self.vocabulary)
        longest = getattr(shape, "max_position_embeddings", None)
        limits = [int(longest) - virtual] if longest else []
        self.context = min(limits + ([most] if most else []), default=None)
        """Tokens that a prompt and its answer may have; None where there is no limit."""

    @contextmanager
    def in_use(self) -> Iterator[LoadedVersion]:
        """Keep it in memory within this block."""
        with self._unused:
            self._users += 1
        try:
            yield self
        finally:
            with self._unused:
                self._users -= 1
                self._unused.notify_all()

    def probe(self) -> None:
        """Let it write one token with each adapter, so that what cannot answer is never served.

        Raises:
            BadModel: it does not.
        """
        for adapter in (None, *self.adapters):
            ended = threading.Event()
            told: list[Written | Ended] = []

            def tell(event: Written | Ended, told: list[Any] = told, ended: threading.Event = ended) -> None:
                told.append(event)
                if isinstance(event, Ended):
                    ended.set()

            prompt = tuple(self.tokenizer("1", add_special_tokens=False)["input_ids"]) or (0,)
            self.engine.submit(Asked(prompt, 1, adapter=adapter), tell)
            last = told[-1] if ended.wait(_PROBE_S) else None
            if not isinstance(last, Ended) or last.error or not isinstance(told[0], Written):
                error = last.error if isinstance(last, Ended) else None
                raise BadModel(
                    "does not answer",
                    where=self.fingerprint + (f" with {adapter}" if adapter else ""),
                    got=type(error).__name__ if error else f"no token within {_PROBE_S:.0f} s",
                )

    def release(self, *, finish: bool = True) -> None:
        """Wait until nobody uses it, answer what runs, and free its memory."""
        with self._unused:
            while finish and self._users:
                self._unused.wait()
        self.engine.close(finish=finish)
        gc.collect()


def _load(folder: Path, adapters: Mapping[str, Path], *, any_base: bool) -> tuple[Model, Model | Given, int]:
    """Load a model with its adapters.

    Returns:
        The model as the folder has it, what the engine is given, and the most tokens that a soft prompt takes.
    """
    from peft import PeftModel

    from flows.chat.adapter_pool import AdapterPool
    from tasks.adapters.attach import load_packaged, read_adapter

    model = load_packaged(folder)
    if not adapters:
        return model, model, max(map(_virtual_tokens, getattr(model, "peft_config", {}).values()), default=0)
    if isinstance(model, PeftModel):
        raise BadModel(
            "has an adapter of its own, so no others go on it", where=str(folder), fix="serve its base with --adapter"
        )
    pool = AdapterPool(model)
    for name, place in adapters.items():
        pool.load(name, place, any_base=any_base)
    return model, pool.together, max(_virtual_tokens(read_adapter(p).config) for p in adapters.values())


def _virtual_tokens(config: Any) -> int:
    return getattr(config, "num_virtual_tokens", 0) or 0


class Source:
    """Where versions of one reference come from.

    Args:
        reference: of the model.
        workspace: whose registry it is; a folder needs none.
        adapters: folders of adapters, by name.
        settings: how versions are run.
        any_base: also adapters that name another base.
        say: tells of what happens to versions in memory, in one line.
    """

    def __init__(
        self,
        reference: Reference,
        workspace: Path | None,
        adapters: Mapping[str, Path],
        settings: Settings,
        *,
        any_base: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.reference, self._workspace, self._adapters = reference, workspace, dict(adapters)
        self._settings, self._any_base, self._say = settings, any_base, say
        self._registry: RegistryReader | None = None

    def newest(self) -> str | None:
        """Return the number of the version that the reference leads to now; None for an alias that nobody has.

        Raises:
            RegistryUnreachable: MLflow does not answer.
        """
        if not self.reference.alias:
            return self.reference.number
        workspace = self._known_workspace()
        with answering(workspace):
            if self._registry is None:
                self._registry = connect_to_read(workspace)
            return _aliases(self._registry, self.reference.model).get(self.reference.alias)

    def load(self, number: str) -> LoadedVersion:
        """Load a version after checking its files, and its signature where a key is given.

        Raises:
            BadInput: it is not what was registered, or cannot be used.
            RegistryUnreachable: MLflow does not answer.
        """
        folder, fingerprint = self._checked(number)
        loaded = LoadedVersion(
            fingerprint, folder, self._adapters, self._settings, any_base=self._any_base, say=self._say
        )
        try:
            loaded.probe()
        except BaseException:
            loaded.release(finish=False)
            raise
        return loaded

    def _checked(self, number: str) -> tuple[Path, str]:
        if self.reference.folder:
            return _checked_folder(self.reference.folder)
        from flows.registry.evidence import broken
        from tasks.registry.versions import fetch_model, version_at

        workspace, address = self._known_workspace(), f"models:/{self.reference.model}/{number}"
        with answering(workspace):
            client = connect(workspace)
            version = version_at(client, address)
            if wrong := broken(client, version):
                raise BadModel("its files are not what was registered", where=address, got=wrong)
            return fetch_model(client, version), f"{self.reference.model}/{number}"

    def _known_workspace(self) -> Path:
        if self._workspace is None:
            raise BadParams("is of a registry, which is a workspace's", where=self.reference.text)
        return self._workspace


def _aliases(registry: RegistryReader, model: str) -> Mapping[str, str]:
    """Return the aliases of a model; none where there is no such model."""
    try:
        found = registry.get_registered_model(model).aliases
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {alias: str(number) for alias, number in found.items()}


def _checked_folder(folder: Path) -> tuple[Path, str]:
    from tasks.core.artifacts import MANIFEST, check_manifest, digest
    from tasks.registry.signing import verify_model

    check_manifest(folder)
    verify_model(folder, folder)
    manifest = folder / MANIFEST
    return folder, f"{folder.name}@{digest(manifest)[:12]}" if manifest.is_file() else folder.name


class Slot:
    """One place of a server, in which a version is that follows its alias.

    The new version is loaded beside the old one. Requests that have begun end on the old one, which is then released. A
    version that fails its checks is not tried again until the alias has moved.

    Args:
        source: of the versions.
        say: tells of what happens, in one line.
        stays: whether a version stays in memory when its alias is taken away.
    """

    def __init__(self, source: Source, say: Callable[[str], None], *, stays: bool = True) -> None:
        self.source, self._say, self._stays = source, say, stays
        self.current: LoadedVersion | None = None
        self.number: str | None = None
        self.refused: tuple[str, str] | None = None
        """A version that was not taken, and why."""
        self.unreachable = ""
        """Why the registry was not read the last time."""
        self._lock = threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator[LoadedVersion | None]:
        """Keep the present version in memory within this block; gives None where there is none."""
        with ExitStack() as stack:
            with self._lock:
                current = self.current
                if current is not None:
                    stack.enter_context(current.in_use())
            yield current

    def begin(self) -> None:
        """Load the version that the reference leads to.

        Raises:
            BadParams: it leads to none.
            BadInput: the version cannot be used.
            RegistryUnreachable: MLflow does not answer.
        """
        number = self.source.newest()
        if number is None:
            raise BadParams(
                "nothing has this alias",
                where=self.source.reference.text,
                fix="run `temper run`, or `temper status` to see what there is",
            )
        self._take(number, self.source.load(number))

    def follow(self) -> None:
        """Look where the alias leads now, and take that version if it is another and sound."""
        try:
            number = self.source.newest()
        except Exception as error:  # the registry may be of any kind, and the version in memory needs none
            self._cannot_reach(error)
            return
        self.unreachable = ""
        if number == self.number:
            self.refused = None
        elif number is None:
            self._drop()
        elif not self.refused or number != self.refused[0]:
            self._try(number)

    def _try(self, number: str) -> None:
        try:
            loaded = self.source.load(number)
        except Transient as error:
            self._cannot_reach(error)
        except Exception as error:  # of whatever library: the version in memory goes on
            why = error.line() if isinstance(error, BadInput) else f"{type(error).__name__}: {_first_line(error)}"
            self.refused = (number, why)
            self._say(f"{self.source.reference.text}: version {number} is refused, version {self.number} stays: {why}")
        else:
            self._take(number, loaded)

    def _cannot_reach(self, error: Exception) -> None:
        why = f"{type(error).__name__}: {_first_line(error)}"
        if not self.unreachable:
            self._say(f"{self.source.reference.text}: the registry is not read, version {self.number} stays: {why}")
        self.unreachable = why

    def _take(self, number: str, loaded: LoadedVersion) -> None:
        before = self.number
        self._replace(number, loaded)
        self.refused = None
        by = f" by {loaded.made_by}" if loaded.made_by != OWN else ""
        was = f", was version {before}" if before else ""
        self._say(f"{self.source.reference.text}: {loaded.fingerprint}{by}{was}")

    def _drop(self) -> None:
        if self.current is not None and not self._stays:
            self._say(f"{self.source.reference.text}: nothing has this alias any more")
            self._replace(None, None)

    def _replace(self, number: str | None, loaded: LoadedVersion | None) -> None:
        with self._lock:
            old, self.current, self.number = self.current, loaded, number
        if old is not None:
            threading.Thread(target=old.release, name="release", daemon=True).start()

    def close(self, *, finish: bool) -> None:
        """Release what is in memory."""
        with self._lock:
            old, self.current = self.current, None
        if old is not None:
            old.release(finish=finish)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
