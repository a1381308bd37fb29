r"""Regular expressions of expectations on RE2, which takes time linear in the text whatever the pattern.

Importing this module registers the conditions below with Great Expectations, in place of its own for pandas. Those run
many patterns in Python's engine, where a pattern such as `(\s+)+x` can take for ever on one text, and cannot be ended.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.metrics import ColumnMapMetricProvider, column_condition_partial

if TYPE_CHECKING:
    import pandas as pd

_registry = logging.getLogger("great_expectations.expectations.registry")
_level = _registry.level
_registry.setLevel(logging.ERROR)  # it warns of what is done here on purpose


def _contains(column: pd.Series[Any], pattern: str) -> pd.Series[bool]:
    """Return which texts a pattern matches somewhere."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.match_substring_regex(pa.array(column.astype(str), pa.large_string()), pattern=pattern)
    return pd.Series(found.to_numpy(zero_copy_only=False), index=column.index)


def _how_many(column: pd.Series[Any], patterns: Sequence[str]) -> pd.Series[int]:
    """Return how many of the patterns each text matches."""
    return sum((_contains(column, pattern).astype(int) for pattern in patterns[1:]), _contains(column, patterns[0]) + 0)


class MatchRegex(ColumnMapMetricProvider):  # type: ignore[misc]
    """A text that matches a pattern."""

    condition_metric_name = "column_values.match_regex"
    condition_value_keys = ("regex",)

    @column_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(self, column: pd.Series[Any], regex: str, **_: Any) -> pd.Series[bool]:
        return _contains(column, regex)


class NotMatchRegex(ColumnMapMetricProvider):  # type: ignore[misc]
    """A text that does not match a pattern."""

    condition_metric_name = "column_values.not_match_regex"
    condition_value_keys = ("regex",)

    @column_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(self, column: pd.Series[Any], regex: str, **_: Any) -> pd.Series[bool]:
        return ~_contains(column, regex)


class MatchRegexList(ColumnMapMetricProvider):  # type: ignore[misc]
    """A text that matches one of several patterns, or all of them."""

    condition_metric_name = "column_values.match_regex_list"
    condition_value_keys = ("regex_list", "match_on")

    @column_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(self, column: pd.Series[Any], regex_list: list[str], match_on: str, **_: Any) -> pd.Series[bool]:
        return _how_many(column, regex_list) >= (len(regex_list) if match_on == "all" else 1)


class NotMatchRegexList(ColumnMapMetricProvider):  # type: ignore[misc]
    """A text that matches none of several patterns."""

    condition_metric_name = "column_values.not_match_regex_list"
    condition_value_keys = ("regex_list",)

    @column_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(self, column: pd.Series[Any], regex_list: list[str], **_: Any) -> pd.Series[bool]:
        return _how_many(column, regex_list) == 0


_registry.setLevel(_level)
