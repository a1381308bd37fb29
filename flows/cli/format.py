"""Tables, sizes and durations as commands print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows with the same keys as aligned columns."""
    if not rows:
        return
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, {key: "-" * width for key, width in widths.items()}, *rows]:
        typer.echo("  ".join(f"{row[key]:<{width}}" for key, width in widths.items()).rstrip())
    typer.echo("")


def size(count: float) -> str:
    """Format bytes in the unit that suits them."""
    unit = next(unit for unit in (3, 2, 1, 0) if abs(count) >= 1024**unit or not unit)
    return f"{count / 1024**unit:.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def duration(seconds: float) -> str:
    """Format seconds in the unit that suits them."""
    length, unit = next((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "min"), (0.0, "s")) if seconds >= 2 * s)
    return f"{seconds / (length or 1):.1f} {unit}"


def local_time(step_s: float, steps: int | None) -> str:
    """Format a training's time where its steps are known, else a step's."""
    return f"{duration(step_s * (steps or 1))} for {f'{steps:,} steps' if steps else 'a step'}"
