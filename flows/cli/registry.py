"""Commands that move the champion alias and tell of what is registered."""

from __future__ import annotations

import getpass
import json
from functools import partial
from typing import Annotated, Any

import typer

from flows.cli import registry_console as output
from flows.run.ending import aside
from flows.run.locate import WorkspaceOption, ready
from tasks.core.errors import BadParams, GateRefused

app = typer.Typer()

Reason = Annotated[str, typer.Option(help="Why, for the ledger.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def promote(
    version: Annotated[
        str | None, typer.Option(help="The version to promote; without it, the best that was registered last.")
    ] = None,
    reason: Reason = "",
    record: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="The record of `temper serve`, where promote.live asks what people said; also TEMPER_RECORD.",
        ),
    ] = None,
    refuse: Annotated[
        bool, typer.Option("--refuse", help="Write into the ledger that the version is not to be champion, instead.")
    ] = False,
    as_json: Json = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Make a version champion, if the gate lets it: better than the base, and not worse than the present champion."""
    if refuse and version is None:
        raise BadParams("needs a version", where="temper promote --refuse", expected="--version N")
    place = None
    if record:
        from flows.serve.record_database import url_named

        place = url_named(record).render_as_string()  # from here, and it has no password
    root = ready(workspace)
    from flows.run.lock import held
    from flows.run.prefect_server import kept_up
    from tasks.core import pipeline
    from tasks.orchestration.params import load_params

    if refuse and version:
        from flows.registry.promotion import refuse as turn_down

        with held(root, "temper promote"):
            refusal = turn_down(root, version, reason)
        _told(refusal._asdict()) if as_json else typer.echo(f"version {version} is refused, by {refusal.by}")
        return
    with held(root, "temper promote"):
        if load_params(root / pipeline.PARAMS).promote.approval == "human":  # only a flow run can wait for somebody
            with kept_up(root):
                from flows.promote import promote as flow
                from flows.run.session import stop

                done = aside(partial(flow, root, version, reason, place), stop=partial(stop, root))
        else:
            from flows.registry.promotion import promote as move  # and Prefect is not even imported

            done = move(root, version, reason, record=place)
    _told(output.promotion_numbers(done)) if as_json else output.promotion(done)
    if not done.passed:
        raise GateRefused("the gate refused it", where=done.model, fix="look at the checks above")


@app.command()
def rollback(
    to: Annotated[str | None, typer.Option(help="An earlier champion; without it, the one before the present.")] = None,
    reason: Reason = "",
    as_json: Json = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Make an earlier champion champion again; its files are checked first."""
    root = ready(workspace)
    from flows.registry.promotion import rollback as move_back
    from flows.run.lock import held

    with held(root, "temper rollback"):
        done = move_back(root, to, reason)
    _told(output.promotion_numbers(done)) if as_json else output.promotion(done)


@app.command()
def approve(
    run: Annotated[str, typer.Argument(help="The flow run that waits; `temper promote` prints it.")],
    refuse: Annotated[bool, typer.Option("--refuse", help="Say no.")] = False,
    note: Annotated[str, typer.Option(help="Why, for the ledger.")] = "",
    by: Annotated[str, typer.Option(help="Who decided; without it, the user's name on this machine.")] = "",
    workspace: WorkspaceOption = None,
) -> None:
    """Say yes or no to a promotion that waits for it (promote.approval: human)."""
    root = ready(workspace)
    from flows.run.prefect_server import kept_up

    with kept_up(root):
        from flows.registry.approval import approve as resume

        resume(run, approved=not refuse, note=note, by=by or getpass.getuser())
    typer.echo(f"{'refused' if refuse else 'approved'}; the run goes on")


@app.command()
def history(as_json: Json = False, workspace: WorkspaceOption = None) -> None:
    """Show every version, and every move of the champion alias: who, when, from where to where, and why."""
    root = ready(workspace)
    from flows.registry.history import history as found

    _told(found(root)) if as_json else output.history(found(root))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="The number of a version.")],
    second: Annotated[str, typer.Argument(help="The number of another.")],
    as_json: Json = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Show two versions on the items that both answered, with the interval of each difference."""
    root = ready(workspace)
    from flows.registry.history import compare as found

    done = found(root, first, second)
    _told(done) if as_json else output.comparison(done)


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="A version's number, models:/NAME/VERSION or models:/NAME@ALIAS.")],
    as_json: Json = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Show where a version comes from: commit, keys, rows, params, base, adapter, evaluation, verdict."""
    root = ready(workspace)
    from flows.registry.history import lineage as found

    done = found(root, model)
    _told(done) if as_json else output.lineage(done)


def _told(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
