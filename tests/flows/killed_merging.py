"""A merge as a process of its own, for tests that kill it."""

from __future__ import annotations

from pathlib import Path

from flows.merging import Wish, merge_folders


def merging(base: str, adapter: str, out: str) -> None:
    """Merges into shards of a MiB."""
    wish = Wish("16bit", "closest", "own", 1, 1.0, any_base=False)
    merge_folders(Path(base), [Path(adapter)], Path(out), wish, None)
