"""Commands that move the champion alias and tell of what is registered."""

from __future__ import annotations

from typing import Annotated

import typer

from flows import output
from flows.here import Workspace, ready
from tasks.errors import GateRefused

app = typer.Typer()


@app.command()
def promote(
    version: Annotated[
        str | None, typer.Option(help="The version to promote; without it, the best that was registered last.")
    ] = None,
    workspace: Workspace = None,
) -> None:
    """Make a version champion, if it is better than the base and not worse than the present champion."""
    root = ready(workspace)
    from flows.promote import promote as flow
    from flows.workspace import held

    with held(root, "temper promote"):
        done = flow.fn(root, version)
    output.promotion(done)
    if not done.passed:
        raise GateRefused("the gate refused it", where=done.model, fix="look at the comparisons above")


@app.command()
def rollback(workspace: Workspace = None) -> None:
    """Make the champion before the present one champion again."""
    root = ready(workspace)
    from flows.promote import rollback as flow
    from flows.workspace import held

    with held(root, "temper rollback"):
        output.promotion(flow.fn(root))
