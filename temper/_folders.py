"""Operations on whole model folders: merging, evaluating and exporting them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from temper._models import Base


def merge(
    base: Base | str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    trained_on: Literal["16bit", "nf4", "fp4"] | None = None,
    onto: Literal["closest", "original", "dequantized"] = "closest",
    max_mean_kl: float = 0.01,
    dtype: Literal["own", "bfloat16", "float16", "float32"] = "own",
    max_shard_mib: int = 4096,
    any_base: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into a base, as a new model folder, tensor by tensor.

    Args:
        base: the model folder, in 16 or 32 bits.
        adapter: the folder of an adapter that changes weights.
        out: the folder to write; it must not exist.
        trained_on: the form of the base that the adapter was trained on; by default what the adapter says, or 16bit.
            After a quantized one the result is compared with the adapter model.
        onto: after a quantized form, which weights the update is added to.
        max_mean_kl: refuse a result that is further off, in nats per token, where it is measured.
        dtype: of the result.
        max_shard_mib: a file of weights is at most so large, in MiB.
        any_base: also an adapter that names another base.

    Returns:
        `out`, `bytes`, `form`, and where it was measured how far the result is off.

    Raises:
        BadParams: the folder exists, or an option is wrong.
        BadModel: base and adapter do not fit each other, or one is unsafe or torn.
        NotEquivalent: the result was measured and is too far from the adapter model.
    """
    from flows.files.merge import Wish, merge_folders
    from flows.files.merge import trained_on as said_by

    form = trained_on or said_by(Path(adapter))
    wish = Wish(form, onto, dtype, max_shard_mib, max_mean_kl, any_base)
    return merge_folders(_folder(base), [Path(adapter)], Path(out), wish, None)


def evaluate(
    model: Base | str | Path,
    suites: Sequence[str | Path],
    *,
    adapter: str | Path | None = None,
    quantization: Literal["none", "nf4", "int8"] = "none",
    any_base: bool = False,
    data: str | Path | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    skip_missing: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on suites.

    Args:
        model: a model folder, or models:/NAME/VERSION of the workspace that one stands in.
        suites: each a ready suite by name, a YAML file of a suite or task, or a file of rows.
        adapter: the folder of an adapter to put on the model.
        quantization: the form of that adapter's base.
        any_base: also an adapter that names another base.
        data: the folder with the files of a ready suite.
        limit: questions of each task, at most.
        chat_template: whether questions go through the model's chat template.
        skip_missing: whether tasks are passed over whose files are not there.

    Returns:
        `model`, `template_sha256`, and `suites`: of each its tasks' scores with intervals.

    Raises:
        BadInput: the model, its adapter or a suite cannot be used.
    """
    from flows.files import evaluate as evaluating
    from tasks.core.errors import BadParams

    if isinstance(suites, str) or not suites:
        raise BadParams("needs a list of suites", where="temper.evaluate", got=repr(suites))
    if not isinstance(model, str | Path):
        adapter, any_base, model = adapter or model.adapter, any_base or model.any_base, model.folder
    reports = [
        evaluating.evaluate(
            evaluating.Wanted(
                str(model),
                str(suite),
                Path(adapter) if adapter else None,
                quantization,
                any_base,
                Path(data) if data else None,
                limit,
                chat_template,
                skip_missing,
                None,
            )
        )
        for suite in suites
    ]
    found = {name: each for report in reports for name, each in report["suites"].items()}
    return {"model": reports[0]["model"], "template_sha256": reports[0]["template_sha256"], "suites": found}


def export(
    model: Base | str | Path,
    out: str | Path,
    *,
    kind: Literal["gguf", "safetensors"] = "gguf",
    dtype: str = "float16",
    max_shard_mib: int = 4096,
    ollama: bool = True,
) -> str:
    """Write a model folder in another form, as a new folder; return in words what was written.

    Args:
        model: a model folder.
        out: the folder to write; it must not exist.
        kind: the form.
        dtype: float32, float16 or bfloat16; for gguf also q8_0, for safetensors own.
        max_shard_mib: a file of safetensors is at most so large, in MiB.
        ollama: with GGUF, whether there is a Modelfile for Ollama.

    Raises:
        BadParams: the folder exists, or there is no such form.
        BadModel: the model cannot have it.
    """
    from flows.files.merge import export_folder

    return export_folder(_folder(model), Path(out), kind, dtype, max_shard_mib, ollama)


def _folder(model: Base | str | Path) -> Path:
    return Path(model) if isinstance(model, str | Path) else model.folder
