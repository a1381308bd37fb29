"""Facts of rows that an earlier run looked at.

Blocks of rows whose content and rules did not change are not looked at again. What is remembered lies under .temper/
and only saves time; without it the result is the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.artifacts import atomic_write
from tasks.text import words
from tasks.validate import row_features

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

LEAST_ROWS, USUAL_ROWS, MOST_ROWS = 1024, 4096, 16384
"""How many rows a block has. To look at so many again costs less than a key for every row would."""


class FeatureCache:
    """A folder of facts by the content of the rows that they are of."""

    def __init__(self, folder: Path | None) -> None:
        """Open the cache of facts; with None nothing is cached."""
        self._folder = folder
        self._rules = _digest_of_code() if folder else ""
        self._used: set[str] = set()
        self.known_rows = 0

    def facts_of(self, table: pa.Table, kind: str) -> pd.DataFrame:
        """Compute the facts of rows of one kind, as `checks.facts.facts_of` does, or take them from the cache."""
        import pandas as pd

        if self._folder is None or not len(table):
            return row_features.row_features(table, kind)
        blocks = [self._block(block, kind, self._folder) for block in _blocks(table, kind)]
        return pd.concat(blocks, ignore_index=True)

    def forget_others(self) -> None:
        """Remove what this run did not use."""
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
            known = row_features.row_features(block, kind)
            atomic_write(path, known.to_parquet())
        else:
            self.known_rows += len(block)
        return known


def _blocks(table: pa.Table, kind: str) -> list[pa.Table]:
    """Split a table into blocks that begin anew with each source, and within it where the rows themselves decide.

    So a row that is added, changed or taken away alters the block that it stands in, and leaves all others alone.
    """
    import numpy as np
    import pyarrow.compute as pc

    begins = np.flatnonzero(_row_endings(table, kind) % np.uint64(USUAL_ROWS) == 0)
    blocks, start = [], 0
    for end in pc.run_end_encode(table["source"].combine_chunks()).run_ends.to_pylist():
        while start < end:
            place = np.searchsorted(begins, start + LEAST_ROWS)
            wanted = int(begins[place]) if place < len(begins) else end
            stop = min(wanted, start + MOST_ROWS, end)
            blocks.append(table.slice(start, stop - start))
            start = stop
    return blocks


def _row_endings(table: pa.Table, kind: str) -> NDArray[np.uint64]:
    """Compute a number for each row, (rows,), of the length and the last bytes of the last text in it."""
    import numpy as np

    turns = row_features.turn_columns(table, kind)
    content, offsets = words.content_of(turns.text)
    found = np.zeros(len(table), np.uint64)
    length, ends = np.diff(offsets), offsets[1:]
    ending = length.astype(np.uint64)
    for back in range(1, 9):
        inside = np.flatnonzero(length >= back)
        ending[inside] = ending[inside] * np.uint64(257) + content[ends[inside] - back]
    found[turns.row] = ending  # of several texts in a row the last one stays
    return words.mixed(found)


def _content_key(block: pa.Table, kind: str, rules: str) -> str:
    """Compute the digest of all that facts depend on: the rows' own columns, not where the rows came from."""
    import pyarrow as pa

    content = block.drop_columns(["id", "source", "file", "row", "family", "group"]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content.take(pa.array(range(len(content)))))  # a slice would write its neighbours too
    state = hashlib.blake2b(f"{rules} {kind}".encode(), digest_size=16)
    state.update(sink.getvalue())
    return state.hexdigest()


def _digest_of_code() -> str:
    """Return the digest of all that the features of a row come from: `row_features` and the room `text`."""
    own, shared = Path(str(row_features.__file__)), Path(str(words.__file__)).parent
    state = hashlib.sha256()
    for file in (own, *sorted(shared.glob("*.py"))):
        state.update(file.read_bytes())
    return state.hexdigest()
