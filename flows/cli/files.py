"""Commands that work on plain files and folders, without a workspace."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from flows.cli import console
from flows.run.locate import WorkspaceOption
from tasks.core.errors import BadParams

app = typer.Typer()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file of rows, or a folder of files.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="A file with the questions of a benchmark; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a file or folder of rows is, and what a run would reject, repair, merge or find contaminated."""
    from flows.files import inspect
    from tasks.core.stage import quiet_libraries

    quiet_libraries()
    found = inspect.inspect(path, against or [])
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else console.inspection(found)


@app.command()
def render(
    path: Annotated[Path, typer.Argument(help="A file of chats, preference pairs or labelled replies.")],
    tokenizer: Annotated[Path, typer.Option(help="A folder with a tokenizer and its chat template.")],
    show: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    loss_on: Annotated[str, typer.Option(help="The assistant's turns that are trained on: all or last.")] = "all",
    reasoning: Annotated[str, typer.Option(help="What becomes of it: keep, drop or last_turn_only.")] = "keep",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Refuse longer rows.")] = None,
) -> None:
    """Show rows as the tokens that a model is trained on; those that the loss falls on stand out."""
    from flows.files import show_tokens
    from tasks.core.params_file import validated
    from tasks.core.stage import quiet_libraries
    from tasks.render.params import Render

    quiet_libraries()
    params = validated(Render, {"loss_on": loss_on, "reasoning": reasoning}, "temper render", ())
    console.rendering(show_tokens.render(path, tokenizer, show, params, max_tokens))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of rows in any form that is known.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .json or .jsonl.")],
    to: Annotated[str, typer.Option(help="messages, conversations, alpaca or preference.")],
) -> None:
    """Write a file of rows in another form, if nothing is lost by it."""
    from flows.files import convert

    typer.echo(f"{convert.convert(source, target, to)} rows written to {target}")


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder (merged, packaged with its adapter, or a base), models:/NAME/VERSION or "
            "models:/NAME@ALIAS."
        ),
    ],
    suite: Annotated[
        str, typer.Option(help="A ready suite by name, a YAML file of a suite or of a task, or a file of rows.")
    ],
    adapter: Annotated[Path | None, typer.Option(help="The folder of an adapter to put on the model.")] = None,
    quantization: Annotated[str, typer.Option(help="The form of an adapter's base: none, nf4 or int8.")] = "none",
    any_base: Annotated[bool, typer.Option("--any-base", help="Also an adapter that names another base.")] = False,
    data: Annotated[Path | None, typer.Option(help="The folder with the files of a ready suite.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, at most.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put questions through the model's own chat template.")
    ] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Go without tasks whose files are not there.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write examples.parquet and metrics.json into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Ask any model the questions of a suite; tells every task's score with its interval.

    An evaluation that was interrupted goes on where it was, in a workspace or with --out.
    """
    from flows.files import evaluate
    from tasks.core.stage import quiet_libraries

    quiet_libraries()
    # as they are seen from here: a registered model is found from its workspace
    adapter, data, out = (path.resolve() if path else None for path in (adapter, data, out))
    suite = str(Path(suite).resolve()) if Path(suite).exists() else suite
    wanted = evaluate.Wanted(
        model, suite, adapter, quantization, any_base, data, limit, chat_template, skip_missing, out, workspace
    )
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # progress is no part of the object
        found = evaluate.evaluate(wanted)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else console.evaluation(found)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A model folder, in 16 or 32 bits.")],
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter that changes weights.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write; it must not exist.")],
    with_: Annotated[
        list[Path] | None, typer.Option("--with", help="A further adapter to combine it with; may be repeated.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How adapters are combined: linear, svd, ties, dare_linear or dare_ties.")
    ] = "linear",
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each adapter in their order, in a combination; 1 each.")
    ] = None,
    density: Annotated[float, typer.Option(help="The share of an update's numbers that ties and dare keep.")] = 0.5,
    rank: Annotated[int, typer.Option(help="Of the update that svd leaves.")] = 16,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    trained_on: Annotated[
        str | None,
        typer.Option(
            help="The form of the base that the adapter was trained on: 16bit, nf4 or fp4. By default what the adapter "
            "says, or 16bit. For nf4 and fp4 the result is compared with the adapter model."
        ),
    ] = None,
    onto: Annotated[
        str, typer.Option(help="After nf4 or fp4: closest, original or dequantized, as merge.onto in params.yaml.")
    ] = "closest",
    max_mean_kl: Annotated[float, typer.Option(help="Refuse a result that is further off, in nats per token.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="Of the result: own, bfloat16, float16 or float32.")] = "own",
    max_shard_mib: Annotated[int, typer.Option(min=1, help="A file of weights is at most so large.")] = 4096,
    any_base: Annotated[bool, typer.Option("--any-base", help="Also an adapter that names another base.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter, or several, into a base: a new model folder, written tensor by tensor."""
    from flows.files import merge
    from tasks.core.stage import quiet_libraries
    from tasks.merge.adapter_combination import Combination

    quiet_libraries()
    adapters = [adapter, *(with_ or [])]
    form = trained_on or merge.trained_on(adapter)
    wish = merge.Wish(form, onto, dtype, max_shard_mib, max_mean_kl, any_base)
    weights = tuple(weight or [1.0] * len(adapters))
    how = Combination(method, weights, density, rank, seed) if with_ or weight or method != "linear" else None
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        found = merge.merge_folders(base, adapters, out, wish, how)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else console.merged(found)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    kind: Annotated[str, typer.Option(help="gguf or safetensors.")] = "gguf",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; for gguf also q8_0, for safetensors own.")
    ] = "float16",
    max_shard_mib: Annotated[int, typer.Option(min=1, help="A file of safetensors is at most so large.")] = 4096,
    ollama: Annotated[bool, typer.Option(help="With GGUF a Modelfile for Ollama.")] = True,
) -> None:
    """Write a model folder as GGUF, with a Modelfile for Ollama, or in another number format."""
    from flows.files.merge import export_folder
    from tasks.core.stage import quiet_libraries

    quiet_libraries()
    typer.echo(export_folder(model, out, kind, dtype, max_shard_mib, ollama))


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="A model folder, models:/NAME/VERSION or models:/NAME@ALIAS.")],
    source: Annotated[Path, typer.Argument(help="A Parquet file with a column messages, prompt or input.")],
    target: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="A reply is at most so long.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also where the file to write exists.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Answer every row of a Parquet file, greedily; where it has a column target, tell its log-probability."""
    from flows.files.batch_predict import score_file
    from flows.run.locate import local_model
    from tasks.adapters.attach import load_packaged
    from tasks.core.stage import quiet_libraries
    from tasks.tokenization.chat_template import load_tokenizer

    quiet_libraries()
    source, target = source.resolve(), target.resolve()
    if target.exists() and not overwrite:
        raise BadParams("exists already", where=str(target), fix="name a new file, or say --overwrite")
    folder = local_model(model, workspace)
    loaded, tokenizer = load_packaged(folder), load_tokenizer(folder)
    rows = score_file(loaded, tokenizer, source, target, max_tokens=max_tokens, batch_size=batch_size)
    typer.echo(f"{rows} rows written to {target}")
