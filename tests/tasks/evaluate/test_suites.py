"""Suites on pico models, against the model itself one row at a time, and against lm-eval as it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tasks.adapters.attach import init_adapter, save_adapter
from tasks.adapters.package import package
from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadData, BadModel, BadParams
from tasks.core.records import Message
from tasks.evaluate.lm_eval_tasks import HarnessRun, _check_names, dataset_finder, run_harness
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.suite_params import HubData, MirrorData, ReadySuite, TaskFileSuite, shipped_names
from tasks.evaluate.suites import Asking, Results, examine_parts, read_ready, run_suites, shipped
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tasks.models.loader import load_model
from tasks.reports.items import Item, check_scores, prompt_digest, suite_metrics
from tasks.tokenization.chat_template import render_prompt
from tests.helpers.encoder_decoders import make_base
from tests.helpers.samples import CHOICE, EVALUATE, LORA, MULTIPLE, method, rows_suite, write_lines
from tests.tasks.evaluate.test_task_files import GOOD

ANIMALS: list[dict[str, Any]] = [
    {"question": "What says meow?", "choices": ["the cat", "a dog", "two big horses"], "answer": 0},
    {"question": "What barks?", "choices": ["cat", "the old dog"], "answer": "B"},
    {"question": "Count: cat, dog, cow", "choices": ["1", "2", "3", "4"], "answer": 2},
    {"question": "狗?", "choices": ["dog", "cat", "a bird"], "answer": "dog"},
    {"question": "What is 1 plus 2?", "choices": ["3", "12", "It is 3."], "answer": ["A", "C"]},
]
PARAMS = EVALUATE.model_copy(update={"batch_size": 3})


@pytest.fixture(scope="module")
def base(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model in float32, with numbers that tell endings apart."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(pico_base, folder)
    model: Any = load_model(pico_base, full_precision=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examinee(base: Path) -> ModelUnderTest:
    return ModelUnderTest(base, PARAMS, None, chats=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "animals.jsonl", ANIMALS)


def logp(model: Any, tokenizer: PreTrainedTokenizerBase, context: str, ending: str) -> float:
    """By the model's own forward pass, one row at a time."""
    before = tokenizer(context)["input_ids"]
    ids = tokenizer(context + ending)["input_ids"]
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return float(sum(logps[place - 1, ids[place]] for place in range(len(before), len(ids))))


def asked(examinee: ModelUnderTest, **suites: Any) -> Results:
    return run_suites(examinee, suites)


# --- rows of one's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", ["none", "characters", "tokens"])
def test_choices_are_those_of_the_model_itself(examinee: ModelUnderTest, rows: Path, normalise: str) -> None:
    found = asked(examinee, s=rows_suite(rows, {**CHOICE, "normalise": normalise}, MULTIPLE))
    rights = [(0,), (1,), (2,), (0,), (0, 2)]
    for item, row, right in zip(found.items, ANIMALS, rights, strict=True):
        texts = row["choices"]
        logps = [logp(examinee.model, examinee.tokenizer, str(row["question"]), f" {text}") for text in texts]
        by = [
            {"none": 1, "characters": len(text), "tokens": len(examinee.tokenizer(f" {text}")["input_ids"])}[normalise]
            for text in texts
        ]
        best = max(range(len(texts)), key=lambda n: logps[n] / by[n])
        assert (item.prediction, item.target) == (texts[best], texts[right[0]])
        assert item.score == float(best in right)
        assert item.logp == pytest.approx(logps[right[0]], abs=1e-3)
        assert item.prompt == row["question"]
        assert item.prompt_sha256 == prompt_digest(item.prompt)
    name = "accuracy" if normalise == "none" else f"accuracy_per_{normalise[:-1]}"
    figures = found.summaries["s", "one"].figures
    assert found.summaries["s", "one"].metric == name
    assert figures[name] == pytest.approx(sum(item.score for item in found.items) / 5)
    assert figures["several_answers"] == 1


def test_accuracies_and_answers_are_stock_lm_evals(examinee: ModelUnderTest, rows: Path) -> None:
    """lm-eval's own model class on the same questions, through its own task and metrics."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    one_right = ANIMALS[:4]
    docs = [{"q": r["question"], "c": r["choices"], "gold": g} for r, g in zip(one_right, [0, 1, 2, 0], strict=True)]
    task = {
        "task": "stock",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
        "test_split": "test",
        "doc_to_text": "q",
        "doc_to_choice": "c",
        "doc_to_target": "gold",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    stock = simple_evaluate(
        model=HFLM(pretrained=examinee.model, tokenizer=examinee.tokenizer, batch_size=1),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    found = asked(examinee, s=rows_suite(rows, CHOICE, MULTIPLE, limit=4))
    figures = found.summaries["s", "one"].figures
    assert figures["accuracy"] == stock["results"]["stock"]["acc,none"]
    assert figures["accuracy_per_character"] == stock["results"]["stock"]["acc_norm,none"]
    for item, sample in zip(found.items, stock["samples"]["stock"], strict=True):
        logps = [reply[0] for reply in sample["filtered_resps"]]
        assert item.prediction == sample["doc"]["c"][logps.index(max(logps))]
        assert item.logp == pytest.approx(logps[sample["target"]], abs=1e-4 * item.tokens)


def test_letters_are_named_after_solved_questions(examinee: ModelUnderTest, rows: Path) -> None:
    shots = {"count": 2, "path": str(rows), "files": "*", "sha256": "none"}
    prompt = "{{ question }}{% for c in choices %}\n{{ letters[loop.index0] }}. {{ c }}{% endfor %}\nAnswer:"
    suite = rows_suite(rows, {**CHOICE, "endings": "letters"}, MULTIPLE, shots=shots, prompt=prompt, limit=1)
    (item,) = asked(examinee, s=suite).items
    solved = "What says meow?\nA. the cat\nB. a dog\nC. two big horses\nAnswer:"
    assert item.prompt == f"{solved} A\n\nWhat barks?\nA. cat\nB. the old dog\nAnswer: B\n\n{solved}"
    assert item.target == "A"
    assert item.prediction in ("A", "B", "C")


def test_contexts_stand_before_one_ending(examinee: ModelUnderTest, tmp_path: Path) -> None:
    row: dict[str, Any] = {"o": ["The cat said", "The dog said"], "t": "meow loudly.", "gold": 1}
    suite = rows_suite(write_lines(tmp_path / "w.jsonl", [row]), {**CHOICE, "endings": "contexts"},
                       {"choices": "o", "target": "t", "answer": "gold"}, prompt="")  # fmt: skip
    (item,) = asked(examinee, s=suite).items
    logps = [logp(examinee.model, examinee.tokenizer, context, " meow loudly.") for context in row["o"]]
    assert item.prediction == row["o"][logps.index(max(logps))]
    assert item.logp == pytest.approx(logps[1], abs=1e-3)
    assert (item.target, item.prompt) == ("The dog said", "The dog said")


def test_likelihoods_preferences_and_perplexities(examinee: ModelUnderTest, tmp_path: Path) -> None:
    model, tokenizer = examinee.model, examinee.tokenizer
    rows = [
        {"question": f"q{n}", "answer": a, "chosen": c, "rejected": r, "text": t}
        for n, (a, c, r, t) in enumerate(
            [("yes", "good dog", "bad", "The cat sat."), ("no way", "two", "three cats", "A dog and a cat ran.")]
        )
    ]
    path, columns = write_lines(tmp_path / "r.jsonl", rows), {"question": "question"}
    found = asked(
        examinee,
        likely=rows_suite(path, {"name": "loglikelihood", "score": "logp"}, {**columns, "answer": "answer"}),
        greedy=rows_suite(path, {"name": "loglikelihood", "score": "greedy"}, {**columns, "answer": "answer"}),
        preferred=rows_suite(path, {"name": "preference", "normalise": "none"},
                             {**columns, "chosen": "chosen", "rejected": "rejected"}),
        per_token=rows_suite(path, {"name": "preference", "normalise": "tokens"},
                             {**columns, "chosen": "chosen", "rejected": "rejected"}),
        text=rows_suite(path, {"name": "perplexity"}, {"text": "text"}, prompt=""),
    )  # fmt: skip
    by = {suite: [item for item in found.items if item.suite == suite] for suite in
          ("likely", "greedy", "preferred", "per_token", "text")}  # fmt: skip
    for place, row in enumerate(rows):
        right = logp(model, tokenizer, row["question"], f" {row['answer']}")
        tokens = len(tokenizer(f" {row['answer']}")["input_ids"])
        assert by["likely"][place].logp == pytest.approx(right, abs=1e-3)
        assert by["likely"][place].score == pytest.approx(right / tokens, abs=1e-3)
        assert by["likely"][place].tokens == tokens
        assert by["greedy"][place].score in (0.0, 1.0)
        chosen, rejected = (logp(model, tokenizer, row["question"], f" {row[n]}") for n in ("chosen", "rejected"))
        counts = [len(tokenizer(f" {row[n]}")["input_ids"]) for n in ("chosen", "rejected")]
        assert by["preferred"][place].score == float(chosen > rejected)
        assert by["per_token"][place].score == float(chosen / counts[0] > rejected / counts[1])
        ids = tokenizer(row["text"])["input_ids"]
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        whole = torch.tensor([[first, *ids]])
        loss = float(model(input_ids=whole, labels=whole).loss.detach())
        assert by["text"][place].score == pytest.approx(-loss, abs=1e-3)
        assert by["text"][place].tokens == len(ids)
    total = sum(item.logp for item in by["text"])
    figures = found.summaries["text", "one"].figures
    assert figures["loss"] == pytest.approx(-total / sum(item.tokens for item in by["text"]))
    bits = -total / math.log(2) / sum(len(row["text"].encode()) for row in rows)
    assert figures["bits_per_byte"] == pytest.approx(bits)


def test_what_is_written_is_what_generate_writes(examinee: ModelUnderTest, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "g.jsonl", [{"question": q, "answer": "x"} for q in ("Hello", "What is 1 plus 2?")])
    metric = {"name": "generate", "extract": "whole", "target": "whole", "match": "exact", "stop": []}
    suite = rows_suite(path, metric, {"question": "question", "answer": "answer"}, max_new_tokens=6)
    found, lengths = asked(examinee, s=suite), list[int]()
    for item in found.items:
        ids = torch.tensor([examinee.tokenizer(item.prompt)["input_ids"]])
        model: Any = examinee.model
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = str(examinee.tokenizer.decode(new, skip_special_tokens=True))
        assert item.prediction == text.strip()
        assert math.isnan(item.logp)
        assert item.tokens == 0
        lengths.append(len(text))
    figures = found.summaries["s", "one"].figures
    assert figures["reply_characters"] == sum(lengths) / len(lengths)
    assert {"reply_tokens", "reply_empty", "reply_refusals", "reply_repetition"} <= figures.keys()


def test_the_chat_template_is_the_models_own(examinee: ModelUnderTest, rows: Path) -> None:
    shots = {"count": 1, "path": str(rows), "files": "*", "sha256": "none"}
    suite = rows_suite(rows, CHOICE, MULTIPLE, chat_template=True, shots=shots, limit=2)
    item = asked(examinee, s=suite).items[1]
    turns = [Message("user", "What says meow?"), Message("assistant", "the cat"), Message("user", "What barks?")]
    ids = render_prompt(examinee.tokenizer, turns)
    assert item.prompt == str(examinee.tokenizer.decode(ids))
    with torch.no_grad():
        ending = examinee.tokenizer("the old dog", add_special_tokens=False)["input_ids"]
        logps = examinee.model(input_ids=torch.tensor([ids + ending])).logits[0].log_softmax(-1)
    expected = sum(float(logps[len(ids) + n - 1, token]) for n, token in enumerate(ending))
    assert item.logp == pytest.approx(expected, abs=1e-3)
    assert item.tokens == len(ending)


def test_what_is_longer_than_the_model_reads_is_counted(examinee: ModelUnderTest, tmp_path: Path) -> None:
    long = {**ANIMALS[0], "question": "cat " * 200}
    path = write_lines(tmp_path / "long.jsonl", [ANIMALS[0], long])
    assert asked(examinee, s=rows_suite(path, CHOICE, MULTIPLE)).summaries["s", "one"].figures["cut_requests"] == 3


def test_an_encoder_decoder_is_asked_too(tmp_path: Path, rows: Path) -> None:
    texts = [" ".join([str(row["question"]), *map(str, row["choices"])]) for row in ANIMALS]
    folder = make_base(tmp_path / "t5", "t5", texts)
    model = ModelUnderTest(folder, PARAMS, None, chats=False)
    metric = {"name": "generate", "extract": "whole", "target": "whole", "match": "exact", "stop": []}
    found = asked(
        model,
        c=rows_suite(rows, CHOICE, MULTIPLE),
        g=rows_suite(rows, metric, {"question": "question", "answer": "answer"}),
    )
    t5: Any = model.model
    for item, row in zip([each for each in found.items if each.suite == "c"], ANIMALS, strict=True):
        given = torch.tensor([model.tokenizer(row["question"])["input_ids"]])
        ending = torch.tensor([model.tokenizer(f" {item.target}", add_special_tokens=False)["input_ids"]])
        loss = float(t5(input_ids=given, labels=ending).loss)
        assert item.logp == pytest.approx(-loss * ending.shape[1], abs=1e-3)
    assert len(found.items) == 10


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_is_put_on_its_base(base: Path, rows: Path, tmp_path: Path, quantized: bool) -> None:
    from flows.files.evaluate import _quantized_for

    trained: Any = init_adapter(
        base, method(LORA, {"name": "sft", "label_smoothing": 0.0, "neftune_alpha": 0.0}).adapter
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn_like(weight)
    (tmp_path / "adapter").mkdir()
    save_adapter(trained, tmp_path / "adapter")
    form = _quantized_for("nf4") if quantized else None
    with_adapter = ModelUnderTest(base, PARAMS, None, chats=False, adapter=tmp_path / "adapter", quantized_for=form)
    found = asked(with_adapter, s=rows_suite(rows, CHOICE, MULTIPLE)).items
    plain = asked(ModelUnderTest(base, PARAMS, None, chats=False), s=rows_suite(rows, CHOICE, MULTIPLE)).items
    assert [item.logp for item in found] != pytest.approx([item.logp for item in plain], abs=1e-3)
    if not quantized:
        expected = logp(trained.eval(), with_adapter.tokenizer, found[0].prompt, " the cat")
        assert found[0].logp == pytest.approx(expected, abs=1e-3)
    else:
        assert any(type(module).__name__ == "Linear4bit" for module in with_adapter.model.modules())


@pytest.mark.parametrize("name", ["loreft", "prefix"])
def test_an_adapter_that_must_know_the_prompts_end_is_asked_as_it_was_trained(
    base: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    """Against the scores that training sees."""
    from tests.tasks.adapters.test_attach import trained

    (tmp_path / "adapter").mkdir()
    save_adapter(trained(base, name), tmp_path / "adapter")
    examinee = ModelUnderTest(base, PARAMS, None, chats=False, adapter=tmp_path / "adapter")
    for item, row in zip(asked(examinee, s=rows_suite(rows, CHOICE, MULTIPLE, limit=4)).items, ANIMALS, strict=False):
        prompt, whole = (
            examinee.tokenizer(text)["input_ids"] for text in (item.prompt, f"{item.prompt} {item.target}")
        )
        mask = [place >= len(prompt) for place in range(len(whole))]
        expected = score_tokens(examinee.model, [TokenRow(whole, mask, len(prompt))]).row_sums().item()
        assert item.logp == pytest.approx(expected, abs=1e-3), row


def test_a_packaged_model_is_the_adapter_on_the_base_that_it_refers_to(base: Path, rows: Path, tmp_path: Path) -> None:
    from tests.tasks.adapters.test_attach import trained

    (tmp_path / "adapter").mkdir()
    save_adapter(trained(base, "prefix"), tmp_path / "adapter")
    with atomic_folder(tmp_path / "packaged") as folder:
        package(base, tmp_path / "adapter", folder, tmp_path / "packaged")
    suite = rows_suite(rows, CHOICE, MULTIPLE)
    alone = ModelUnderTest(base, PARAMS, None, chats=True, adapter=tmp_path / "adapter")
    packaged = ModelUnderTest(tmp_path / "packaged", PARAMS, None, chats=True)
    plain = ModelUnderTest(base, PARAMS, None, chats=True)
    assert asked(packaged, s=suite).items == asked(alone, s=suite).items
    assert len({each.journal.key for each in (alone, packaged, plain)}) == 3


# --- lm-eval's form ---------------------------------------------------------------------------------------------------


def task_file(folder: Path, text: str = GOOD, **changes: Any) -> TaskFileSuite:
    docs = [{"question": r["question"], "choices": r["choices"], "gold": g}
            for r, g in zip(ANIMALS[:4], [0, 1, 2, 0], strict=True)]  # fmt: skip
    write_lines(folder / "rows.jsonl", docs)
    (folder / "task.yaml").write_text(text)
    values = {"kind": "task_file", "path": str(folder / "task.yaml"), "sha256": "none", "metric": "acc", "shots": 0,
              "limit": "none", "chat_template": False}  # fmt: skip
    return TaskFileSuite.model_validate({**values, **changes})


def test_a_task_file_gives_what_the_same_rows_give(examinee: ModelUnderTest, rows: Path, tmp_path: Path) -> None:
    prompt = "Question: {{ question }}\nAnswer:"
    ours = asked(examinee, s=rows_suite(rows, CHOICE, MULTIPLE, prompt=prompt, limit=4)).items
    theirs = asked(examinee, s=task_file(tmp_path)).items
    for one, other in zip(ours, theirs, strict=True):
        assert (one.prompt, one.target, one.prediction, one.score) == (
            other.prompt,
            other.target,
            other.prediction,
            other.score,
        )
        assert one.logp == pytest.approx(other.logp, abs=1e-4)
        assert one.tokens == other.tokens
    assert {item.task for item in theirs} == {"mine"}


def test_a_generating_task_file_with_a_filter_and_the_chat_template(examinee: ModelUnderTest, tmp_path: Path) -> None:
    text = """
task: written
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{ question }}"
doc_to_target: "{{ choices[gold] }}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
filter_list:
  - name: first
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    suite = task_file(tmp_path, text, metric="exact_match,first", chat_template=True, limit=2)
    found = asked(examinee, s=suite).items
    assert [item.target for item in found] == ["the cat", "the old dog"]
    ids = render_prompt(examinee.tokenizer, [Message("user", "What says meow?")])
    assert found[0].prompt == str(examinee.tokenizer.decode(ids))


def test_a_metric_that_is_missing_or_of_no_item_fails(examinee: ModelUnderTest, tmp_path: Path) -> None:
    """Row 75: nothing is reported by a metric that is not there."""
    with pytest.raises(BadParams, match='task mine: gives no metric "acc_norm"') as refused:
        asked(examinee, s=task_file(tmp_path, metric="acc_norm"))
    assert refused.value.exit_code == 65
    with pytest.raises(BadParams, match="gives no metric"):
        asked(examinee, s=task_file(tmp_path, metric="acc,strict"))


def test_a_template_of_a_task_file_runs_in_the_sandbox(examinee: ModelUnderTest, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="a template of a task cannot be used"):
        asked(examinee, s=task_file(tmp_path, GOOD.replace("{{ gold }}", "{{ ''.__class__.__mro__ }}")))


def test_a_misspelt_task_of_lm_eval_is_told() -> None:
    """Row 76."""
    with pytest.raises(BadParams, match='unknown task "hellaswagg"; did you mean "hellaswag"') as refused:
        _check_names(["hellaswagg"], ["piqa", "hellaswag", "boolq"])
    assert refused.value.exit_code == 65


def test_a_shipped_task_reads_the_mirror_and_nothing_else(examinee: ModelUnderTest, tmp_path: Path) -> None:
    """lm-eval's own openbookqa on two rows that lie in a folder of the dataset's name."""
    rows = [
        {"id": str(n), "question_stem": stem, "choices": {"text": ["cat", "dog", "cow", "hen"], "label": list("ABCD")},
         "answerKey": key} for n, (stem, key) in enumerate([("What barks? The", "B"), ("What says meow? The", "A")])
    ]  # fmt: skip
    folder = tmp_path / "allenai" / "openbookqa"
    for split in ("train", "validation", "test"):
        write_lines(folder / "main" / f"{split}.jsonl", rows)
    files = "".join(f"  - split: {s}\n    path: main/{s}.jsonl\n" for s in ("train", "validation", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    find = dataset_finder(MirrorData(kind="mirror", path=str(tmp_path)))
    wanted = HarnessRun("s", ["openbookqa"], "acc_norm", 0, None, False, ships=True)
    items, summaries = run_harness(wanted, examinee, find)
    assert [(item.prompt, item.target) for item in items] == [
        ("What barks? The", "dog"),
        ("What says meow? The", "cat"),
    ]
    assert summaries["s", "openbookqa"].figures["acc_norm"] == sum(item.score for item in items) / 2
    with pytest.raises(BadData, match="the dataset is not there") as refused:
        find("Rowan/hellaswag")
    assert "hf download Rowan/hellaswag" in refused.value.fix
    with pytest.raises(BadParams, match="whose commit is not pinned"):
        dataset_finder(HubData(kind="hub", revisions={}))("Rowan/hellaswag")


# --- what must not be reported ----------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_are_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    """Row 70, of a model with NaN weights."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    journals = tmp_path / "journals"
    with pytest.raises(BadModel, match="log-probabilities are not finite; nothing is reported") as refused:
        asked(ModelUnderTest(broken, PARAMS, journals, chats=False), s=rows_suite(rows, CHOICE, MULTIPLE))
    assert refused.value.exit_code == 65
    assert [file.name for file in journals.rglob("*.json")] == ["identity.json"]


@pytest.mark.parametrize(("score", "value"), [(math.nan, -1.0), (math.inf, -1.0), (1.0, -math.inf), (1.0, math.nan)])
def test_an_item_that_is_not_finite_is_refused(score: float, value: float) -> None:
    good = Item("s", "t", "1", "p", prompt_digest("p"), "x", "x", 1.0, math.nan, 0)
    check_scores([good])
    with pytest.raises(BadModel, match="1 of 2 items have scores that are not finite"):
        check_scores([good, good._replace(score=score, logp=value, tokens=3)])


def test_intervals_and_figures_of_suites_by_hand() -> None:
    def item(task: str, score: float) -> Item:
        return Item("s", task, "1", "p", prompt_digest("p"), "x", "x", score, -1.0, 1)

    from tasks.reports.items import Summary

    items = [item("a", 1.0), item("a", 0.0), item("b", 1.0), item("b", 1.0)]
    summaries = {("s", "a"): Summary("accuracy", {"x": 2.0}), ("s", "b"): Summary("greedy", {})}
    found = suite_metrics(items, summaries, PARAMS.resampling)["s"]
    assert (found["metric"], found["rows"], found["score"]["mean"]) == ("score", 4, 0.75)
    assert found["tasks"]["b"]["score"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["tasks"]["a"] == {
        "metric": "accuracy", "rows": 2, "score": {"mean": 0.5, "low": 0.0, "high": 1.0}, "figures": {"x": 2.0},
    }  # fmt: skip


# --- ready suites -----------------------------------------------------------------------------------------------------


def test_every_ready_suite_says_what_it_is() -> None:
    wanted = {"agieval", "ceval", "cmmlu", "gsm8k", "nous", "reft_arithmetic", "reft_commonsense"}
    assert wanted <= set(shipped_names())
    for name in shipped_names():
        ready = shipped(name)
        assert ready.source
        assert ready.licence
    with pytest.raises(BadParams, match='no suite "gsm8" is shipped; did you mean "gsm8k"'):
        shipped("gsm8")


def test_a_part_that_is_missing_is_refused_or_skipped_and_said(
    examinee: ModelUnderTest, rows: Path, tmp_path: Path
) -> None:
    part = rows_suite(rows.name, CHOICE, MULTIPLE).model_dump(exclude={"limit", "chat_template"})
    parts = [part, {**part, "path": "gone.jsonl", "task": "gone"}]
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"about": "a", "source": "s", "licence": "l", "parts": parts}))
    ready = read_ready(path)
    with pytest.raises(BadData, match="lacks 1 files or datasets of the suite s") as refused:
        examine_parts(examinee, "s", ready, rows.parent, Asking(2, False, skips=False))
    assert refused.value.examples == ("gone.jsonl",)
    found = examine_parts(examinee, "s", ready, rows.parent, Asking(2, False, skips=True))
    assert (len(found.items), found.skipped) == (2, {"s": ["gone.jsonl"]})
    with pytest.raises(BadData, match="lacks 2"):
        examine_parts(examinee, "s", ready, tmp_path / "nothing", Asking(2, False, skips=True))
    path.write_text(json.dumps({"about": "a", "source": "s", "licence": "l", "parts": [{**part, "shot": 1}]}))
    with pytest.raises(BadParams, match="is no suite"):
        read_ready(path)


@pytest.mark.parametrize("name", ["agieval", "gsm8k", "llm_foundry", "reft_arithmetic", "reft_commonsense"])
def test_a_ready_suite_runs_offline_on_real_data_with_a_real_model(real_data: Path, name: str) -> None:
    model = ModelUnderTest(real_data / "stories260k" / "hf", EVALUATE, None, chats=False)
    suite = ReadySuite(kind="ready", name=name, data=str(real_data), missing="skip", limit=2, chat_template=False)
    found = asked(model, s=suite)
    assert len(found.items) == 2 * len(found.summaries)
    assert all(math.isfinite(item.score) for item in found.items)
