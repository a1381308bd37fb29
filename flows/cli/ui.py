"""The commands of what people look at and decide together: the pages, rows in quarantine, votes."""

from __future__ import annotations

import getpass
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.format import print_table
from flows.cli.serving import AnyBase, Host, Keys, NewKey, Port, addresses, show_new_key
from flows.run.ending import on_stopping
from flows.run.locate import WorkspaceOption, enter, ready, seen_from_here
from tasks.core.errors import BadParams

RECORD = Path(".temper", "record.db")
"""Where votes are kept unless it is said."""

app = typer.Typer()

By = Annotated[str, typer.Option(help="Who decides; without it, the user's name on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def ui(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="REF",
            help="Models for the chat, served as by `temper serve`: models:/NAME@ALIAS, models:/NAME/VERSION, or a "
            "model folder. Without any, the champion, if there is one.",
        ),
    ] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Load none: the pages alone.")] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=REF", help="Put an adapter on the first model, as `temper serve` does."),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    keys: Keys = None,
    new_key: NewKey = None,
    role: Annotated[
        str, typer.Option(help="Of the new key: viewer looks, labeller votes and releases rows, approver promotes.")
    ] = "viewer",
    record: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="Keep conversations and votes in this SQLite file or PostgreSQL database; also TEMPER_RECORD; "
            ".temper/record.db without either.",
        ),
    ] = None,
    any_base: AnyBase = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Show a team what runs, what differs, and what waits for a word, on pages beside the API of `temper serve`.

    Without keys only this machine is answered, and its user is approver.
    """
    from flows.serve import keys as access

    if new_key:
        show_new_key(new_key, role)
        return
    if no_model and (models or adapter):
        raise BadParams("nothing is loaded, so there is nothing to name", where="--no-model")
    from tasks.core.stage import quiet_libraries

    quiet_libraries()  # before they are imported
    from flows.serve.record_database import url_given, url_of
    from flows.serve.routing import Plan, adapter_of
    from flows.serve.versions import reference_of

    clients = access.read_keys(keys)
    access.check_host(host, clients)
    named = {name: seen_from_here(reference) for name, reference in map(adapter_of, adapter or [])}
    given = addresses(models)
    kept = url_given(record)
    root = ready(workspace)
    if not given and not no_model:
        given = _champion(root)
    if named and not given:
        raise BadParams("stands on a model, and there is none", where="--adapter", fix="name a model")
    from flows.run.lock import state_folder
    from flows.serve.server import Options, serve
    from flows.ui.app import add_pages
    from tasks.registry.adapter_refs import fetch_adapter_ref

    plan = Plan(
        references=[reference_of(each) for each in given],
        adapters={name: fetch_adapter_ref(place, root) for name, place in named.items()},
        any_base=any_base,
    )
    kept = kept or url_of(state_folder(root) / RECORD.name)
    with on_stopping("what was being answered is answered", exit_code=0):
        serve(plan, root, Options(host, port, clients, kept), partial(add_pages, root))


def _champion(root: Path) -> list[str]:
    """Return the address of the champion, if there is one."""
    from flows.chat.ask import champion_uri
    from flows.registry.history import history

    return [champion_uri(root)] if history(root)["champion"] else []


@app.command()
def quarantine(
    row: Annotated[str | None, typer.Argument(metavar="ID", help="A row; without one, all are listed.")] = None,
    release: Annotated[bool, typer.Option("--release", help="Release it into a source of its own.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take an earlier release back.")] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text of the row as it is released; repeated, one for each that it has, in their order."),
    ] = None,
    why: Annotated[str, typer.Option(help="Why it may be learnt from.")] = "",
    by: By = "",
    as_json: Json = False,
    workspace: WorkspaceOption = None,
) -> None:
    """List the rows in quarantine with the reasons; show one; release it, as it is or edited, or take that back.

    Released rows go to data/released/rows/, the decisions to data/released/decisions.jsonl; the quarantine stays.
    """
    from flows.review import quarantine as review

    if release and withdraw:
        raise BadParams("say one of --release and --withdraw")
    if (release or withdraw) and not (row and why):
        raise BadParams("an ID and a reason are needed", expected="temper quarantine ID --release --why TEXT")
    root = enter(workspace)
    if row and (release or withdraw):
        action: review.Action = "release" if release else "withdraw"
        made = review.decide(root, row, action, by=by or getpass.getuser(), why=why, texts=text)
        if as_json:
            typer.echo(json.dumps(made._asdict(), indent=2, ensure_ascii=False))
        else:
            said = f"released into {review.RELEASED / 'rows'}; params.yaml needs\n\n{review.PARAMS}"
            typer.echo(f"{row} is {said if release else 'no longer released'}")
        return
    chosen = [review.find(root, row)] if row else review.quarantined(root)
    rows: list[dict[str, Any]] = [
        {
            "id": each.record.id,
            "kind": each.record.kind,
            "place": each.place,
            "reasons": each.reasons,
            "released": each.released,
            "row": review.as_row(each.record),
        }
        for each in chosen
    ]
    if as_json or row:
        typer.echo(json.dumps(rows[0] if row else rows, indent=2, ensure_ascii=False))
    elif rows:
        print_table(
            [
                {
                    **{name: each[name] for name in ("id", "kind", "place")},
                    "reasons": "; ".join(each["reasons"]),
                    "": "released" if each["released"] else "",
                }
                for each in rows
            ]
        )
    else:
        typer.echo("no row is in quarantine")


@app.command()
def vote(
    first: Annotated[str, typer.Argument(help="The number of a version.")],
    second: Annotated[str, typer.Argument(help="The number of another.")],
    item: Annotated[str | None, typer.Argument(help="An item; without it, the next one to vote on is shown.")] = None,
    better: Annotated[str, typer.Option(metavar="VERSION", help="Whose answer is better.")] = "",
    record: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL", help="Where votes are kept; also TEMPER_RECORD; .temper/record.db without either."
        ),
    ] = None,
    by: By = "",
    as_json: Json = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Vote on an item of the evaluation that two versions answered differently, or show the next one."""
    from flows.review import side_by_side as review
    from flows.run.lock import state_folder
    from flows.serve.record import Record
    from flows.serve.record_database import url_given

    place = url_given(record)
    root = ready(workspace)
    name, both = by or getpass.getuser(), review.pairs(root, first, second)
    kept = Record(place or state_folder(root) / RECORD.name)
    try:
        votes = review.preferred(kept.votes(), both)
        chosen = next(
            (each for each in both if (each.name == item if item else name not in votes.get(each.name, {}))), None
        )
        if item and chosen is None:
            raise BadParams("the two versions answered no such item differently", got=item)
        if chosen and item and better:
            review.vote(kept, chosen, better, name)
            votes = review.preferred(kept.votes(), both)
    finally:
        kept.close()
    tally = dict(review.tally(votes, (first, second)).votes)
    answers = {number: answer.prediction for number, answer in chosen.answers.items()} if chosen else {}
    asked = chosen.item._asdict() if chosen else {}
    if as_json:
        shown = {"item": chosen.name, "prompt": asked["prompt"], "answers": answers} if chosen else {"item": None}
        typer.echo(json.dumps({**shown, "votes": tally}, indent=2, ensure_ascii=False))
        return
    if chosen and not better:
        typer.echo(f"{asked['prompt']}\n")
        for number, answer in answers.items():
            typer.echo(f"version {number}: {answer}")
        typer.echo(f"\ntemper vote {first} {second} {chosen.name} --better {first}|{second}\n")
    typer.echo("votes: " + ", ".join(f"version {number} {count}" for number, count in tally.items()))
