"""Requests of many threads to one engine, against each of them alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch

from flows.chat.adapter_pool import AdapterPool
from tasks.adapters.attach import attach, init_adapter, make_trainable, save_adapter
from tasks.inference import continuous_batching
from tasks.inference.continuous_batching import Busy, ContinuousBatching
from tasks.inference.decoding import Asked, Ended, Written, can_decode
from tasks.inference.params import GREEDY
from tasks.models.loader import load_model
from tests.helpers.rehearsal import trained_by
from tests.helpers.samples import LEARNT_PROMPTS, SFT, method
from tests.tasks.inference.test_decoding import DRAWN, END, Only, alone, lively, prompts


class Listener:
    """A caller that waits for the end."""

    def __init__(self) -> None:
        self.told: Queue[Written | Ended] = Queue()

    def __call__(self, told: Written | Ended) -> None:
        self.told.put(told)

    def text(self) -> tuple[list[int], Ended]:
        tokens = list[int]()
        while isinstance(told := self.told.get(timeout=120), Written):
            tokens.append(told.token)
        return tokens, told


@contextmanager
def engine_of(model: Any, **settings: Any) -> Iterator[ContinuousBatching]:
    engine = ContinuousBatching(model, [END], **{"slots": 4, "cache_bytes": 1 << 22, **settings})
    try:
        yield engine
    finally:
        engine.close(finish=False)


def ask(engine: ContinuousBatching, asked: Asked) -> tuple[list[int], Ended]:
    listener = Listener()
    engine.submit(asked, listener)
    return listener.text()


def test_many_callers_get_what_each_gets_alone() -> None:
    model = lively()
    asked = [Asked(prompt, 4 + n % 9, GREEDY if n % 3 else DRAWN) for n, prompt in enumerate(prompts(24))]
    expected = [alone(model, each) for each in asked]
    with engine_of(model) as engine, ThreadPoolExecutor(12) as callers:
        found = list(callers.map(lambda each: ask(engine, each), asked))
        state = engine.state()
    assert [text for text, _ in found] == expected
    assert [end.reason for _, end in found] == ["stop" if text[-1] == END else "length" for text in expected]
    assert state.tokens == sum(map(len, expected))
    assert (state.running, state.waiting) == (0, 0)
    assert 0 < state.cache_bytes <= state.most_cache_bytes


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix"])
def test_what_cannot_stand_beside_others_is_written_after_them(kind: str) -> None:
    torch.manual_seed(1)
    model = make_trainable(lively(), method(LEARNT_PROMPTS[kind], SFT).adapter).eval()
    asked = [Asked(prompt, 6, logprobs=2) for prompt in prompts(4)]
    with engine_of(model) as engine, ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda each: ask(engine, each)[0], asked))
        constrained = ask(engine, asked[0]._replace(constraint=Only()))[0]
    assert found == [alone(model, each) for each in asked]
    assert [token % 2 for token in constrained] == [0, 1, 0, 1, 0, 1][: len(constrained)]


def test_several_adapters_answer_beside_each_other(pico_base: Path, tmp_path: Path) -> None:
    names, folders = ["lora", "loreft", "bottleneck"], dict[str, Path]()
    for name in names:
        torch.manual_seed(3)
        model = init_adapter(pico_base, trained_by(name, "sft").adapter)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folders[name] = tmp_path / name
        folders[name].mkdir()
        save_adapter(model, folders[name])
    pool = AdapterPool(load_model(pico_base))
    for name, folder in folders.items():
        pool.load(name, folder, any_base=True)

    asked = [Asked((*range(20, 60), 70 + n), 5, adapter=name) for n in range(3) for name in (None, *names)]
    with engine_of(pool.together, slots=8) as engine, ThreadPoolExecutor(12) as callers:
        found = list(callers.map(lambda each: ask(engine, each)[0], asked))
    for each, text in zip(asked, found, strict=True):
        bare = load_model(pico_base)
        own = attach(bare, folders[each.adapter], any_base=True) if each.adapter else bare
        assert text == alone(own, each), each.adapter
    assert len({tuple(text) for text in found}) > 3


def test_a_dropped_request_ends_and_the_others_go_on() -> None:
    model = lively()
    first, second = Listener(), Listener()
    one, two = (Asked(prompt, 60) for prompt in prompts(2, vocabulary=60))
    with engine_of(model) as engine:
        engine._end_ids = engine._end_ids - {END}
        handle = engine.submit(one, first)
        engine.submit(two, second)
        assert isinstance(first.told.get(timeout=60), Written)
        handle.cancel()
        handle.cancel()
        tokens, end = first.text()
        assert end == Ended("cancelled")
        assert len(tokens) < 59
        assert second.text()[1].reason == "length"
        assert engine.state().running == 0
        handle.cancel()


def test_more_than_may_wait_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, goes = lively(), threading.Event()
    monkeypatch.setattr(continuous_batching, "can_decode", lambda *given: goes.wait(60) and can_decode(*given))
    listeners = [Listener() for _ in range(3)]
    with engine_of(model, queue=3) as engine:
        for listener in listeners:
            engine.submit(Asked((9,), 2), listener)
        with pytest.raises(Busy, match="too many requests wait") as busy:
            engine.submit(Asked((9,), 2), Listener())
        assert busy.value.retry_after_s > 0
        goes.set()
        assert {listener.text()[1].reason for listener in listeners} <= {"length", "stop"}
        assert ask(engine, Asked((9,), 2))[1].reason in ("length", "stop")


def test_an_error_is_told_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively()
    with engine_of(model) as engine:
        expected = ask(engine, Asked((9, 10), 4))
        with monkeypatch.context() as broken:
            broken.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
            tokens, end = ask(engine, Asked((9, 10), 4))
            assert not tokens
            assert isinstance(end.error, ZeroDivisionError)
        refused = ask(engine, Asked((9, 10), 1 << 20))[1]
        assert refused.reason == "error"
        assert "memory for keys and values" in str(refused.error)
        assert ask(engine, Asked((9, 10), 4)) == expected


@pytest.mark.parametrize("finish", [True, False])
def test_an_end_waits_for_answers_or_drops_them(finish: bool) -> None:
    engine, listeners = ContinuousBatching(lively(), [], slots=2, cache_bytes=1 << 22), [Listener() for _ in range(4)]
    for listener in listeners:
        engine.submit(Asked((9, 11), 40), listener)
    engine.close(finish=finish)
    ends = [listener.text() for listener in listeners]
    if finish:
        assert [(len(text), end.reason) for text, end in ends] == [(40, "length")] * 4
    else:
        assert "cancelled" in {end.reason for _, end in ends}
    with pytest.raises(Busy):
        engine.submit(Asked((9,), 1), Listener())
