"""Columns of the flattened table, one line per row, that expectations may name; texts are taken when one names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.validate.row_features import FEATURE_COLUMNS, turn_columns, turn_of_rows

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

_TURNS = {
    "system": ("s", False),
    "prompt": ("u", False),
    "reply": ("ac", True),
    "rejected": ("r", False),
    "text": ("x", False),
    "first_turn": ("suatcx", False),
    "last_turn": ("suatcx", True),
}
"""Of each text column: the letters of those who may say it, and whether it is the last turn of theirs."""

TEXT_COLUMNS = ("group", "label", *_TURNS, "all_text")
"""What is taken from the rows only when an expectation names it."""

COLUMNS = (
    "id",
    "source",
    "kind",
    *FEATURE_COLUMNS,
    "length_outliers",
    "contradictions",
    "contamination",
    "exact_duplicates",
    "near_duplicates",
    *TEXT_COLUMNS,
)


def column_of_rows(tables: Mapping[str, pa.Table], name: str) -> pd.Series[Any]:
    """Return a column of all rows, in the order of the kinds' tables; null where a row has nothing of the kind."""
    import pyarrow as pa

    parts = [_column(table, kind, name) for kind, table in tables.items() if len(table)]
    kind_of_column = pa.bool_() if name == "label" else pa.large_string()
    whole: pd.Series[Any] = pa.chunked_array([part.cast(kind_of_column) for part in parts]).to_pandas()
    return whole.astype(float) if name == "label" else whole


def _column(table: pa.Table, kind: str, name: str) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in ("id", "source"):
        return table[name].combine_chunks()
    if name == "group":
        stated = table[name].combine_chunks()
        return pc.if_else(pc.equal(stated, ""), None, stated)
    if name == "label":
        return table[name].combine_chunks() if kind == "labelled" else pa.nulls(len(table), pa.bool_())
    turns = turn_columns(table, kind)
    if name == "all_text":
        return _joined(turns.text, turns.row, len(table))
    letters, last = _TURNS[name]
    return turn_of_rows(turns, letters, len(table), last=last)


def _joined(texts: pa.LargeStringArray, row: NDArray[np.int64], rows: int) -> pa.LargeStringArray:
    """Join the texts of each row, one below the other."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    offsets = np.searchsorted(row, np.arange(rows + 1))
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts), pa.scalar("\n", texts.type))
