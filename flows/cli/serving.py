"""The command that serves models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.run.ending import on_stopping
from flows.run.locate import REGISTRY_SCHEME, WorkspaceOption, enter, ready, seen_from_here

app = typer.Typer()

DRIFTED = 3
"""The exit code of `temper drift` where something drifted; 1 is a fault, and 2 a wrong command line."""


Host = Annotated[str, typer.Option(help="The address to listen on; others than 127.0.0.1 need keys.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0: one that is free.")]
Keys = Annotated[
    Path | None,
    typer.Option(help="A file of keys, a line each: NAME:SHA256[:REQUESTS_PER_MINUTE][:ROLE]; also TEMPER_KEYS."),
]
NewKey = Annotated[
    str | None, typer.Option(metavar="NAME", help="Make a key, print it once with its line for --keys, and end.")
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Also adapters that name another base.")]


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="REF",
            help="What to serve: models:/NAME@ALIAS, whose moves are followed, models:/NAME/VERSION, or a model "
            "folder. Without any, the workspace's champion.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=REF",
            help="Put an adapter on the first model, served under a name of its own: a folder, hub:OWNER/NAME@COMMIT, "
            "models:/NAME/VERSION or models:/NAME@ALIAS. May be repeated.",
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    keys: Keys = None,
    new_key: NewKey = None,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="ALIAS=SHARE",
            help="Let another alias of the first model answer a share of the users or conversations.",
        ),
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Let another alias answer too, for --record alone.")
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="Keep conversations and feedback in this SQLite file or postgresql:// database, with secrets and "
            "e-mails masked; also TEMPER_RECORD.",
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="So many requests are answered at a time.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="So many wait at most; more are told to come again.")] = 256,
    cache_mib: Annotated[
        int | None, typer.Option(min=1, help="Memory for keys and values; without it, as the engine sees fit.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="The most tokens of a prompt and its answer; without it what models read.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What runs merged models: temper, or vllm or llama.cpp in an environment of its own.")
    ] = "temper",
    engine_path: Annotated[
        Path | None,
        typer.Option(help="The engine's program; without it TEMPER_VLLM or TEMPER_LLAMA_SERVER, or one on PATH."),
    ] = None,
    engine_dtype: Annotated[
        str | None,
        typer.Option(
            help="The number format of the engine's weights: float32, bfloat16 or float16, for llama.cpp also q8_0; "
            "without it the model's own."
        ),
    ] = None,
    engine_option: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="A further word of the engine's command line. May be repeated."),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1.0, help="An answer is given up after so many seconds.")] = 600.0,
    any_base: AnyBase = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Serve models over HTTP with OpenAI's API, for as long as this command runs.

    A promotion or a rollback is followed without a request being lost: the new version is checked and loaded beside
    the old one, which ends what it has begun.
    """
    from flows.serve import keys as access

    if new_key:
        show_new_key(new_key)
        return
    from tasks.core.stage import quiet_libraries

    quiet_libraries()  # before they are imported
    from flows.serve.engines.start import engine_choice
    from flows.serve.record_database import url_given
    from flows.serve.routing import Plan, adapter_of, canary_of
    from flows.serve.versions import Settings, reference_of

    share = canary_of(canary) if canary else None
    chosen = engine_choice(engine, engine_path, engine_dtype, engine_option or [])
    clients = access.read_keys(keys)
    access.check_host(host, clients)
    named = dict(adapter_of(each) for each in adapter or [])
    places = {name: seen_from_here(reference) for name, reference in named.items()}
    given = addresses(models)
    kept = url_given(record)

    in_registry = not given or any(each.startswith(REGISTRY_SCHEME) for each in [*given, *places.values()])
    root = ready(workspace) if workspace or in_registry else None
    if not given and root:
        from flows.chat.ask import champion_uri

        given = [champion_uri(root)]
    from flows.serve.server import Options, serve
    from tasks.registry.adapter_refs import fetch_adapter_ref

    plan = Plan(
        references=[reference_of(each) for each in given],
        adapters={name: fetch_adapter_ref(place, root or Path()) for name, place in places.items()},
        settings=Settings(slots, cache_mib << 20 if cache_mib else None, queue, context, chosen),
        canary=share,
        shadow=shadow,
        any_base=any_base,
    )
    with on_stopping("what was being answered is answered", exit_code=0):
        serve(plan, root, Options(host, port, clients, kept, time_limit))


def show_new_key(name: str, role: str | None = None) -> None:
    """Make a key, and print it with its line for --keys."""
    from flows.serve.keys import new_key

    key, line = new_key(name, role)
    typer.echo(f"key, shown this once: {key}\nline for --keys:       {line}")


def addresses(models: list[str] | None) -> list[str]:
    """Return what a command line names to be served: of folders the paths from the root."""
    return [each if each.startswith(REGISTRY_SCHEME) else str(Path(each).resolve()) for each in models or []]


@app.command()
def feedback(
    record: Annotated[
        str | None, typer.Argument(help="The file or database that `temper serve --record` keeps.")
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(help="The folder to write, of labels.jsonl, preferences.jsonl and chats.jsonl.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Only conversations of the last so many days.")] = None,
    consent: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE", help="Only conversations whose request said so in its `metadata`."),
    ] = None,
    forget_after: Annotated[
        float | None, typer.Option(min=0, help="Delete conversations older than so many days from the record, first.")
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Write what people said of answers as rows to train on.

    Without arguments it renews the snapshots of the sources of kind feedback in params.yaml, as these say. With a
    record and a folder it writes that folder, which a source of kind folder reads.
    """
    from tasks.core.errors import BadParams

    if record is None:
        if days or consent or forget_after is not None:
            raise BadParams(
                "are said in params.yaml, beside the source",
                where="--days, --consent and --forget-after",
                fix="name a record and a folder, or write them below ingest.sources",
            )
        from flows.run.feedback import renew

        for each in renew(enter(workspace)):
            typer.echo("\n".join(each.lines()))
        return
    if out is None:
        raise BadParams("names no folder to write", where="temper feedback", expected="temper feedback RECORD FOLDER")
    from flows.serve import feedback as said
    from flows.serve.record_database import shown, url_named

    key, equals, value = (consent or "").partition("=")
    if consent and not (key and equals):
        raise BadParams("is no condition", where=f"--consent {consent}", expected="KEY=VALUE, such as training=yes")
    place = url_named(record)
    if forget_after is not None:
        typer.echo(f"{said.forget(place, forget_after)} conversations deleted from {shown(place)}")
    found = said.snapshot(place, out, said.Choice(days, {key: value} if consent else {}))
    for name, rows in found.counts().items():
        typer.echo(f"{out / name}: {rows} rows")
    for reason, count in sorted(found.left_out.items()):
        typer.echo(f"left out, {reason}: {count}")


@app.command()
def drift(
    record: Annotated[
        str | None,
        typer.Option(metavar="FILE|URL", help="The record that `temper serve` keeps; also TEMPER_RECORD."),
    ] = None,
    days: Annotated[float, typer.Option(min=0.01, help="Of the last so many days.")] = 7.0,
    limit: Annotated[
        float, typer.Option(min=0, help="Drifted is what has a stability index so far above that of chance.")
    ] = 0.25,
    least: Annotated[int, typer.Option(min=1, help="Of fewer prompts or answers nothing is said.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Tell how far what is asked moved from the rows that were trained on, and what is answered from before.

    Ends with 3 where something drifted, for whatever retrains then. Writes the page of the data with it.
    """
    import json

    from flows.cli import console
    from flows.serve.record_database import VARIABLE, url_given
    from tasks.core.errors import BadParams

    place = url_given(record)
    if place is None:
        raise BadParams("no record is named", where="temper drift", expected=f"--record FILE|URL, or {VARIABLE}")
    root = enter(workspace)
    from flows.run.data_page import write_data_page
    from flows.serve.drift import drift_of, drifted

    found = drift_of(root, place, days)
    reasons = drifted(found, limit, least)
    told = {**found.as_dict(), "least": least, "reasons": reasons}
    page = write_data_page(root, told)
    typer.echo(json.dumps(told, indent=2, ensure_ascii=False)) if as_json else console.drift(told, page)
    if reasons:
        raise typer.Exit(DRIFTED)
