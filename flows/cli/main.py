"""The command `temper`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flows.cli import console, files, registry, serving, ui
from flows.run.ending import aside, on_stopping, stoppable
from flows.run.locate import WorkspaceOption, enter, ready, seen_from_here
from tasks.core import pipeline
from tasks.core.errors import BadParams, TemperError
from tasks.core.stage import tell_of_storage

app = typer.Typer(
    help="A fine-tuning factory for language models: from data to a registered, promoted model, in one command.\n\n"
    "Commands work on the nearest folder above that holds dvc.yaml and params.yaml. "
    "With --debug anywhere, an error shows its traceback.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(registry.app)
app.add_typer(files.app)
app.add_typer(serving.app)
app.add_typer(ui.app)


@app.command()
def run(
    recipe: Annotated[
        Path | None, typer.Option(resolve_path=True, help="Put this params file in place of params.yaml first.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value of params.yaml first, such as train.qlora.epochs=2; may be repeated.",
        ),
    ] = None,
    promote: Annotated[bool, typer.Option(help="Promote the best method at the end, if it passes the gate.")] = True,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="Renew the snapshots of what people said first, as `temper feedback`.")
    ] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Bring every stage up to date, then promote the best method.

    What has not changed since the last run is passed over. A run that was interrupted goes on where it was.
    """
    from flows.run import last_run, prefect_server
    from flows.run.edit_params import change_params
    from flows.run.lock import held
    from flows.run.progress_board import on_board, plain_logs

    root = enter(workspace)
    with on_stopping("`temper run` goes on from here"), held(root, "temper run"):
        if feedback:
            from flows.run.feedback import renew

            for each in renew(root):
                typer.echo("\n".join(each.lines()))
        if difference := change_params(root, recipe, set_ or []):
            console.difference(difference)
        terminal = sys.stderr.isatty()
        prefect_server.prepare_servers(root, terminal=terminal)
        if prefect_server.temporary():
            if unchanged := last_run.unchanged_report(root, promote):
                console.summary(root, unchanged)
                return
            from flows.run.prefect_runs import adopt_runs

            adopt_runs(root)
        with on_board(len(pipeline.load(root)), terminal=terminal), prefect_server.kept_up(root):
            from flows.retrain import retrain
            from flows.run.session import stop

            if not _debugging:
                plain_logs()
            report = aside(partial(retrain, root, promote), stop=partial(stop, root))
        console.summary(root, report)
        last_run.keep_report(root, report)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Show the champion, the figures of every method and the state of every stage."""
    from flows.run import prefect_server
    from flows.run.status import overview

    root = enter(workspace)
    prefect_server.prepare_servers(root, terminal=True)
    found = overview(root)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else console.print_overview(found)


@app.command()
def init(
    source: Annotated[Path, typer.Option("--from", help="A file of rows of yours, or a folder of files.")],
    base: Annotated[Path | None, typer.Option(help="The model folder that is tuned; models/tiny without it.")] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Write a first params.yaml for your own rows: their format, their lengths, and the methods that suit them."""
    from flows.run.init_params import init_params
    from tasks.core.stage import quiet_libraries

    quiet_libraries()
    source, base = source.resolve(), base.resolve() if base else None  # before the workspace becomes the current folder
    root = enter(workspace)
    typer.echo(init_params(root, source, base or root / "models" / "tiny"))


@app.command()
def params(
    schema: Annotated[bool, typer.Option("--schema", help="Write params.schema.json, which editors read.")] = False,
    migrate: Annotated[
        bool, typer.Option("--migrate", help="Rewrite a params.yaml of an older temper in the present words.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Show every value of params.yaml and where it comes from: a line of the file, or a default."""
    from flows.run.show_params import migrate_params, resolved, write_schema

    root = enter(workspace)
    if schema:
        typer.echo(write_schema(root))
    elif migrate:
        console.difference(migrate_params(root)[1] or "nothing to rewrite")
    elif as_json:
        found = {each.key: {"value": each.value, "origin": each.origin} for each in resolved(root)}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        console.print_params(resolved(root))


@app.command()
def page(workspace: WorkspaceOption = None) -> None:
    """Write the page that compares all models, from what was trained and evaluated so far, and print its path.

    A run ends with the same page, and logs it to MLflow. It is one HTML file that needs nothing beside it.
    """
    from flows.comparison.page import write

    typer.echo(write(enter(workspace)))


@app.command()
def chat(
    text: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: Annotated[
        str | None, typer.Option(help="A registered model such as models:/NAME@champion, or a model folder.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="A reply is at most so long.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above, the reply is drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that have this probability together.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that were generated before become less likely.")
    ] = 1.0,
    repetition_range: Annotated[
        int, typer.Option(help="Only among the last so many generated tokens; 0: among all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same seed and text give the same reply.")] = 0,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Put this adapter on the model, by default the workspace's base: a folder, hub:OWNER/NAME@COMMIT, "
            "models:/NAME/VERSION or models:/NAME@ALIAS. May be repeated: each answers, on one base in memory. "
            "The base is not quantized, also for an adapter that was trained on it in 4 bits (NF4) or 8."
        ),
    ] = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="Also adapters that name another base.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Ask the champion, or another model, or a base with one or several adapters; greedily, unless told otherwise."""
    from flows.chat.ask import REGISTRY_SCHEMES, ask, ask_adapters, champion_uri
    from tasks.inference.params import generation_of

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    asked |= {"repetition_penalty": repetition_penalty, "repetition_range": repetition_range}
    generation = generation_of(asked, "temper chat")

    if model and not model.startswith(REGISTRY_SCHEMES):
        model = str(Path(model).resolve())  # seen from here, not from the workspace
    references = [seen_from_here(reference) for reference in adapter or []]
    root = ready(workspace)

    if not references:
        typer.echo(ask(root, model or champion_uri(root), [("user", text)], max_tokens, generation))
        return
    base = Path(model) if model else root / next(out for out in pipeline.load(root)["base"].outs)
    for reference, reply in ask_adapters(root, base, references, text, max_tokens, generation, any_base=any_base):
        typer.echo(f"{reference}: {reply}" if len(references) > 1 else reply)


@app.command()
def push(
    reference: Annotated[
        str,
        typer.Argument(help="A folder of an adapter or a model, or the adapter of models:/NAME/VERSION or @ALIAS."),
    ],
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is for its owner alone.")] = False,
    message: Annotated[str, typer.Option(help="The message of the commit.")] = "Upload with temper",
    workspace: WorkspaceOption = None,
) -> None:
    """Upload an adapter or a model folder to the Hugging Face hub, and print the commit that pins it.

    The token is the hub client's own: HF_TOKEN, or what `hf auth login` stored.
    """
    from tasks.publish.hub_upload import push as upload
    from tasks.registry.adapter_refs import fetch_adapter_ref

    reference = seen_from_here(reference)
    root = ready(workspace)
    done = upload(fetch_adapter_ref(reference, root), name, private=private, message=message)
    typer.echo(f"hub:{name}@{done.commit}" + ("" if done.changed else "\nnothing changed: this is what was there"))


@app.command()
def schedule(
    cron: Annotated[str | None, typer.Option(help='Serve the schedule of a cron line, such as "0 3 * * *".')] = None,
    timezone: Annotated[str, typer.Option(help="The time zone of the cron line, such as Europe/Berlin.")] = "UTC",
    every: Annotated[str | None, typer.Option(help="Serve a run every so often: 30m, 6h, 1d.")] = None,
    on_feedback: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="ROWS",
            help="Run when people have said so much that is new, in rows to train on; beside a schedule or by itself. "
            "Every run renews the snapshots of feedback first, then.",
        ),
    ] = None,
    on_drift: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="LIMIT",
            help="With --on-feedback: one new row is enough where what is asked or answered drifted, as `temper drift` "
            "tells with this limit (0.25 is usual).",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the schedules.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Pause this workspace's schedule.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume it.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove it.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Run the factory on a schedule for as long as this command runs; or list, pause, resume or remove the schedule."""
    chosen = [bool(cron), bool(every), list_, pause, resume, remove]
    serving = bool(cron or every or on_feedback)
    if sum(chosen) != 1 and not (on_feedback and not any(chosen)):
        raise BadParams(
            "say one of --cron, --every, --on-feedback, --list, --pause, --resume, --remove",
            got=f"{sum(chosen)} of them",
            expected="one; --on-feedback goes with --cron and --every, too",
        )
    if on_feedback and not (cron or every) and any(chosen):
        raise BadParams("is said where a schedule is served", where="--on-feedback")
    if on_drift is not None and not on_feedback:
        raise BadParams("goes with --on-feedback", where="--on-drift", fix="say of how many rows a run is made else")
    root = ready(workspace, terminal=list_ or pause or resume or remove)
    from flows.run import schedule
    from flows.run.prefect_server import kept_up

    if serving:
        interval = schedule.parse_interval(every) if every else None
        if cron:
            dates = (date.strftime("%a %Y-%m-%d %H:%M %Z") for date in schedule.check_cron(cron, timezone))
            typer.echo(f"next runs: {', '.join(dates)}")
        typer.echo(f"serving the schedule of {root}; stop it with Ctrl-C")
        with on_stopping("the schedule rests until it is served again", exit_code=0):
            every_s = interval.total_seconds() if interval else None
            schedule.serve(schedule.Serving(str(root), cron, timezone, every_s, on_feedback, on_drift))
    with kept_up(root):
        if list_:
            console.schedules(schedule.listed())
        elif remove:
            typer.echo(f"removed {schedule.remove(root)}")
        else:
            typer.echo(f"{'paused' if pause else 'resumed'} {schedule.pause(root, paused=pause)}")


@app.command()
def estimate(
    model: Annotated[
        Path | None, typer.Option(help="A model folder or a config.json; without it, the base of the workspace.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="One method of params.yaml; without it, all.")] = None,
    device: Annotated[
        str | None, typer.Option(help="A graphics card that need not be here, such as h100, a100, l4 or 4090.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Tell what memory and time each method would need before anything is run, what fits here, and what would.

    No weights are read: the largest training step is rehearsed on tensors without numbers. Times are rough; those of a
    card that is not here follow from what its maker says of it.
    """
    from flows.files.estimate import estimates
    from tasks.core.stage import quiet_libraries

    quiet_libraries()
    named = model.resolve() if model else None
    found = estimates(enter(workspace), named, method, device)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else console.estimation(found)


@app.command()
def doctor(workspace: WorkspaceOption = None) -> None:
    """Tell what is installed, what this machine can do, and which servers answer."""
    from flows.run.doctor import diagnose

    root = ready(workspace)
    console.examination(diagnose(root))


# --- around the commands ----------------------------------------------------------------------------------------------


_debugging = "--debug" in sys.argv


def main() -> None:
    """Run the command line; turn errors into one readable block and the exit code that they carry."""
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    with stoppable():
        _run_command()


def _run_command() -> None:
    try:
        app()
    except TemperError as error:
        if _debugging:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if _debugging:
            raise
        if told := tell_of_storage(error):
            typer.echo(f"error: {told[0]}", err=True)
            sys.exit(told[1])
        typer.echo(
            f"error: {type(error).__name__}: {error}\n  to fix:   add --debug to see where, and tell the maintainers",
            err=True,
        )
        sys.exit(TemperError.exit_code)
