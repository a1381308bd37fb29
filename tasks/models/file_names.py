"""What the tensors of a model's files are called in memory: transformers renames some of them as it loads a model.

The library says which: heads, wrapped decoders, mixtures of experts. A tensor that it cuts into equal parts has a name
for each. Tensors that it joins, or splits otherwise, such as experts, keep the names that they have in files, within
modules that have the names of memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.tokenization.architecture import outline_of
from tasks.tokenization.model_config import does_not_load, read_config


def names_in_memory(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names in memory of tensors in a model folder's files, by those that they have there.

    Where there are several for one tensor, they are those of as many equal parts of its rows.

    Raises:
        BadModel: the folder's configuration is of no model that transformers knows.
    """
    from transformers.core_model_loading import apply_renamings

    renamings, cuts = _conversions(folder, (folder / "config.json").read_bytes())
    found = {}
    for name in names:
        renamed = apply_renamings(name, renamings)
        pattern, parts = next(((pattern, parts) for pattern, parts in cuts if re.search(pattern, renamed)), ("", ()))
        found[name] = tuple(re.sub(pattern, part, renamed) for part in parts) or (renamed,)
    return found


@lru_cache(2)
def _conversions(folder: Path, config_bytes: bytes) -> tuple[list[Any], list[tuple[str, Sequence[str]]]]:
    """Return what renames tensors, and what cuts them: patterns with the names of the parts.

    Raises:
        BadModel: the folder's configuration is of no model that transformers knows.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    config = read_config(folder)
    try:
        with torch.device("meta"):
            model = outline_of(config)
    except Exception as error:
        raise does_not_load(folder, error) from error
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    return renamings, [(each.source_patterns[0], each.target_patterns) for each in conversions if _cuts_rows(each)]


def _cuts_rows(conversion: Any) -> bool:
    """Return whether a conversion cuts one tensor into equal parts of its rows, and does no more."""
    from transformers.core_model_loading import Chunk, WeightConverter

    if not isinstance(conversion, WeightConverter) or len(conversion.source_patterns) > 1:
        return False
    cuts = [each for each in conversion.operations if isinstance(each, Chunk) and each.num_shards_attribute is None]
    return len(cuts) == len(conversion.operations) == 1 and cuts[0].dim == 0
