"""Continuations written together, against transformers' `generate` of each prompt alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.adapters.attach import make_trainable
from tasks.core.errors import BadData
from tasks.inference import decoding
from tasks.inference.decoding import Asked, DecodingBatch, Ended, Written, bytes_per_token, can_decode
from tasks.inference.params import GREEDY, Generation
from tasks.inference.prefix_sharing import cached_hidden
from tasks.inference.sampling import decoding as processors_of
from tests.helpers.samples import LEARNT_PROMPTS, SFT, method
from tests.tasks.inference.test_prefix_sharing import ADAPTERS, FAMILIES, model_of

END = 7
DRAWN = Generation(temperature=1.2, top_k=30, top_p=0.9, repetition_penalty=1.3, repetition_range=6, seed=4)


def lively(family: str = "Llama", adapter: str | None = None, **changes: Any) -> Any:
    """A model whose texts wander: its weights are larger than those that training begins from."""
    model = model_of(family, adapter, **changes).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "wte" not in name and "reft" not in name:
                weight *= 6
    return model


def prompts(count: int = 9, longest: int = 14, vocabulary: int = 120) -> list[tuple[int, ...]]:
    draw = random.Random(5)
    return [tuple(draw.randrange(8, vocabulary) for _ in range(draw.randint(1, longest))) for _ in range(count)]


def alone(model: Any, asked: Asked) -> list[int]:
    """What `generate` writes after the prompt."""
    ids = torch.tensor([asked.prompt])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.max_tokens,
            eos_token_id=END,
            pad_token_id=0,
            **processors_of(model, asked.generation, [asked.prompt], start=len(asked.prompt)),
        )
    written: list[int] = made[0, len(asked.prompt) :].tolist()
    return written


def together(batch: DecodingBatch, asked: Sequence[Asked]) -> tuple[dict[int, list[Written]], dict[int, str]]:
    for number, each in enumerate(asked):
        batch.ask(number, each)
    written: dict[int, list[Written]] = {number: [] for number in range(len(asked))}
    ends: dict[int, str] = {}
    while batch.going or batch.waiting:
        for number, told in batch.step():
            if isinstance(told, Ended):
                ends[number] = told.reason
            else:
                assert number not in ends
                written[number].append(told)
    return written, ends


def tokens(written: dict[int, list[Written]]) -> list[list[int]]:
    return [[each.token for each in written[number]] for number in sorted(written)]


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_that_of_its_prompt_alone(family: str, adapter: str | None) -> None:
    model = lively(family, adapter)
    asked = [Asked(prompt, 3 + 4 * (number % 6)) for number, prompt in enumerate(prompts())]
    assert can_decode(model, 40)
    written, ends = together(DecodingBatch(model, [END], rows=4, slab_rows=3), asked)
    expected = [alone(model, each) for each in asked]
    assert tokens(written) == expected
    assert len({tuple(text) for text in expected}) > len(expected) // 2
    assert ends == {n: "stop" if text[-1] == END else "length" for n, text in enumerate(expected)}


def test_texts_end_at_any_of_some_tokens_which_is_written() -> None:
    model, asked = lively(), [Asked(prompt, 30) for prompt in prompts(20)]
    ends = range(0, 120, 6)
    written, reasons = together(DecodingBatch(model, ends, rows=6, slab_rows=2), asked)
    for number, text in enumerate(tokens(written)):
        whole = alone(model, asked[number])
        first = next((place for place, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert text == whole[: first + 1]
    assert set(reasons.values()) == {"stop", "length"} or set(reasons.values()) == {"stop"}


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_drawn_text_is_a_function_of_its_seed_and_prompt(rows: int) -> None:
    model = lively()
    ways = [DRAWN, DRAWN.model_copy(update={"seed": 9}), GREEDY, Generation(temperature=1.0, seed=2)]
    asked = [Asked(prompt, 12, way) for prompt in prompts(4) for way in ways]
    written, _ = together(DecodingBatch(model, [END], rows=rows, slab_rows=4), asked)
    assert tokens(written) == [alone(model, each) for each in asked]


def test_common_beginnings_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passed = lively(), list[int]()

    def counted(base: Any, ids: Tensor, *more: Any) -> Tensor:
        passed.append(ids.shape[1])
        return cached_hidden(base, ids, *more)

    assert can_decode(model, 80)
    system = tuple(range(10, 50))
    asked = [Asked((*system, number), 4) for number in range(60, 66)]
    expected = [alone(model, each) for each in asked]
    monkeypatch.setattr(decoding, "cached_hidden", counted)
    batch = DecodingBatch(model, [END], rows=2, slab_rows=4)
    assert tokens(together(batch, asked[:1])[0]) == expected[:1]
    assert passed[0] == len(system) + 1
    passed.clear()
    assert tokens(together(batch, asked)[0]) == expected
    assert sum(passed) == sum(map(len, expected))  # of each prompt its last token alone
    passed.clear()
    going_on = Asked((*asked[-1].prompt, *expected[-1], 70, 71, 72), 5)
    written, _ = together(batch, [going_on])
    assert tokens(written) == [alone(model, going_on)]
    assert passed[0] == 4  # the last one written, whose keys and values nobody needed, and what was said to it


def test_edits_are_those_of_the_own_prompt_where_prompts_begin_alike() -> None:
    model = lively(adapter="loreft both ends")
    asked = [Asked((*range(10, 50), *range(60, 60 + more)), 6) for more in (1, 2, 3)]
    written, _ = together(DecodingBatch(model, [END], rows=3, slab_rows=4), [*asked, *asked])
    assert tokens(written) == [alone(model, each) for each in asked] * 2


def test_memory_keeps_within_its_bound_and_rows_wait_for_it() -> None:
    model = lively()
    most = bytes_per_token(model) * 64 * 5
    assert bytes_per_token(model) == 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads of them, width, float32
    batch = DecodingBatch(model, [END], rows=32, slab_rows=8, cache_bytes=most)
    asked = [Asked(prompt, 20 + 30 * (number % 3)) for number, prompt in enumerate(prompts(14))]
    for number, each in enumerate(asked):
        batch.ask(number, each)
    written: dict[int, list[int]] = {number: [] for number in range(14)}
    at_once = 0
    while batch.going or batch.waiting:
        for number, told in batch.step():
            if isinstance(told, Written):
                written[number].append(told.token)
        assert batch.cache.bytes <= most
        at_once = max(at_once, batch.going)
    assert list(written.values()) == [alone(model, each) for each in asked]
    assert 1 < at_once <= 5
    with pytest.raises(BadData, match="longer than the memory for keys and values allows"):
        batch.ask(99, Asked((8,), 5 * 64))


@pytest.mark.parametrize("adapter", [None, "loreft both ends"])
@pytest.mark.parametrize("slabs", [1, 3, 1000])
def test_rows_get_room_as_they_go_on_and_wait_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, slabs: int, adapter: str | None
) -> None:
    monkeypatch.setattr(decoding, "AHEAD", 4)
    model = lively(adapter=adapter)
    ways = [GREEDY, Generation(temperature=1.0, seed=2)]
    asked = [Asked(prompt, 120, ways[number % 2]) for number, prompt in enumerate(prompts(6, longest=60))]
    most = slabs * 256 * bytes_per_token(model)
    batch = DecodingBatch(model, [], rows=4, slab_rows=2, cache_bytes=most)
    written, _ = together(batch, asked)
    for text, each in zip(tokens(written), asked, strict=True):
        expected = alone(model, each)
        assert text[: len(expected)] == expected  # which END may end
    assert {len(text) for text in tokens(written)} == {120}
    assert batch.cache.bytes <= most


def test_rows_that_leave_disturb_nobody() -> None:
    model = lively()
    asked = [Asked(prompt, 16) for prompt in prompts(12)]
    batch, written = DecodingBatch(model, [END], rows=6, slab_rows=4), dict[int, list[int]]()
    for number, each in enumerate(asked):
        batch.ask(number, each)
    for step in range(100):
        for number, told in batch.step():
            if isinstance(told, Written):
                written.setdefault(number, []).append(told.token)
        for number in {2: (0, 11), 5: (3,), 6: (4, 99)}.get(step, ()):
            batch.leave(number)
    assert not batch.going
    expected = [alone(model, each) for each in asked]
    for number, text in enumerate(expected):
        kept = written.get(number, [])
        assert kept == text[: {0: 3, 3: 6, 4: 7, 11: 0}.get(number, 16)]


def test_log_probabilities_are_the_model_s_own() -> None:
    model, prompt = lively(), prompts()[3]
    written, _ = together(DecodingBatch(model, [END], rows=4, slab_rows=4), [Asked(prompt, 6, DRAWN, logprobs=3)])
    text = [each.token for each in written[0]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    for place, each in enumerate(written[0]):
        assert each.logprob == pytest.approx(logp[place, each.token].item(), abs=1e-4)
        best = logp[place].topk(3)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


class Only:
    """Tokens that are even and odd by turns."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> Tensor:
        return torch.arange(120) % 2 == len(self.taken) % 2

    def take(self, token: int) -> None:
        self.taken.append(token)


def test_a_constraint_rules_tokens_out_of_one_row_alone() -> None:
    model, first = lively(), prompts()
    only = Only()
    asked = [Asked(first[0], 8), Asked(first[0], 8, constraint=only, logprobs=0), Asked(first[1], 8)]
    written, _ = together(DecodingBatch(model, [], rows=4, slab_rows=4), asked)
    text = [each.token for each in written[1]]
    assert only.taken == text
    assert [token % 2 for token in text] == [0, 1] * 4
    ids = list(first[0])
    for each in written[1]:  # the likeliest of those that were allowed, told with the probability that it has of all
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        some = torch.arange(120)[torch.arange(120) % 2 == (len(ids) - len(first[0])) % 2]
        assert each.token == some[logp[some].argmax()]
        assert each.logprob == pytest.approx(logp[each.token].item(), abs=1e-4)
        ids.append(each.token)
    assert tokens(written)[0] == alone(model, asked[0])[: len(tokens(written)[0])]


@pytest.mark.parametrize(
    ("changes", "adapter"),
    [
        ({"sliding_window": 16}, None),
        ({}, LEARNT_PROMPTS["prompt_tuning"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, None),
    ],
)
def test_what_cannot_stand_beside_other_rows_is_told(changes: dict[str, Any], adapter: Any) -> None:
    rope = changes.get("rope_parameters")
    if rope:
        changes = {"rope_parameters": {**rope, "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 32}
    model = lively("Mistral" if "sliding_window" in changes else "Llama", **changes)
    if adapter:
        model = make_trainable(model, method(adapter, SFT).adapter)
    assert not can_decode(model, 40)
    assert can_decode(model, 12) is (adapter is None)


def test_bottlenecks_stand_beside_other_rows() -> None:
    model = make_trainable(
        lively(), method({"name": "bottleneck", "form": "parallel", "reduction_factor": 4.0}, SFT).adapter
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    asked = [Asked(prompt, 8) for prompt in prompts()]
    written, _ = together(DecodingBatch(model, [END], rows=4, slab_rows=4), asked)
    assert tokens(written) == [alone(model, each) for each in asked]
