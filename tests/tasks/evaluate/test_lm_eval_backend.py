"""Our model for lm-eval against lm-eval's own, in float32: the same log-probabilities, verdicts and answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tasks.adapters.attach import make_trainable
from tasks.adapters.prompt_tuning import virtual_tokens
from tasks.adapters.reft.prompt_positions import prompts_of
from tasks.core.errors import BadData, BadParams
from tasks.core.progress import Progress
from tasks.evaluate import lm_eval_backend
from tasks.evaluate.continuation_scores import Continuation, score_continuations
from tasks.evaluate.lm_eval_backend import asked_generation, language_model
from tasks.inference.continuations import StopTexts
from tasks.inference.params import GREEDY, Generation
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer
from tasks.tokenization.tokenizer import read_tokenizer
from tests.helpers.encoder_decoders import make_base
from tests.helpers.samples import LEARNT_PROMPTS, LORA, LOREFT, QLORA, SFT, method

WORDS = "One day a little cat and the big dog went to play in park, they saw Tom. She was happy! 猫 和 狗"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTNeoX": {},
    "Mistral": {"sliding_window": 16},  # from here on rows cannot be joined
    "Gemma2": {"sliding_window": 8},
    "Bloom": {"n_layer": 2, "n_head": 4},
}
Pair = tuple[str, str]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """lm-eval tells of every row that it cuts."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def pico(pico_base: Path) -> Any:
    """A random Llama that reads 256 tokens."""
    return load_model(pico_base, full_precision=True)


@pytest.fixture(scope="module")
def stories(real_data: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A Llama that writes stories; it reads 512 tokens, and its tokenizer puts a token before every text."""
    folder = real_data / "stories260k" / "hf"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), read_tokenizer(folder)


def text(random: Random, words: int) -> str:
    return " ".join(random.choices(WORDS.split(), k=words))


def questions(random: Random, count: int, longest: int) -> list[list[Pair]]:
    """Contexts with four endings and more: of every length, some alike, some the beginning of others, some tied."""
    made = []
    shots = text(random, 12) + "\n\n"
    for number in range(count):
        words = longest * 2 if number % 10 == 9 else random.randint(1, longest // 4)
        context = (shots if number % 3 == 1 else "") + text(random, words) + random.choice(["", " ", "\n", "..."])
        context = "" if number % 8 == 7 else context
        endings = [random.choice([" ", ""]) + text(random, random.randint(1, 9)) for _ in range(3)]
        endings += [endings[0] + " " + text(random, 2), endings[1], " A", " B", random.choice("abcd")]
        made.append([(context, ending) for ending in endings])
    return made


def asked(pairs: Sequence[Any], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


def stock(model: Any, tokenizer: Any, **more: Any) -> Any:
    return HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4, "backend": "causal", **more})


def ours(model: Any, tokenizer: Any, **more: Any) -> Any:
    return language_model(model, tokenizer, **{"batch_size": 4, "generation": GREEDY, **more})


def agree(mine: Any, theirs: Any, groups: Sequence[Sequence[Pair]]) -> int:
    """Fails unless all is the same; returns how many endings are what greedy decoding writes."""
    requests = asked([pair for group in groups for pair in group])
    found, expected = mine.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    at = 0
    for group in groups:
        scores, right = found[at : at + len(group)], expected[at : at + len(group)]
        for pair, (logp, greedy), (their_logp, their_greedy) in zip(group, scores, right, strict=True):
            tokens = len(theirs.tok_encode(pair[0] + pair[1])) - len(theirs.tok_encode(pair[0]))
            assert logp == pytest.approx(their_logp, abs=1e-4 * max(1, tokens)), pair
            assert greedy == their_greedy, pair
        best = [max(range(len(each)), key=lambda n: each[n][0]) for each in (scores, right)]
        assert scores[best[0]][0] == pytest.approx(scores[best[1]][0], abs=1e-6)
        at += len(group)
    return sum(greedy for _, greedy in expected)


def with_greedy_endings(model: Any, tokenizer: Any, groups: list[list[Pair]]) -> list[list[Pair]]:
    """The same questions, each with what the model itself would write."""
    theirs = stock(model, tokenizer)
    requests = asked([(group[0][0] or "cat", {"until": [], "max_gen_toks": 5}) for group in groups], "generate_until")
    answers = theirs.generate_until(requests, disable_tqdm=True)
    return [
        [*group, (group[0][0] or "cat", answer)] if answer else group
        for group, answer in zip(groups, answers, strict=True)
    ]


def test_a_real_model_scores_hundreds_of_endings_as_in_lm_eval(
    stories: tuple[Any, PreTrainedTokenizerBase], random: Random
) -> None:
    groups = with_greedy_endings(*stories, questions(random, 60, 250))
    groups.append([("<s> One day", " a cat"), ("", "<s> One day"), ("", "One"), ("<s>", " One")])
    assert sum(map(len, groups)) > 480
    assert agree(ours(*stories), stock(*stories), groups) > 5


@pytest.mark.parametrize("rows", [1, 3])
def test_texts_cut_in_another_way_before_an_ending_keep_lm_evals_tokens(
    monkeypatch: pytest.MonkeyPatch, pico: Any, tokenizer: PreTrainedTokenizerBase, random: Random, rows: int
) -> None:
    """The random model, whose tokenizer merges letters across the border; some requests at a time."""
    groups = with_greedy_endings(pico, tokenizer, questions(random, 30, 100))
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    merged = [w for w in words if len(tokenizer.tokenize(f"a {w}")) < len(tokenizer.tokenize(f"a {w[0]}")) + 2]
    assert len(merged) >= 5
    groups += [
        [(f"a {word[0]}", f"{word[1:]}s a dog"), (f"a {word[0]}", f"{word[1:]} dog"), (f"{word}  ", " a")]
        for word in merged[:20]
    ]
    monkeypatch.setattr(lm_eval_backend, "REQUESTS", 50 * rows)
    assert agree(ours(pico, tokenizer), stock(pico, tokenizer), groups) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_as_in_lm_eval(tokenizer: PreTrainedTokenizerBase, random: Random, family: str) -> None:
    torch.manual_seed(0)
    shape = {**SMALL, "vocab_size": len(tokenizer), "pad_token_id": 0, **FAMILIES[family]}
    if family in ("GPT2", "Bloom"):
        shape = {name: value for name, value in shape.items() if name not in SMALL} | {"hidden_size": 32}
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**shape)).eval()
    agree(ours(model, tokenizer), stock(model, tokenizer), questions(random, 10, 60))
    texts = asked([(text(random, n),) for n in (1, 5, 200)], "loglikelihood_rolling")
    found = ours(model, tokenizer).loglikelihood_rolling(texts)
    assert found == pytest.approx(stock(model, tokenizer).loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-5)


ADAPTERS: dict[str, dict[str, Any]] = {"lora": LORA, **LEARNT_PROMPTS}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_scored_as_in_lm_eval(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, random: Random, name: str
) -> None:
    model = make_trainable(load_model(pico_base, full_precision=True), method(ADAPTERS[name], SFT).adapter).eval()
    moved(model)
    agree(
        ours(model, tokenizer),
        stock(model, tokenizer, max_length=256 - virtual_tokens(model)),
        questions(random, 10, 50),
    )


def test_a_4_bit_base_with_an_adapter_is_scored_as_in_lm_eval(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, random: Random
) -> None:
    adapter: Any = method({**QLORA, "compute_dtype": "float32"}, SFT).adapter
    model = make_trainable(load_model(pico_base, adapter.base_quantization), adapter).float().eval()
    moved(model)
    agree(ours(model, tokenizer), stock(model, tokenizer), questions(random, 10, 40))


@pytest.mark.parametrize("positions", ["last", "f2+l3", "all"])
def test_edits_of_prompts_are_made_on_contexts_as_when_each_row_is_alone(
    pico_base: Path, random: Random, positions: str
) -> None:
    """lm-eval does not say where a prompt ends, and takes the ending for a part of it."""
    adapter = method({**LOREFT, "positions": positions}, SFT).adapter
    model = make_trainable(load_model(pico_base, full_precision=True), adapter).eval()
    moved(model)
    shots = random.choices(range(5, 300), k=20)
    contexts = [shots + random.choices(range(5, 300), k=k) for k in (1, 9, 9, 30)] + [shots, shots[:5]]
    endings = [Continuation(c, random.choices(range(5, 300), k=k)) for c in contexts for k in (1, 4, 7)]
    prompts: Any = prompts_of(model)
    for ending, found in zip(endings, score_continuations(model, endings), strict=True):
        with torch.no_grad(), prompts.given(torch.tensor([len(ending.context)])):
            logits = model(input_ids=torch.tensor([[*ending.context, *ending.tokens]])).logits[0]
        logp = logits.log_softmax(1)[len(ending.context) - 1 : -1].gather(1, torch.tensor(ending.tokens)[:, None])
        assert found.logp == pytest.approx(logp.sum().item(), abs=1e-4)


def moved(model: Any) -> None:
    """Gives an adapter weights that change something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "rotation" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_texts_are_rolled_over_as_in_lm_eval(stories: tuple[Any, PreTrainedTokenizerBase], real_data: Path) -> None:
    lines = [text(Random(n), k) for n, k in enumerate((1, 3, 40, 90, 900, 2000))]
    requests = asked([("",), *((line,) for line in lines)], "loglikelihood_rolling")
    found = ours(*stories).loglikelihood_rolling(requests)
    expected = stock(*stories).loglikelihood_rolling(requests, disable_tqdm=True)
    for (logp, theirs), line in zip(zip(found, expected, strict=True), ["", *lines], strict=True):
        assert logp == pytest.approx(theirs, abs=1e-4 * max(1, len(line.split())))


TASK: dict[str, Any] = {
    "task": "animals",
    "custom_dataset": lambda **_: {
        split: datasets.Dataset.from_dict(
            {
                "question": [f"{split} {text(Random(n), 6)}?" for n in range(12)],
                "choices": [[text(Random(100 * n + k), 3) for k in range(4)] for n in range(12)],
                "answer": [n % 4 for n in range(12)],
            }
        )
        for split in ("train", "test")
    },
    "training_split": "train",
    "fewshot_split": "train",
    "test_split": "test",
    "num_fewshot": 2,
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "output_type": "multiple_choice",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.mark.parametrize("chat", [False, True])
def test_a_whole_task_with_examples_and_chat_templates_comes_out_as_in_lm_eval(
    stories: tuple[Any, PreTrainedTokenizerBase], tokenizer: PreTrainedTokenizerBase, pico: Any, chat: bool
) -> None:
    both = []
    for make in (ours, stock):
        model = make(pico, tokenizer) if chat else make(*stories)
        both.append(
            simple_evaluate(
                model=model,
                tasks=[dict(TASK)],
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        )
    mine, theirs = ({each["doc_id"]: each for each in result["samples"]["animals"]} for result in both)
    assert mine.keys() == theirs.keys()
    for number, sample in theirs.items():
        assert mine[number]["acc"] == sample["acc"]
        for (one, greedy), (other, their_greedy) in zip(
            mine[number]["filtered_resps"], sample["filtered_resps"], strict=True
        ):
            assert one == pytest.approx(other, abs=1e-3)
            assert greedy == their_greedy


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_answers_are_those_of_lm_eval_one_at_a_time_in_any_batch(
    stories: tuple[Any, PreTrainedTokenizerBase], random: Random, rows: int
) -> None:
    """Contexts of every length, one beyond what the model reads; several ends; two kinds of requests."""
    contexts = ["", *(text(random, n) for n in (1, 2, 5, 9, 30, 31, 80, 400))]
    kinds: list[dict[str, Any]] = [
        {"until": ["She", ".", "zzz"], "max_gen_toks": 24},
        {"until": "\n", "max_gen_toks": 7, "do_sample": False},
    ]
    requests = asked([(context or "Once", kind) for kind in kinds for context in contexts], "generate_until")
    found = ours(*stories, batch_size=rows).generate_until(requests)
    assert found == stock(*stories, batch_size=1).generate_until(requests, disable_tqdm=True)
    assert any("." not in answer and len(answer) > 3 for answer in found)


def test_an_answer_ends_at_its_own_end_whatever_its_batch_goes_on_to_write(
    stories: tuple[Any, PreTrainedTokenizerBase],
) -> None:
    """Also where the end is a token that is left out of the text: then nothing but its place tells where it was."""
    tokenizer = stories[1]
    stop = StopTexts(tokenizer, ["</s>", "cat"], 3)
    words = ("a dog and ran", "a cat and ran", "a</s> and ran")
    rows = [tokenizer.encode(each, add_special_tokens=False)[:6] for each in words]
    lengths = min(map(len, rows))
    ends = stop.criteria()
    for length in range(1, lengths + 1):
        ended = ends(torch.tensor([[9, 9, *row[:length]] for row in rows]), None)
    assert ended.tolist() == [False, "cat" in tokenizer.decode(rows[1][:lengths]), True]
    assert stop.lengths[0] is None
    assert rows[2][: stop.lengths[2]][-1] == tokenizer.eos_token_id
    (whole,) = ours(*stories).generate_until(asked([("Once", {"until": [], "max_gen_toks": 20})], "generate_until"))
    end = whole[5:9]
    some = [(context, {"until": [end], "max_gen_toks": 20}) for context in ("Once", "One day the big dog", "Tom")]
    together = ours(*stories).generate_until(asked(some, "generate_until"))
    assert together == [ours(*stories).generate_until(asked([one], "generate_until"))[0] for one in some]
    assert together[0] == whole[: whole.index(end)]


def test_an_empty_context_is_answered_from_the_first_token(pico: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    (found,) = ours(pico, tokenizer).generate_until(asked([("", {"max_gen_toks": 4})], "generate_until"))
    first = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id]])
    written = pico.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=4, do_sample=False)
    assert found == tokenizer.decode(written[0, 1:], skip_special_tokens=True)


def test_a_task_may_say_how_it_is_answered() -> None:
    drawn = Generation(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.1, repetition_range=4, seed=8)
    assert asked_generation(drawn, {"until": ["\n"], "max_gen_toks": 3}) == drawn
    greedy = drawn.model_copy(update={"temperature": 0.0, "top_k": 0, "top_p": 1.0})
    assert asked_generation(drawn, {"do_sample": False, "temperature": 0.7}) == greedy
    assert asked_generation(drawn, {"temperature": 0.0}) == greedy
    assert asked_generation(GREEDY, {"do_sample": True, "top_p": 0.5}).top_p == 0.5
    assert asked_generation(GREEDY, {"do_sample": True}).temperature == 1.0
    assert asked_generation(GREEDY, {"temperature": 0.3}).temperature == 0.3
    with pytest.raises(BadParams, match="ways of generating that temper lacks"):
        asked_generation(GREEDY, {"num_beams": 4})
    with pytest.raises(BadParams, match="top_p"):
        asked_generation(GREEDY, {"do_sample": True, "top_p": 7})


# --- encoder-decoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_an_encoder_decoder_is_scored_as_in_lm_eval_and_answers_as_it_does_alone(
    tmp_path: Path, random: Random, kind: str
) -> None:
    folder = make_base(tmp_path / "base", kind, [text(random, 30) for _ in range(20)])
    model: Any = load_model(folder, full_precision=True)
    tokenizer = load_tokenizer(folder)
    theirs = stock(model, tokenizer, backend="seq2seq")
    groups = questions(random, 12, 60)
    requests = asked([pair for group in groups for pair in group])
    found, expected = ours(model, tokenizer).loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    for (logp, greedy), (their_logp, their_greedy) in zip(found, expected, strict=True):
        assert logp == pytest.approx(their_logp, abs=1e-3)
        assert greedy == their_greedy
    contexts = [text(random, n) for n in (2, 30, 7)]
    generate = asked([(context, {"until": ["zzz"], "max_gen_toks": 6}) for context in contexts], "generate_until")
    alone = []
    for context in contexts:
        written = model.generate(**tokenizer(context, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        alone.append(tokenizer.decode(written[0], skip_special_tokens=True))
    assert ours(model, tokenizer).generate_until(generate) == alone


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_a_context_is_computed_once_and_an_endings_last_token_never(pico: Any) -> None:
    counts = list[int]()
    handle = pico.get_input_embeddings().register_forward_hook(lambda m, args, out: counts.append(args[0].numel()))
    shots, one, two = list(range(5, 25)), [30, 31, 32], [40, 41]
    endings = [
        Continuation([*shots, *one], [50]),
        Continuation([*shots, *one], [51]),
        Continuation([*shots, *one], [52, 53, 54]),
        Continuation([*shots, *two], [52]),
        Continuation([*shots, *two], [53, 54, 55]),
        Continuation([*shots, *two], [53, 54, 56]),
    ]
    score_continuations(pico, endings)
    assert sum(counts) == 20 + (3 + 2) + (2 + 2)
    counts.clear()
    score_continuations(pico, endings, tokens=1)
    assert counts == [20 + 3 + 2, 20 + 2 + 2]  # one question at a time, so the examples again
    handle.remove()


def test_what_has_no_tokens_or_too_many_is_refused(pico: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for pair in (("the cat", ""), ("the cat", " dog" * 200)):
        with pytest.raises(BadData, match="cannot be scored"):
            ours(pico, tokenizer).loglikelihood(asked([pair]))
    with pytest.raises(BadData, match="longer answers than the model can write"):
        ours(pico, tokenizer).generate_until(asked([("the cat", {"max_gen_toks": 256})]))


def test_tokens_that_training_saw_are_kept_and_progress_is_counted(
    pico: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    odd = [7, 8, 9]
    with Progress("score", 3, "items") as progress:
        lm = ours(pico, tokenizer, tokens={"the cat": odd}, progress=progress)
        found = lm.loglikelihood(asked([("the cat", " dog"), ("the cat", " sat on"), ("a", "b")]))
        assert progress.done == 3
    dog = tokenizer(" dog", add_special_tokens=False)["input_ids"]
    assert found[0][0] == pytest.approx(score_continuations(pico, [Continuation(odd, dog)])[0].logp, abs=1e-5)
    assert math.isfinite(found[2][0])
