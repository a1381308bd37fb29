"""A merge as a process of its own, for tests that kill it."""

from __future__ import annotations

from pathlib import Path

import numpy  # noqa: F401  # before the fork, so that kills fall into merging, and not into imports
import threadpoolctl  # noqa: F401

from flows.files.merge import Wish, merge_folders


def merging(base: str, adapter: str, out: str) -> None:
    """Merges into shards of a MiB."""
    wish = Wish("16bit", "closest", "own", 1, 1.0, any_base=False)
    merge_folders(Path(base), [Path(adapter)], Path(out), wish, None)
