"""Commands that work on plain files and folders, without a workspace."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from flows import output

app = typer.Typer()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file of rows, or a folder of files.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="A file with the questions of a benchmark; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a file or folder of rows is, and what a run would reject, repair, merge or find leaked."""
    from flows import alone
    from tasks.process import quiet_libraries

    quiet_libraries()
    found = alone.inspect(path, against or [])
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else output.inspection(found)


@app.command()
def render(
    path: Annotated[Path, typer.Argument(help="A file of chats, preference pairs or labelled replies.")],
    tokenizer: Annotated[Path, typer.Option(help="A folder with a tokenizer and its chat template.")],
    show: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
) -> None:
    """Show rows as the tokens that a model is trained on; those that the loss falls on stand out."""
    from flows import alone
    from tasks.process import quiet_libraries

    quiet_libraries()
    output.rendering(*alone.render(path, tokenizer, show))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of rows in any form that is known.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .json or .jsonl.")],
    to: Annotated[str, typer.Option(help="messages, conversations, alpaca or preference.")],
) -> None:
    """Write a file of rows in another form, if nothing is lost by it."""
    from flows import alone

    typer.echo(f"{alone.convert(source, target, to)} rows written to {target}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder: merged, packaged with its adapter, or a base.")],
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
) -> None:
    """Ask any model the questions of a suite; tells every task's score with its interval.

    An evaluation that was interrupted goes on where it was, in a workspace or with --out.
    """
    from flows import evaluating
    from tasks.process import quiet_libraries

    quiet_libraries()
    wanted = evaluating.Wanted(
        model, suite, adapter, quantization, any_base, data, limit, chat_template, skip_missing, out
    )
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # progress is no part of the object
        found = evaluating.evaluate(wanted)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else output.evaluation(found)
