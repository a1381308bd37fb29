"""Merging and exporting plain folders, without a workspace."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.files import CONFIG, check_base_folder
from tasks.core.artifacts import as_json, atomic_folder, check_manifest, read_object
from tasks.core.errors import BadParams
from tasks.core.layout import EQUIVALENCE
from tasks.deltas.peft_config import settings_of
from tasks.merge.adapter_combination import Combination, combined
from tasks.merge.merged_model import DEQUANTIZED, DTYPES, ORIGINAL, Merged, merge, merge_changes, write_merged
from tasks.models.safetensors_reader import MIB

if TYPE_CHECKING:
    from tasks.adapters.params import Int8Adapter, QloraAdapter

WHOLE = "16bit"
"""The form of a base that is not quantized."""

PROBE_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Question: What is 17 plus 25?\nAnswer: 42",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time there was a small house at the edge of a forest.",
    "请用一句话介绍一下北京。北京是中国的首都。",
    "List three colours: red, green and blue.",
)
"""What the models are compared on where nothing else is given: prose, a question, code, in two languages."""


class Wish(NamedTuple):
    """Options of a merge.

    Attributes:
        trained_on: WHOLE, or the form of the base that the adapter was trained on: nf4, fp4, or its own params.
        onto: of merge.onto; only for a quantized form.
        dtype: of the result; `own`: as the base has it.
        max_shard_mib: the largest size of a file of weights.
        max_mean_kl: the largest divergence of the merged model from the adapter model, nats per token, where measured.
        any_base: whether an adapter that names another base is accepted.
    """

    trained_on: str | QloraAdapter | Int8Adapter
    onto: str
    dtype: str
    max_shard_mib: int
    max_mean_kl: float
    any_base: bool

    def check(self) -> None:
        """Refuse options that do not exist.

        Raises:
            BadParams: an option has no such value.
        """
        known = {
            "trained-on": (self.trained_on, (WHOLE, "nf4", "fp4")) if isinstance(self.trained_on, str) else ("", ("",)),
            "onto": (self.onto, ("closest", ORIGINAL, DEQUANTIZED)),
            "dtype": (self.dtype, ("own", *DTYPES)),
        }
        for name, (wished, choices) in known.items():
            if wished not in choices:
                raise BadParams("is no choice", where=f"--{name}", got=wished, expected=", ".join(choices))


def merge_folders(
    base: Path, adapters: Sequence[Path], out: Path, wish: Wish, how: Combination | None
) -> dict[str, Any]:
    """Merge one adapter, or several by a combination, into a base, as a new model folder with a manifest.

    Returns:
        `out`, `bytes`, `form`, and where it was measured the figures of equivalence.json.

    Raises:
        BadParams: the folder exists, or options contradict each other.
        BadModel: base and adapter do not fit each other, or one is unsafe or torn.
        NotEquivalent: it was measured and is too far from the adapter model.
    """
    if out.exists():
        raise BadParams("exists already", where=str(out), fix="name a new folder, or remove this one")
    for folder in (base, *adapters):
        check_manifest(folder)
    if not wish.any_base:
        for adapter in adapters:
            if (adapter / CONFIG).is_file():  # else it is weights that were trained whole
                check_base_folder(adapter, base)
    wish.check()
    known: dict[str, str] = {}
    measured = how is None and wish.trained_on != WHOLE
    planned = None if measured else _planned(base, adapters, wish, how)
    with atomic_folder(out, {"adapters": [str(adapter) for adapter in adapters]}, known) as folder:
        if planned is None:
            told = _measured(base, adapters[0], folder, wish, known)
        else:
            made, told = planned
            known |= write_merged(base, adapters[0], {folder: made}, wish.max_shard_mib * MIB)[folder]
        (folder / EQUIVALENCE).write_text(as_json(told))
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {"out": str(out), "bytes": size, **told}


def _planned(
    base: Path, adapters: Sequence[Path], wish: Wish, how: Combination | None
) -> tuple[Merged, dict[str, Any]]:
    if how is None:
        return merge(base, adapters[0], wish.dtype), {"form": "merged onto the original weights"}
    how.check(len(adapters))
    if wish.trained_on != WHOLE:
        raise BadParams(
            "adapters of a quantized base are not measured when they are combined",
            got=", ".join(map(str, adapters)),
            fix=f"say --trained-on {WHOLE}: their updates are added to the weights in 16 bits",
        )
    told = {"form": f"{len(adapters)} adapters combined: {how.method}", **how._asdict()}
    return merge_changes(base, partial(combined, adapters, how), wish.dtype), told


def _measured(base: Path, adapter: Path, folder: Path, wish: Wish, known: dict[str, str]) -> dict[str, Any]:
    from tasks.adapters.attach import load_adapted
    from tasks.merge.stage import check_equivalent, merge_closest
    from tasks.models.device import seed_everything
    from tasks.tokenization.tokenizer import read_tokenizer

    seed_everything(0)
    tokenizer = read_tokenizer(base)
    probes = [{"input_ids": list(tokenizer(text)["input_ids"])} for text in PROBE_TEXTS]
    form = wish.trained_on if not isinstance(wish.trained_on, str) else _form(adapter, wish.trained_on)
    model = load_adapted(base, adapter, form)
    most_bytes = wish.max_shard_mib * MIB
    told, digests = merge_closest(
        base, adapter, model, probes, folder, onto=wish.onto, most_bytes=most_bytes, dtype=wish.dtype
    )
    known |= digests
    check_equivalent(told, wish.max_mean_kl, str(adapter))
    return told


def _form(adapter: Path, quantization: str) -> QloraAdapter:
    """Return the quantization of the base that a third-party adapter was trained on, doubly quantized as usual."""
    from tasks.adapters.params import QloraAdapter

    settings = settings_of(adapter)
    return QloraAdapter(
        name="qlora",
        rank=settings.r,
        alpha=settings.lora_alpha,
        dropout=0.0,
        targets="all-linear",
        quantization="nf4" if quantization == "nf4" else "fp4",
        double_quantization=True,
        compute_dtype="auto",
    )


def trained_on(adapter: Path) -> str | QloraAdapter | Int8Adapter:
    """Read the form of base that an adapter was trained on from the summary of temper's own; WHOLE for others."""
    summary = adapter / "summary.json"
    if not summary.is_file():
        return WHOLE
    from pydantic import TypeAdapter, ValidationError

    from tasks.adapters.params import AnyAdapter, Int8Adapter, QloraAdapter

    told = read_object(summary)
    try:
        said = TypeAdapter(AnyAdapter).validate_python(told["params"]["adapter"])
    except (KeyError, TypeError, ValidationError):
        return WHOLE  # another maker's file of that name
    return said if isinstance(said, QloraAdapter | Int8Adapter) else WHOLE


def export_folder(model: Path, out: Path, kind: str, dtype: str, max_shard_mib: int, ollama: bool) -> str:
    """Write a model folder in another form, as a new folder with a manifest; return a description of what was written.

    Raises:
        BadParams: the folder exists, or there is no such form.
        BadModel: the model cannot have it.
    """
    from pydantic import TypeAdapter, ValidationError

    from tasks.merge.export.formats import export
    from tasks.merge.params import Export

    if out.exists():
        raise BadParams("exists already", where=str(out), fix="name a new folder, or remove this one")
    own: dict[str, dict[str, Any]] = {"gguf": {"ollama": ollama}, "safetensors": {"max_shard_mib": max_shard_mib}}
    if kind not in own:
        raise BadParams("is no form to write", where=f"--kind {kind}", expected=", ".join(own))
    try:
        wanted: Export = TypeAdapter(Export).validate_python({"kind": kind, "dtype": dtype, **own[kind]})
    except ValidationError as error:
        raise BadParams("is no number format of this form", got=dtype, expected=error.errors()[0]["msg"]) from error
    check_manifest(model)
    with atomic_folder(out) as folder:
        told = export(model, wanted, folder / kind)
        for file in sorted((folder / kind).iterdir()):
            file.rename(folder / file.name)
        (folder / kind).rmdir()
    return f"{out}: {told}"
