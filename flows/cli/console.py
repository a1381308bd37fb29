"""Text output of the commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flows.cli.format import local_time, print_table, size

if TYPE_CHECKING:
    from flows.files.show_tokens import Rendering
    from flows.run.doctor import Diagnosis
    from flows.run.last_run import RunReport
    from flows.run.schedule import Scheduled
    from flows.run.show_params import Resolved


def difference(text: str) -> None:
    """Print the change of params.yaml."""
    colours = {"+": typer.colors.GREEN, "-": typer.colors.RED}
    for line in text.splitlines():
        typer.secho(line, fg=colours.get(line[:1]))
    typer.echo("")


def print_params(found: Sequence[Resolved]) -> None:
    """Every param, its value and its origin."""
    rows = [(each.key, json.dumps(each.value, ensure_ascii=False), each.origin) for each in found]
    widths = [min(max(len(row[column]) for row in rows), 60) for column in (0, 1)]
    for key, value, origin in rows:
        typer.echo(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


def evaluation(found: Mapping[str, Any]) -> None:
    """Print the scores of a model on suites, task by task."""
    for suite, each in found["suites"].items():
        rows = [(task, about) for task, about in each["tasks"].items()]
        rows += [("all", each)] if len(rows) > 1 else []
        print_table(
            [
                {
                    suite: name,
                    "metric": about["metric"],
                    "rows": str(about["rows"]),
                    "score": "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**about["score"]),
                    "figures": ", ".join(f"{key} {value:.4g}" for key, value in about.get("figures", {}).items()),
                }
                for name, about in rows
            ]
        )
        if skipped := each.get("skipped"):
            typer.echo(f"skipped, because it is not there: {', '.join(skipped)}")
    if cost := found.get("cost"):
        typer.echo("{seconds:.1f} s, {tokens} tokens, {tokens_per_s:.0f} tokens/s on {device}".format(**cost))


def inspection(found: Mapping[str, Any]) -> None:
    """Print what `temper inspect` found in a file or folder of rows."""
    files = [file for file in found["files"] if not file["error"]]
    if len(found["files"]) > 1:
        print_table([{"file": file["path"], "format": file["format"], "rows": str(file["rows"])} for file in files])
        for file in found["files"]:
            if file["error"]:
                typer.echo(f"no rows: {file['error']}")
        typer.echo("")
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
    typer.echo(f"{found['path']}: {found['format']}, {found['rows']} rows ({kinds})")
    for name in ("rejected", "repaired", "duplicates", "contamination"):
        typer.echo(f"  {name + ':':<15}{found[name]}")
    for title, counts in (("why", "reasons"), ("repairs", "repairs"), ("also found", "warnings"), ("note", "remarks")):
        for name, count in found.get(counts, {}).items():
            typer.echo(f"  {title + ':':<15}{count} x {name}")
    for name, leaks in found.get("benchmarks", {}).items():
        said = f"{leaks['exact']} of {leaks['questions']} questions whole, {leaks['overlapping']} in part"
        typer.echo(f"  {'benchmark:':<15}{name}: {said}, in {leaks['rows']} rows")


def rendering(found: Rendering) -> None:
    """Print rows as tokens: in colour where the terminal has it, else with brackets around target tokens."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for row in found.shown:
        typer.secho(row.place, bold=True)
        if colour:
            greens = cycle((typer.colors.GREEN, typer.colors.BRIGHT_GREEN))  # by turns, so that one sees the tokens
            for token, target in row.tokens:
                typer.secho(token, bg=next(greens) if target else None, fg="black" if target else None, nl=False)
        else:
            for target, run in groupby(row.tokens, key=lambda token: token[1]):
                text = "".join(token for token, _ in run)
                typer.echo(f"[[{text}]]" if target else text, nl=False)
        typer.echo("\n")
    said = "{rows} rows, {rendered} rendered, {tokens} tokens, {target_tokens} of them targets"
    typer.echo(said.format(**found.counts))
    for what, each in found.refused.items():
        typer.echo(f"  refused: {each.rows} x {what}\n           {each.first.line()}")
        if each.first.fix:
            typer.echo(f"           to take it: {each.first.fix}")
    for text, count in found.remarks.most_common():
        typer.echo(f"  note:    {count} x {text}")


def summary(workspace: Path, report: RunReport) -> None:
    """Print the end of a run: figures, champion, a reply of it, times, and where to look."""
    from flows.chat.ask import ask, champion_uri, sample
    from flows.cli.registry_console import promotion
    from flows.run import prefect_server
    from flows.run.status import lock_changed, read_results, results_table

    promoted = report.promotion
    typer.echo("")
    print_table(results_table(read_results(workspace)))
    if promoted:
        promotion(promoted)
    ran = [outcome for outcome in report.outcomes if outcome.state != "unchanged"]
    if not ran:
        typer.echo("\nnothing has changed since the last run")
    elif promoted and promoted.champion:
        turns, expected = sample(workspace)
        typer.echo(f"\nthe champion on a held-out row (expected: {expected})")
        for role, text in turns:
            typer.echo(f"  {role}: {text}")
        typer.echo(f"  assistant: {ask(workspace, champion_uri(workspace), turns, 128)}")
    if ran:
        typer.echo("")
        print_table(
            [{"stage": outcome.stage, "state": outcome.state, "seconds": f"{outcome.seconds:.1f}"} for outcome in ran]
        )
    for name, where in {"comparison": report.comparison, **prefect_server.ui_commands(workspace)}.items():
        typer.echo(f"{name + ':':<11} {where}")
    if lock_changed(workspace):
        typer.echo("to commit:  dvc.lock, in which DVC notes what was made of what: git commit params.yaml dvc.lock")


def print_overview(found: Mapping[str, Any]) -> None:
    """Print what `temper status` shows to people."""
    champion = found["champion"]
    typer.echo(f"model:    {found['model']}")
    typer.echo(f"champion: version {champion['version']} ({champion['method']})" if champion else "champion: none yet")
    typer.echo("")
    figures = ([("base", found["base"])] if found["base"] else []) + list(found["methods"].items())
    print_table(
        [
            {
                "model": name,
                "exact match": f"{each['exact_match']:.3f}",
                "loss": f"{each['loss']:.3f}",
                "version": each.get("version") or "",
            }
            for name, each in figures
        ]
    )
    print_table(
        [
            {"stage": name, "state": each["state"], "seconds": f"{each['seconds']:.1f}"}
            for name, each in found["stages"].items()
        ]
    )


def merged(found: Mapping[str, Any]) -> None:
    """Print what `temper merge` wrote."""
    typer.echo(f"{found['out']}: {found['bytes'] / 1e6:.1f} MB, {found['form']}")
    for name, each in found.get("onto", {}).items():
        typer.echo(f"  onto the {name} weights: mean KL {each['mean_kl']:.2e} nats per token")


def schedules(found: Sequence[Scheduled]) -> None:
    """Print what `temper schedule --list` shows."""
    if not found:
        typer.echo('no schedules; make one with: temper schedule --cron "0 3 * * *"')
    print_table(
        [
            {
                "name": each.name,
                "schedule": each.schedule,
                "state": "paused" if each.paused else "active",
                "next run": each.next_run,
                "workspace": each.workspace,
            }
            for each in found
        ]
    )


def examination(findings: Sequence[Diagnosis]) -> None:
    """Print what `temper doctor` found; exit with 1 when something is wrong."""
    marks = {True: "ok", False: "BAD", None: ""}
    print_table([{"": marks[finding.good], "subject": finding.subject, "found": finding.found} for finding in findings])
    if any(finding.good is False for finding in findings):
        raise typer.Exit(1)


def estimation(found: Mapping[str, Any]) -> None:
    """Print what `temper estimate` shows to people."""
    machine = found["machine"]
    typer.echo(f"model:   {found['model']}\nrows:    {found['rows']}")
    taker = "Python itself" if machine["here"] else "CUDA"
    free = f"{size(machine['free_bytes'])} free, of which {taker} takes {size(machine['process_bytes'])}"
    typer.echo(f"machine: {machine['device']}, trains in {machine['dtype']}, {free}")
    if not machine["here"]:
        typer.echo("         an estimate: it is not here; times are those of four tenths of its peak, never measured")
    typer.echo("")
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    print_table(
        [
            {
                "method": name,
                "dtype": dtype,
                "trained": f"{each['trained']:,} of {each['all']:,} ({each['trained'] / each['all']:.4%})",
                **{kind: size(each[kind]) for kind in kinds},
                "fits": f"{'yes' if each['fits'] else 'NO'}, {size(abs(each['left_bytes']))} "
                + ("left" if each["fits"] else "short"),
                "time, roughly": local_time(each["step_s"], each["steps"]),
            }
            for name, method in found["methods"].items()
            for dtype, each in method["dtypes"].items()
        ]
    )
    for name, method in found["methods"].items():
        if method["problem"]:
            typer.echo(f"{name} cannot be estimated: {method['problem']}")
    if machine["device"] == "cpu":
        typer.echo("the C library keeps freed blocks under 32 MiB: of small models more can be resident than in use")
    for name, method in found["methods"].items():
        for suggestion in method["suggestions"]:
            typer.echo(f"{name} would fit with {suggestion['change']} ({size(suggestion['total_bytes'])})")


def drift(found: Mapping[str, Any], page: Path) -> None:
    """Print what `temper drift` shows to people."""
    typer.echo(f"{found['prompts']} prompts of {found['source']}, {found['since']} to {found['until']}\n")
    answers = found["answers"]
    columns = {**found["columns"], **({"answer_characters": answers["characters"]} if answers else {})}
    print_table(
        [
            {
                "column": name.replace("_", " "),
                "stability index": f"{each['psi']:.3f}",
                "by chance": f"{each['expected']:.3f}",
                "now": str(each["rows"]),
                "before": str(each["rows_before"]),
            }
            for name, each in columns.items()
        ]
    )
    if answers:
        shares = [
            {
                f"answers of {answers['version']}": name,
                "now": f"{each['new']:.1%}",
                "in its first days": f"{each['old']:.1%}",
                "difference": f"{each['gain']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]",
            }
            for name, each in answers["shares"].items()
        ]
        print_table(shares)
    if found["reasons"]:
        typer.echo("drifted: " + "; ".join(found["reasons"]))
    elif found["prompts"] < found["least"]:
        typer.echo(f"too few to say: at least {found['least']} prompts are needed")
    else:
        typer.echo("nothing drifted")
    typer.echo(f"page: {page}")
