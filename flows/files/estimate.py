"""Estimates of `temper estimate`: for every method of a workspace, what training needs here, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.base.params import CheckpointBase, ContinueBase, HubBase, PretrainBase
from tasks.core import pipeline
from tasks.core.artifacts import MANIFEST
from tasks.core.errors import BadInput, BadModel, BadParams, TemperError
from tasks.orchestration.params import Params, load_params
from tasks.train.params import Method

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from tasks.train.estimate.estimate import Estimate, Machine, Rates
    from tasks.train.examples import Example


def estimates(workspace: Path, model: Path | None, only: str | None, card: str | None = None) -> dict[str, Any]:
    """Estimate what training would need.

    Args:
        workspace: its params.yaml lists the methods, its rendered rows give the lengths of rows.
        model: a model folder or a config.json; without one, the workspace's base.
        only: the method to look at; without one, all.
        card: a graphics card that need not be here, of `cards.CARDS`; without one, this machine is meant.

    Returns:
        `model` and `rows` (what was estimated from), `machine`, and `methods`: for each and each dtype its parameters,
        its memory in bytes, whether that `fits` and how much is left or lacking, `steps` (None where rows are not
        rendered yet), `step_s`; and `suggestions` where it does not fit in the dtype that this machine trains in. Of a
        method that cannot be estimated `problem` says why, and the rest is empty.

    Raises:
        BadParams: there is no such method, or card.
        BadModel: there is no config to estimate from.
        TemperError: no method can be estimated; it is what is wrong with the first one.
    """
    import torch

    from tasks.models.device import compute_dtype, device
    from tasks.train.estimate.estimate import a_card, rates, this_machine
    from tasks.train.estimate.meta_model import read_model_config

    params = load_params(workspace / pipeline.PARAMS)
    if only is not None and only not in params.train:
        raise BadParams("there is no such method", where=f"--method {only}", expected=", ".join(params.train))
    source = model or _base(workspace, params)
    config = read_model_config(source)
    if card is not None:  # tensors without numbers are as large on the CPU, which every build of PyTorch knows
        target, (machine, usual, speeds) = torch.device("cpu"), a_card(card)
    else:
        target, usual = device(), compute_dtype()
        machine, speeds = this_machine(target), partial(rates, device=target)
    dtypes = (usual, torch.bfloat16 if usual == torch.float32 else torch.float32)
    rendered = next(workspace / out for out in pipeline.load(workspace)["render"].outs)
    known = (rendered / MANIFEST).is_file()
    reached = {dtype: speeds(dtype) for dtype in dtypes}

    def estimated(name: str, method: Method) -> dict[str, Any]:
        rows = _rows(rendered, method, config) if known else _full_rows(params, config)
        needs = partial(_needs, config=config, target=target, known=known)
        found = {dtype: needs(method, rows(method), dtype) for dtype in dtypes}
        fits = found[usual].memory.total <= machine.room_bytes
        figures = {_named(dtype): _figures(each, machine, reached[dtype], known) for dtype, each in found.items()}
        suggestions = [] if fits else _suggestions(partial(needs, dtype=usual), name, method, rows, machine)
        return {"problem": None, "dtypes": figures, "suggestions": suggestions}

    chosen = {name: method for name, method in params.train.items() if only in (None, name)}
    return {
        "model": str(source),
        "rows": str(rendered) if known else f"none rendered yet: all of {params.render.max_tokens} tokens, all targets",
        "machine": {**machine._asdict(), "dtype": _named(usual), "here": card is None},
        "methods": _each(chosen, estimated),
    }


def advice(workspace: Path, method: str) -> str:
    """Return a method's needs here and what would fit, as lines below an error; or why there is no estimate."""
    from tasks.core.memory import readable_bytes

    try:
        found = estimates(workspace, None, method)
    except BadInput as error:
        return f"  estimate: {error.line()}"
    (one,) = found["methods"].values()
    needed, machine = one["dtypes"][found["machine"]["dtype"]], found["machine"]
    room = machine["free_bytes"] - machine["process_bytes"]
    free = readable_bytes(max(0, room))
    lines = [f"  estimate: a step of {method} needs {readable_bytes(needed['total'])}; {free} are free now"]
    lines += [
        f"  fits:     {each['change']}, which needs {readable_bytes(each['total_bytes'])}"
        for each in one["suggestions"]
    ]
    return "\n".join(lines)


def _each(
    methods: Mapping[str, Method], estimated: Callable[[str, Method], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Estimate each method; one that has no estimate says why, unless none has one: then raise the first problem."""
    found: dict[str, dict[str, Any]] = {}
    problems: list[TemperError] = []
    for name, method in methods.items():
        try:
            found[name] = estimated(name, method)
        except TemperError as error:
            problems.append(error)
            found[name] = {"problem": " ".join(str(error).split()), "dtypes": {}, "suggestions": []}
    if len(problems) == len(methods):
        raise problems[0]
    return found


def _needs(
    method: Method,
    rows: Sequence[Example],
    dtype: torch.dtype,
    *,
    config: PreTrainedConfig,
    target: torch.device,
    known: bool,
) -> Estimate:
    from tasks.train.estimate.estimate import estimate

    return estimate(config, method, rows, dtype, target, all_rows=known)


def _figures(each: Estimate, machine: Machine, speed: Rates, known: bool) -> dict[str, Any]:
    left = machine.room_bytes - each.memory.total
    fit = {"fits": left >= 0, "left_bytes": left}
    time = {"steps": each.steps if known else None, "step_s": each.step_s(speed)}
    return {**each.parameters._asdict(), **each.memory._asdict(), **fit, **time}


def _suggestions(
    needs: Callable[[Method, Sequence[Example]], Estimate],
    name: str,
    method: Method,
    rows: Callable[[Method], Sequence[Example]],
    machine: Machine,
) -> list[dict[str, Any]]:
    from tasks.train.estimate.estimate import cut, longest_of, suggest

    def total(changed: Method, max_tokens: int | None) -> int:
        shown = rows(changed) if max_tokens is None else cut(rows(changed), max_tokens)
        return needs(changed, shown).memory.total

    return [each._asdict() for each in suggest(total, name, method, longest_of(rows(method)), machine)]


def _base(workspace: Path, params: Params) -> Path:
    """Return where the base's config is, or will come from; new tokens of `continue` are not in it yet."""
    folder = next(workspace / out for out in pipeline.load(workspace)["base"].outs)
    if (folder / MANIFEST).is_file():
        return folder
    base = params.base.of if isinstance(params.base, ContinueBase) else params.base
    if isinstance(base, PretrainBase | CheckpointBase):
        raise BadModel(
            f"the base has not been {'pretrained' if isinstance(base, PretrainBase) else 'imported'} yet",
            where=str(folder),
            fix="run `dvc repro base`, or name a config.json of that shape with --model",
        )
    if isinstance(base, HubBase):
        from tasks.core.hub import snapshot

        return snapshot(base.id, base.revision, ("config.json",), kind="model")
    return workspace / base.path


def _rows(rendered: Path, method: Method, config: PreTrainedConfig) -> Callable[[Method], Sequence[Example]]:
    from tasks.tokenization.architecture import DECODER, ENCODER_DECODER
    from tasks.train.batching import read_examples

    architecture = ENCODER_DECODER if config.is_encoder_decoder else DECODER
    examples = read_examples(rendered, "train", method.objective, architecture)
    return lambda _: examples


def _full_rows(params: Params, config: PreTrainedConfig) -> Callable[[Method], Sequence[Example]]:
    from tasks.train.estimate.estimate import full_rows

    return lambda method: full_rows(method, params.render.max_tokens, pairs=config.is_encoder_decoder)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
