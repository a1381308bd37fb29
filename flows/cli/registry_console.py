"""Text output of the commands about the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from flows.cli.format import print_table

if TYPE_CHECKING:
    from flows.registry.promotion import Promotion


def promotion(done: Promotion) -> None:
    """Print who is champion now, and why."""
    from flows.registry.verdict import verdict_table

    if done.champion is None:
        typer.echo(f"{done.model} has no champion yet")
    else:
        verb = "is now" if done.moved else "stays"
        typer.echo(
            f"models:/{done.model}/{done.champion} ({done.method}) {verb} champion: models:/{done.model}@champion"
        )
    for finding in done.findings:
        typer.echo(f"  {finding}")
    if done.verdict:
        typer.echo(f"\nthe gate on version {done.verdict.version}")
        print_table(verdict_table(done.verdict))


def promotion_numbers(done: Promotion) -> dict[str, Any]:
    """Return the promotion's outcome as JSON values."""
    return {**done._asdict(), "verdict": done.verdict.as_dict() if done.verdict else None}


def history(found: Mapping[str, Any]) -> None:
    """Print the versions, and the moves of the alias."""
    champion = f"version {found['champion']}" if found["champion"] else "none yet"
    typer.echo(f"model:    {found['model']}\nchampion: {champion}\n")
    gate = {True: "passed", False: "failed", None: ""}
    print_table(
        [
            {
                "version": each["version"],
                "method": each["method"],
                "scores": ", ".join(f"{suite} {score:.3f}" for suite, score in each["scores"].items()),
                "gate": gate[each["passed"]],
                "aliases": ", ".join(each["aliases"]),
            }
            for each in found["versions"]
        ]
    )
    print_table(
        [
            {
                "move": str(each["number"]),
                "at": each["at"],
                "by": each["by"],
                "action": each["action"],
                "from": each["before"],
                "to": each["to"],
                "reason": each["reason"],
                "verdict": each["summary"],
            }
            for each in found["moves"]
        ]
    )


def comparison(found: Mapping[str, Any]) -> None:
    """Two versions, suite by suite."""
    first, second = (f"version {each['version']} ({each['method']})" for each in (found["first"], found["second"]))
    print_table(
        [
            {
                "suite": suite,
                "metric": metric,
                "items": str(each["items"]),
                first: _number(each["first"]),
                second: _number(each["second"]),
                "better by": "absent"
                if each["gain"] is None
                else f"{each['gain']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]",
                "noise": _number(each["noise"]),
                "counts": "" if each["counted"] is None else "yes" if each["counted"] else "no",
            }
            for suite, metrics in found["suites"].items()
            for metric, each in metrics.items()
        ]
    )


def lineage(found: Mapping[str, Any]) -> None:
    """Print the essentials of where a version comes from; --json has all of it."""
    base, data, training = found["base"], found["data"], found["training"]
    verdict = found["verdict"]
    told = {
        "version": f"models:/{found['model']}/{found['version']}, MLflow run {found['run']}",
        "method": f"{found['method']}: {found['adapter']} by {found['objective']}, {training['steps']} steps",
        "git commit": found["git_commit"] or "outside git",
        "content key": found["key"],
        "of the training": training["key"],
        "base": " ".join(str(base[name]) for name in ("kind", "name", "revision") if base[name]),
        "base weights": base["weights_sha256"],
        "template": found["templates"]["model"],
        "form": f"{found['merge']['form']}; mean KL {found['merge']['mean_kl']:.2g} nats a token",
        "training rows": data["train_rows"],
        "signed": "yes" if found["signed"] else "no",
        "gate": f"{'passed' if verdict['passed'] else 'failed'}" if verdict else "not asked yet",
    }
    for name, value in told.items():
        typer.echo(f"{name + ':':<17}{value}")
    typer.echo("")
    print_table(
        [
            {"source": name, **{key: str(each[key]) for key in ("kind", "use", "licence")}}
            for name, each in data["sources"].items()
        ]
    )
    print_table([{"rows": path, "sha256": sha256} for path, sha256 in data["rendered"].items()])
    print_table([{"file": name, "sha256": sha256} for name, sha256 in found["files"].items()])
    print_table(
        [
            {
                "suite": suite,
                "items": str(each["rows"]),
                "metric": each["metric"],
                "score": f"{each['score']['mean']:.3f}",
            }
            for suite, each in found["evaluation"]["suites"].items()
        ]
    )
    for move in found["moves"]:
        way = f"{move['before'] or 'none'} -> {move['to']}"
        typer.echo(f"{move['at']}  {move['action']} by {move['by']}: {way}  {move['reason']}")


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:.3f}"
