"""What `temper estimate` finds: for every method of a workspace, what training would need here, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import graph
from tasks.base_params import HubBase, LocalBase
from tasks.errors import BadModel, BadParams
from tasks.outputs import MANIFEST
from tasks.params import Method, Params
from tasks.params_reading import load

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from tasks.estimate import Estimate, Machine, Rates
    from tasks.examples import Example


def estimates(workspace: Path, model: Path | None, only: str | None) -> dict[str, Any]:
    """What training would need.

    Args:
        workspace: its params.yaml says which methods there are, its rendered rows how long rows are.
        model: a model folder or a config.json; without one, the workspace's base.
        only: the method to look at; without one, all.

    Returns:
        `model` and `rows` (what was estimated from), `machine`, and `methods`: for each and each dtype its parameters,
        its memory in bytes, whether that `fits` and how much is left or lacking, `steps` (None where rows are not
        rendered yet), `step_s`; and `suggestions` where it does not fit in the dtype that this machine trains in.

    Raises:
        BadParams: there is no such method.
        BadModel: there is no config to estimate from, or a method does not fit the model.
    """
    import torch

    from tasks.device import compute_dtype, device
    from tasks.estimate import estimate, rates, this_machine
    from tasks.hollow import read_config

    params = load(workspace / graph.PARAMS)
    if only is not None and only not in params.train:
        raise BadParams("there is no such method", where=f"--method {only}", expected=", ".join(params.train))
    source = model or _base(workspace, params)
    config = read_config(source)
    target, usual = device(), compute_dtype()
    dtypes = sorted((torch.bfloat16, torch.float32), key=lambda dtype: dtype != usual)
    rendered = next(workspace / out for out in graph.load(workspace)["render"].outs)
    known = (rendered / MANIFEST).is_file()
    rows = {
        name: _rows(rendered, method, config) if known else _full_rows(params, config)
        for name, method in params.train.items()
        if only in (None, name)
    }
    needed = {
        name: {
            dtype: estimate(config, params.train[name], rows[name](params.train[name]), dtype, target)
            for dtype in dtypes
        }
        for name in rows
    }
    speeds, machine = {dtype: rates(dtype, target) for dtype in dtypes}, this_machine(target)
    return {
        "model": str(source),
        "rows": str(rendered) if known else f"none rendered yet: all of {params.render.max_tokens} tokens, all learnt",
        "machine": {**machine._asdict(), "dtype": _named(usual)},
        "methods": {
            name: {
                "dtypes": {
                    _named(dtype): _figures(each, machine, speeds[dtype], known) for dtype, each in found.items()
                },
                "suggestions": []
                if found[usual].memory.total <= machine.room_bytes
                else _suggestions(config, name, params.train[name], rows[name], machine, usual, target),
            }
            for name, found in needed.items()
        },
    }


def _figures(each: Estimate, machine: Machine, speed: Rates, known: bool) -> dict[str, Any]:
    left = machine.room_bytes - each.memory.total
    fit = {"fits": left >= 0, "left_bytes": left}
    time = {"steps": each.steps if known else None, "step_s": each.step_s(speed)}
    return {**each.parameters._asdict(), **each.memory._asdict(), **fit, **time}


def _suggestions(
    config: PreTrainedConfig,
    name: str,
    method: Method,
    rows: Callable[[Method], Sequence[Example]],
    machine: Machine,
    dtype: torch.dtype,
    target: torch.device,
) -> list[dict[str, Any]]:
    from tasks.estimate import cut, estimate, longest_of, suggest

    def total(changed: Method, max_tokens: int | None) -> int:
        shown = rows(changed) if max_tokens is None else cut(rows(changed), max_tokens)
        return estimate(config, changed, shown, dtype, target).memory.total

    return [each._asdict() for each in suggest(total, name, method, longest_of(rows(method)), machine)]


def _base(workspace: Path, params: Params) -> Path:
    """Where the config of the workspace's base is, or will come from."""
    folder = next(workspace / out for out in graph.load(workspace)["base"].outs)
    if (folder / MANIFEST).is_file():
        return folder
    if isinstance(params.base, LocalBase):
        return workspace / str(params.base.path)
    if isinstance(params.base, HubBase):
        from tasks.hub import snapshot

        return snapshot(params.base.id, params.base.revision, ("config.json",), kind="model")
    raise BadModel(
        "the base has not been pretrained yet",
        where=str(folder),
        fix="run `dvc repro base`, or name a config.json of that shape with --model",
    )


def _rows(rendered: Path, method: Method, config: PreTrainedConfig) -> Callable[[Method], Sequence[Example]]:
    from tasks.architecture import DECODER, ENCODER_DECODER
    from tasks.train import read_examples

    architecture = ENCODER_DECODER if config.is_encoder_decoder else DECODER
    examples = read_examples(rendered, "train", method, architecture)
    return lambda _: examples


def _full_rows(params: Params, config: PreTrainedConfig) -> Callable[[Method], Sequence[Example]]:
    from tasks.estimate import full_rows

    return lambda method: full_rows(method, params.render.max_tokens, pairs=config.is_encoder_decoder)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
