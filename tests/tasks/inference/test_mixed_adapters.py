"""Several adapters in one pass: each row has the logits that it has with its adapter alone, whatever PEFT calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from flows.chat.adapter_pool import AdapterPool
from tasks.adapters.attach import attach, init_adapter, save_adapter
from tasks.inference.decoding import Asked, DecodingBatch, Together, Written, can_mix
from tasks.models.loader import load_model
from tests.helpers.rehearsal import ADAPTERS
from tests.helpers.samples import LORA, SFT, method

MIXED: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "dropout": 0.1},
    "ia3": ADAPTERS["ia3"],
    "loreft": ADAPTERS["loreft"],
    "noreft": {**ADAPTERS["noreft"], "positions": "f2+l1"},
    "houlsby": {"name": "bottleneck", "form": "houlsby", "reduction_factor": 4.0},
    "parallel": {"name": "bottleneck", "form": "parallel", "reduction_factor": 4.0},
}
ALONE = {
    "dora": ADAPTERS["dora"],
    "oft": ADAPTERS["oft"],
    "embeddings": {**LORA, "targets": ["embed_tokens", "q_proj"]},
}
PROMPTS = [(*range(20, 26 + n), 70 + n) for n in range(9)]


def folders_of(base: Path, folder: Path, adapters: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """Adapters with numbers of their own, by the names a.1, a.2, ..."""
    found = {}
    for number, adapter in enumerate(adapters, 1):
        torch.manual_seed(number)
        model = init_adapter(base, method(adapter, SFT).adapter)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        found[f"a.{number}"] = folder / f"a{number}"
        found[f"a.{number}"].mkdir()
        save_adapter(model, found[f"a.{number}"])
    return found


def pool_of(base: Path, folders: dict[str, Path]) -> AdapterPool:
    """A base with those adapters."""
    pool = AdapterPool(load_model(base))
    for name, folder in folders.items():
        pool.load(name, folder, any_base=True)
    return pool


def written(batch: DecodingBatch, asked: Sequence[Asked]) -> dict[int, list[Written]]:
    """What a batch writes, of requests that come two at a time."""
    found: dict[int, list[Written]] = {number: [] for number in range(len(asked))}
    waiting = list(enumerate(asked))
    while waiting or batch.going or batch.waiting:
        for number, each in waiting[:2]:
            batch.ask(number, each)
        waiting = waiting[2:]
        for number, told in batch.step():
            if isinstance(told, Written):
                found[number].append(told)
    return found


def same(told: Sequence[Written], expected: Sequence[Written]) -> None:
    """The same tokens, with the same log-probabilities but for rounding."""
    assert [each.token for each in told] == [each.token for each in expected]
    for one, other in zip(told, expected, strict=True):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)


@pytest.mark.parametrize("kind", [*MIXED, *ALONE])
def test_each_row_is_written_with_its_own_adapter(kind: str, pico_base: Path, tmp_path: Path) -> None:
    adapter = {**MIXED, **ALONE}[kind]
    folders = folders_of(pico_base, tmp_path, [adapter, adapter])
    pool = pool_of(pico_base, folders)
    uses: list[int] = []

    @contextmanager
    def counted(names: Sequence[str | None]) -> Iterator[Together]:
        with pool.together(names) as used:
            uses.append(len(used.inside))
            yield used

    asked = [Asked(p, 4, adapter=(None, *folders)[n % 3], logprobs=3) for n, p in enumerate(PROMPTS)]
    mixes = {can_mix(pool.together, name) for name in folders}
    assert mixes == {kind in MIXED}
    found = written(DecodingBatch(counted, [], rows=9, slab_rows=4), asked)
    assert max(uses) == (3 if kind in MIXED else 1)
    for number, each in enumerate(asked):
        bare: Any = load_model(pico_base)
        own = attach(bare, folders[each.adapter], any_base=True) if each.adapter else bare
        same(found[number], written(DecodingBatch(own, [], rows=1, slab_rows=1), [each._replace(adapter=None)])[0])
    assert len({tuple(each.token for each in told) for told in found.values()}) > 3


def test_one_pass_has_the_logits_of_pefts_mixed_batch(pico_base: Path, tmp_path: Path) -> None:
    folders = folders_of(pico_base, tmp_path, [LORA, {**LORA, "rank": 3}])
    prompts = [(5, 9, 2, 77), (5, 9, 2, 78), (31, 4, 8, 15)]
    pool = pool_of(pico_base, folders)
    asked = [Asked(p, 1, adapter=name, logprobs=5) for p, name in zip(prompts, (None, *folders), strict=True)]
    batch = DecodingBatch(pool.together, [], rows=3, slab_rows=3)
    for number, each in enumerate(asked):
        batch.ask(number, each)
    found = {number: told for number, told in batch.step() if isinstance(told, Written)}

    model = PeftModel.from_pretrained(load_model(pico_base), folders["a.1"], adapter_name="one").eval()
    model.load_adapter(folders["a.2"], adapter_name="two")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompts), adapter_names=["__base__", "one", "two"]).logits[:, -1]
    for number, expected in enumerate(logits.float().log_softmax(-1)):
        likeliest = expected.topk(5)
        assert [token for token, _ in found[number].top] == likeliest.indices.tolist()
        assert [p for _, p in found[number].top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_methods_are_mixed_but_for_two_that_replace_the_same_layers(pico_base: Path, tmp_path: Path) -> None:
    kinds = [LORA, ADAPTERS["loreft"], LORA, ADAPTERS["ia3"], MIXED["parallel"], ADAPTERS["dora"]]
    folders = folders_of(pico_base, tmp_path, kinds)
    pool = pool_of(pico_base, folders)
    names = [None, *folders]
    sizes = Counter[tuple[str | None, ...]]()
    left: list[str | None] = list(names)
    while left:
        with pool.together(left) as used:
            sizes[tuple(used.inside)] += 1
        left = [name for name in left if name not in used.inside]
    assert sizes == {(None, "a.1", "a.2", "a.3", "a.5"): 1, ("a.4",): 1, ("a.6",): 1}

    asked = [Asked(p, 3, adapter=names[n % 7], logprobs=3) for n, p in enumerate(PROMPTS)]
    found = written(DecodingBatch(pool.together, [], rows=9, slab_rows=4), asked)
    for number, each in enumerate(asked):
        bare: Any = load_model(pico_base)
        own = attach(bare, folders[each.adapter], any_base=True) if each.adapter else bare
        same(found[number], written(DecodingBatch(own, [], rows=1, slab_rows=1), [each._replace(adapter=None)])[0])
    pool.merge("a.1")
    with pool.together(["a.1", "a.3"]) as used:
        assert (pool.merged, set(used.inside)) == (None, {"a.1", "a.3"})
