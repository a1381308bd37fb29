"""Write docs/gpu_dtypes.md: what our own code asks a GPU to compute in 16 bits, and whether CUDA has it.

Trainings, evaluations and generation are rehearsed on a pretended device with a base in bf16 (tests/helpers/
rehearsal.py). What CUDA has is PyTorch's own word: its table of operations by which it tests itself (OpInfo), which
needs the package `expecttest`.

    pip install expecttest && python -m infra.make_gpu_dtypes
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "gpu_dtypes.md"
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

OTHER_NAMES = {"_to_copy": "to", "copy_": "to", "index": "__getitem__", "empty_strided": "empty"}
"""Operations that have another name in PyTorch's table."""

HEAD = """# Operations in 16 bits

Written by `python -m infra.make_gpu_dtypes`: every operation that temper's own code asks for in fp16 or bf16 in the
course of a training, an evaluation or a generation, and whether PyTorch's table of operations says that CUDA has it.
What transformers, PEFT and bitsandbytes ask for is theirs to test. A test refuses an operation that is not here.

| operation | fp16 | bf16 |
|---|---|---|
"""


def cuda_dtypes(names: Iterable[str]) -> dict[str, set[torch.dtype]]:
    """Return the types in which CUDA has operations, of those that PyTorch's table knows.

    Args:
        names: of ATen, such as `add_` or `index_select`.
    """
    from torch.testing._internal.common_methods_invocations import op_db

    known: dict[str, set[torch.dtype]] = {}
    for info in op_db:
        for name in (info.name, info.aten_name, info.name.rpartition(".")[2]):
            known[name] = known.get(name, set()) | set(info.dtypesIfCUDA)
    wanted = {name: OTHER_NAMES.get(name, name) for name in names}
    wanted = {name: other if other in known else other.removesuffix("_") for name, other in wanted.items()}
    return {name: known.get(other, set()) for name, other in wanted.items()}


def table(names: Iterable[str]) -> str:
    """Format the table of operations.

    Raises:
        SystemExit: CUDA lacks one of them.
    """
    dtypes = cuda_dtypes(sorted(names))
    lacking = [
        f"{name} in {short}" for name, has in dtypes.items() for short, dtype in TYPES.items() if dtype not in has
    ]
    if lacking:
        raise SystemExit(f"CUDA lacks, by PyTorch's table: {', '.join(lacking)}")
    return HEAD + "".join(f"| `{name}` | yes | yes |\n" for name in dtypes)


def main() -> None:
    """Rehearse, and write the table."""
    from tasks.base.pretraining import new_model
    from tasks.tokenization.chat_template import load_tokenizer
    from tests.helpers.rehearsal import own_operations
    from tests.helpers.samples import pretrain_params

    os.environ["TEMPER_COMPUTE_DTYPE"] = "bfloat16"
    tokenizer = load_tokenizer(ROOT / "models" / "tiny")
    with TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        new_model(pretrain_params(context_tokens=128), tokenizer).to(torch.bfloat16).save_pretrained(base)  # type: ignore[arg-type]
        tokenizer.save_pretrained(base)
        TABLE.write_text(table(own_operations(base, Path(folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
