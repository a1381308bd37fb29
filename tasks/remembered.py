"""Facts of rows that an earlier run looked at.

Blocks of rows whose content and rules did not change are not looked at again. What is remembered lies under .temper/
and only saves time; without it the result is the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.checks import facts, words
from tasks.outputs import write_whole

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

BLOCK_ROWS = 8192


class Memory:
    """A folder of facts by the content of the rows that they are of."""

    def __init__(self, folder: Path | None) -> None:
        """Opens the memory; with None nothing is remembered."""
        self._folder = folder
        self._rules = _digest_of_code() if folder else ""
        self._used: set[str] = set()
        self.known_rows = 0

    def facts_of(self, table: pa.Table, kind: str) -> pd.DataFrame:
        """The facts of rows of one kind, as `checks.facts.facts_of` finds them."""
        import pandas as pd

        if self._folder is None or not len(table):
            return facts.facts_of(table, kind)
        blocks = [self._block(block, kind, self._folder) for block in _blocks(table)]
        return pd.concat(blocks, ignore_index=True)

    def forget_others(self) -> None:
        """Removes what this run had no use for."""
        if self._folder and self._folder.is_dir():
            for path in self._folder.glob("*.parquet"):
                if path.name not in self._used:
                    path.unlink(missing_ok=True)

    def _block(self, block: pa.Table, kind: str, folder: Path) -> pd.DataFrame:
        import pandas as pd
        import pyarrow as pa

        path = folder / f"{_content_key(block, kind, self._rules)}.parquet"
        self._used.add(path.name)
        try:
            known = pd.read_parquet(path)
        except (OSError, ValueError, pa.ArrowException):  # not there, or damaged: look again
            known = facts.facts_of(block, kind)
            write_whole(path, known.to_parquet())
        else:
            self.known_rows += len(block)
        return known


def _blocks(table: pa.Table) -> list[pa.Table]:
    """Blocks that begin anew with each source, so that rows added to one leave the others' blocks as they were."""
    import pyarrow.compute as pc

    runs = pc.run_end_encode(table["source"].combine_chunks())
    blocks, start = [], 0
    for end in runs.run_ends.to_pylist():
        blocks += [table.slice(at, min(BLOCK_ROWS, end - at)) for at in range(start, end, BLOCK_ROWS)]
        start = end
    return blocks


def _content_key(block: pa.Table, kind: str, rules: str) -> str:
    """The digest of all that facts depend on: the rows' own columns, not where the rows came from."""
    import pyarrow as pa

    content = block.drop_columns(["id", "source", "file", "row", "family", "group"]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content.take(pa.array(range(len(content)))))  # a slice would write its neighbours too
    state = hashlib.blake2b(f"{rules} {kind}".encode(), digest_size=16)
    state.update(sink.getvalue())
    return state.hexdigest()


def _digest_of_code() -> str:
    """Changes when the rules do."""
    state = hashlib.sha256()
    for module in (facts, words):
        state.update(Path(str(module.__file__)).read_bytes())
    return state.hexdigest()
