"""Prompts that are nearly equal, put into one group: the split then never parts them.

Where near duplicates are asked for, a prompt that differs from another in a word is the same question, and would leak
from the rows to learn from into those that are held out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.records import normalized_text
from tasks.text.words import near_form, words_of
from tasks.validate.duplicates import NearIndex
from tasks.validate.params import Validate
from tasks.validate.row_features import prompts_of

if TYPE_CHECKING:
    import pyarrow as pa

NEAR = "≈ "
"""What the name of a group begins with that was made of near-equal prompts, and not stated by a row."""


def group_near_prompts(tables: dict[str, pa.Table], params: Validate) -> int:
    """Name the group of rows whose prompts are nearly equal to another's; rows that state a group keep that.

    Args:
        tables: the rows of each kind; the column `group` is changed in here.
        params: whether near duplicates are looked for, and what they are.

    Returns:
        How many prompts fell into the group of another.
    """
    import pyarrow as pa

    if params.duplicates.near == "ignore":
        return 0
    prompts = {kind: [normalized_text(text) for text in prompts_of(table, kind)] for kind, table in tables.items()}
    stated = {kind: table["group"].to_pylist() for kind, table in tables.items()}
    names = list(
        dict.fromkeys(
            p for kind in tables for p, group in zip(prompts[kind], stated[kind], strict=True) if p and not group
        )
    )
    settings = params.duplicates
    index = NearIndex(settings.similarity, settings.permutations, settings.bands)
    texts = pa.array(names, pa.large_string())
    index.add(words_of(near_form(texts)), len(names))
    suspects = index.suspects()
    near = index.duplicates(suspects.tolist(), words_of(near_form(texts.take(pa.array(suspects, pa.int64())))))
    group_of = {names[place]: NEAR + names[each.kept] for each in near for place in (each.row, each.kept)}
    for kind, table in tables.items():
        groups = [group or group_of.get(prompt, "") for group, prompt in zip(stated[kind], prompts[kind], strict=True)]
        place = table.schema.get_field_index("group")
        tables[kind] = table.set_column(place, table.schema.field(place), pa.array(groups, pa.string()))
    return len(near)
