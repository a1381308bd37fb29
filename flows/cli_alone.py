"""Commands that work on plain files and folders, without a workspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows import output
from flows.here import Workspace

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
def score(
    model: Annotated[str, typer.Argument(help="A model folder, models:/NAME/VERSION or models:/NAME@ALIAS.")],
    source: Annotated[Path, typer.Argument(help="A Parquet file with a column messages, prompt or input.")],
    target: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="A reply is at most so long.")] = 128,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 32,
    workspace: Workspace = None,
) -> None:
    """Answer every row of a Parquet file, greedily; where it has a column target, tell its log-probability."""
    from flows.model_folder import local_model
    from tasks.adapted import load_packaged
    from tasks.batch_scoring import score_file
    from tasks.process import quiet_libraries
    from tasks.templates import load_tokenizer

    quiet_libraries()
    source, target = source.resolve(), target.resolve()
    folder = local_model(model, workspace)
    loaded, tokenizer = load_packaged(folder), load_tokenizer(folder)
    rows = score_file(loaded, tokenizer, source, target, max_tokens=max_tokens, batch_rows=batch_rows)
    typer.echo(f"{rows} rows written to {target}")
