"""Rendered rows in the buffers of their columns: chats are read by decoders, pairs by encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar, overload

from tasks.core.errors import BadData
from tasks.core.parquet import read_table
from tasks.inference.encoder_decoder import PairRow
from tasks.inference.rows import TokenRow
from tasks.tokenization.architecture import DECODER, Architecture

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


Row: TypeAlias = "TokenRow | PairRow"
"""What a model is scored on."""

T_co = TypeVar("T_co", covariant=True)


class ListColumn(NamedTuple):
    """A column of lists: all their `values` (tokens,), int32 or bool, and where each begins and ends, (rows + 1,)."""

    values: np.ndarray[Any, Any]
    bounds: np.ndarray[Any, Any]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> ListColumn:
        """Take a column over; ids are not copied where it is of one piece."""
        import numpy as np

        chunks = column.chunks
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        sizes = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
        bounds = np.concatenate([[0], *sizes]).cumsum(dtype=np.int64)
        return cls(parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts]), bounds)

    def lengths(self) -> np.ndarray[Any, Any]:
        """Count the values of each row, (rows,) int64."""
        lengths: np.ndarray[Any, Any] = self.bounds[1:] - self.bounds[:-1]
        return lengths

    def row(self, number: int) -> list[Any]:
        """Make the list of one row."""
        row: list[Any] = self.values[self.bounds[number] : self.bounds[number + 1]].tolist()
        return row


class RenderedRows(Sequence[T_co], Generic[T_co]):
    """Rows in the buffers of their columns, about 5 bytes a token; each is made anew whenever it is asked for.

    `make` says what is made of a row's values by name; a slice shares the buffers.
    """

    def __init__(
        self,
        columns: Mapping[str, ListColumn | Sequence[Any]],
        make: Callable[[dict[str, Any]], T_co],
        chosen: range,
    ) -> None:
        self._columns, self._make, self._chosen = columns, make, chosen

    @classmethod
    def read(cls, path: Path, make: Callable[[dict[str, Any]], T_co]) -> RenderedRows[T_co]:
        """Read a Parquet file that the stage `render` wrote."""
        import pyarrow as pa

        table = read_table(path)
        columns = {
            name: ListColumn.of(table[name]) if pa.types.is_list(table[name].type) else table[name].to_pylist()
            for name in table.column_names
        }
        return cls(columns, make, range(len(table)))

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, place: int) -> T_co: ...

    @overload
    def __getitem__(self, place: slice) -> RenderedRows[T_co]: ...

    def __getitem__(self, place: int | slice) -> T_co | RenderedRows[T_co]:
        if isinstance(place, slice):
            return RenderedRows(self._columns, self._make, self._chosen[place])
        number = self._chosen[place]
        return self._make(
            {
                name: column.row(number) if isinstance(column, ListColumn) else column[number]
                for name, column in self._columns.items()
            }
        )

    def column(self, name: str) -> list[Any]:
        """Give the values of a column that holds no lists."""
        values = self._columns[name]
        return [values[number] for number in self._chosen]

    def lengths(self) -> dict[str, list[int]]:
        """Count the ids of each row, by the columns that hold such."""
        columns = {name: column for name, column in self._columns.items() if isinstance(column, ListColumn)}
        return {
            name: column.lengths()[self._chosen.start : self._chosen.stop : self._chosen.step].tolist()
            for name, column in columns.items()
            if name != "mask"
        }


def row_of(rendered: Mapping[str, Any]) -> Row:
    """Build the row that a model is scored on from one of chat.parquet or pair.parquet, detected by its columns."""
    if "target_ids" in rendered:
        return PairRow(rendered["input_ids"], rendered["target_ids"])
    return TokenRow(rendered["ids"], rendered["mask"], rendered["prompt_tokens"])


def read_questions(rendered: Path, architecture: Architecture) -> RenderedRows[dict[str, Any]]:
    """Held-out rows to answer: chats of a decoder, or where there are none, pairs' prompts with their chosen replies.

    Raises:
        BadData: there are no such rows.
    """
    folder = rendered / "held_out"
    rows = RenderedRows.read(folder / f"{architecture.rows}.parquet", dict)
    if not rows and architecture is DECODER:
        rows = RenderedRows.read(folder / "preference.parquet", _chosen_reply)
    if not rows:
        raise BadData(
            f"holds no {architecture.rows} rows to evaluate on, which a model of the kind {architecture.name} answers",
            where=str(folder),
            fix="raise render.held_out",
        )
    return rows


def _chosen_reply(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "family": row["family"],
        "ids": row["prompt_ids"] + row["chosen_ids"],
        "mask": [False] * len(row["prompt_ids"]) + [True] * len(row["chosen_ids"]),
        "prompt_tokens": len(row["prompt_ids"]),
    }


def last_turn(row: Mapping[str, Any]) -> int:
    """Return where the last scored turn of a rendered chat begins: what stands before is the prompt."""
    mask: list[bool] = row["mask"]
    start = len(mask) - 1 - mask[::-1].index(True)
    while start > 0 and mask[start - 1]:
        start -= 1
    return start
