"""What the tensors of a model's files are called in memory: transformers renames some of them as it loads a model.

The library says which: heads, wrapped decoders, mixtures of experts. Tensors that it joins or splits, such
as experts, keep the names that they have in files, within modules that have the names of memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tasks.tokenization.architecture import loader_of
from tasks.tokenization.model_config import does_not_load, read_config


def names_in_memory(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the names in memory of tensors in a model folder's files, by those that they have there.

    Raises:
        BadModel: the folder's configuration is of no model that transformers knows.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    config = read_config(folder)
    try:
        with torch.device("meta"):
            model = loader_of(config).from_config(config)
    except Exception as error:
        raise does_not_load(folder, error) from error
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return {name: apply_renamings(name, renamings) for name in names}
