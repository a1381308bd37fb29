"""What runs where: the stages under way, what is served, what waits for somebody, and the state of every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from starlette.responses import Response
from starlette.routing import Route

from flows.cli.format import duration
from flows.registry.waiting import waiting
from flows.run.lock import Holder, holder
from flows.run.status import overview
from flows.ui.site import Site, Visit
from tasks.core import pipeline
from tasks.orchestration.run_journal import journal_file

_RECENT = 12


def routes(site: Site) -> list[Route]:
    """Return the page, the part that follows what goes on, and the one that asks DVC, which takes a while."""

    def show(visit: Visit) -> Response:
        return site.page(visit, "runs", live(site.root, site.service.models.report()))

    def follow(visit: Visit) -> Response:
        return site.page(visit, "_live", live(site.root, site.service.models.report()))

    def stages(visit: Visit) -> Response:
        return site.page(visit, "_stages", {"found": overview(site.root), "duration": duration})

    return [site.route("/", show), site.route("/live", follow), site.route("/stages", stages)]


def live(root: Path, served: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collect what goes on in a workspace at this moment.

    Returns:
        `holder`, who holds it, or None; `running`, the stages that its process runs; `recent`, the last outcomes,
        newest first; `waiting`, promotions that wait for somebody; `served`, what the server has in memory.
    """
    held_by = holder(root)
    return {
        "holder": held_by,
        "running": running(root, held_by) if held_by else [],
        "recent": [{**each, "took": duration(each["seconds"])} for each in recent(root)],
        "waiting": waiting(root),
        "served": served,
    }


def running(root: Path, held_by: Holder) -> list[str]:
    """List the stages that a process and what it started run now, by their commands."""
    try:
        started = psutil.Process(held_by.pid).children(recursive=True)
    except psutil.Error:
        return []
    lines = set[str]()
    for process in started:
        try:
            lines.add(" ".join(process.cmdline()))
        except psutil.Error:  # it ended meanwhile
            continue
    commands = {name: node.command.partition(" ")[2] for name, node in pipeline.load(root).items()}
    return [name for name, command in commands.items() if any(command in line for line in lines)]


def recent(root: Path) -> list[dict[str, Any]]:
    """Read the last outcomes of stages from the journal, newest first; a line that a kill cut is passed over."""
    file = journal_file(root)
    found = list[dict[str, Any]]()
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in islice(reversed(lines), _RECENT):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
