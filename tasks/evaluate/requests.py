"""Questions of row files as requests to a language model, and what its replies are worth.

Requests are lm-eval's three kinds. Prompts with shots are joined by an empty line, as lm-eval joins them; where the
chat template is used, solved questions are earlier turns of the conversation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.records import Message
from tasks.evaluate.answer_matching import corpus_figures, extract_answer, score_answer
from tasks.evaluate.answer_metrics import answer_statistics
from tasks.evaluate.jinja_sandbox import render_template
from tasks.evaluate.questions import Question, Task
from tasks.evaluate.suite_params import Choice, Generate, LikelihoodMetric, PerplexityMetric, Preference, RowsPart
from tasks.reports.items import Item, Summary, prompt_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN_SHOTS = "\n\n"


class Request(NamedTuple):
    """One call of lm-eval's.

    `loglikelihood` of (context, continuation), `loglikelihood_rolling` of (text,), or `generate_until` of (prompt,
    options).
    """

    kind: str
    arguments: tuple[Any, ...]


class PreparedQuestion(NamedTuple):
    """A question with its prompt, and the requests that it takes."""

    question: Question
    prompt: str
    requests: list[Request]


class ScoredReply(NamedTuple):
    """Outcome of a model's replies to one question; `figures` besides the score."""

    prediction: str
    target: str
    score: float
    logp: float
    tokens: int
    figures: Mapping[str, float]


class Prompting(NamedTuple):
    """Rules by which prompts are made.

    Attributes:
        chat: puts turns through the chat template, where it is used.
        tokens_after: how many tokens a continuation has after a context.
    """

    chat: Callable[[Sequence[Message]], str] | None
    tokens_after: Callable[[str, str], int]


# --- prompts ----------------------------------------------------------------------------------------------------------


def build_requests(task: Task, part: RowsPart, how: Prompting) -> list[PreparedQuestion]:
    """Build the requests of all questions of a task."""
    solved = [(_prompt(part, shot, task.name), _solution(part, shot)) for shot in task.shots]
    return [_asked(part, question, solved, task.name, how) for question in task.questions]


def _prompt(part: RowsPart, question: Question, task: str) -> str:
    return render_template(part.prompt, question.fields, f"{task}: {question.id}")


def _solution(part: RowsPart, question: Question) -> str:
    """Return what a solved question shows as its answer."""
    if isinstance(part.metric, Choice) and part.metric.endings != "contexts":
        return _endings(part.metric, question)[question.right[0]]
    name = "target" if isinstance(part.metric, Choice) else "chosen" if part.metric.name == "preference" else "answer"
    whole = question.fields.get(name, "")
    return str(whole[0] if isinstance(whole, list) else whole)


def _endings(metric: Choice, question: Question) -> list[str]:
    choices: list[str] = question.fields["choices"]
    return [question.fields["letters"][n] for n in range(len(choices))] if metric.endings == "letters" else choices


def _joined(part: RowsPart, solved: Sequence[tuple[str, str]], prompt: str, how: Prompting) -> str:
    if how.chat:
        turns = [Message(role, text) for shot in solved for role, text in zip(("user", "assistant"), shot, strict=True)]
        return how.chat([*turns, Message("user", prompt)])
    return "".join(f"{asked}{part.delimiter}{answer}{BETWEEN_SHOTS}" for asked, answer in solved) + prompt


def _asked(
    part: RowsPart, question: Question, solved: Sequence[tuple[str, str]], task: str, how: Prompting
) -> PreparedQuestion:
    metric, fields = part.metric, question.fields
    if isinstance(metric, PerplexityMetric):
        return PreparedQuestion(question, "", [Request("loglikelihood_rolling", (str(fields["text"]),))])
    delimiter = "" if how.chat else part.delimiter
    if isinstance(metric, Choice) and metric.endings == "contexts":
        prompts = [_joined(part, solved, f"{_prompt(part, question, task)}{each}", how) for each in fields["choices"]]
        ending = f"{delimiter}{fields['target']}"
        return PreparedQuestion(
            question, prompts[question.right[0]], [Request("loglikelihood", (p, ending)) for p in prompts]
        )
    prompt = _joined(part, solved, _prompt(part, question, task), how)
    if isinstance(metric, Generate):
        options = {"until": metric.stop, "max_gen_toks": part.max_new_tokens}
        return PreparedQuestion(question, prompt, [Request("generate_until", (prompt, options))])
    if isinstance(metric, Choice):
        endings = _endings(metric, question)
    elif isinstance(metric, Preference):
        endings = [str(fields["chosen"]), str(fields["rejected"])]
    else:
        endings = [question.answers[0]]
    return PreparedQuestion(
        question, prompt, [Request("loglikelihood", (prompt, f"{delimiter}{each}")) for each in endings]
    )


# --- replies ----------------------------------------------------------------------------------------------------------


def items_of(
    suite: str,
    task: Task,
    part: RowsPart,
    asked: Sequence[PreparedQuestion],
    replies: Sequence[Sequence[Any]],
    how: Prompting,
) -> tuple[list[Item], Summary]:
    """Build the items of a task, and their summary.

    Args:
        suite: its name in params.
        task: as it was read.
        part: of params.
        asked: the questions and their requests.
        replies: to each question's requests, in their order: (logp, greedy), a log-probability, or a text.
        how: prompts were made.
    """
    found = [_reply(each, said, part, how) for each, said in zip(asked, replies, strict=True)]
    items = [
        Item(
            suite, task.name, one.question.id, one.prompt, prompt_digest(one.prompt), got.target, got.prediction,
            got.score, got.logp, got.tokens,
        )
        for one, got in zip(asked, found, strict=True)
    ]  # fmt: skip
    figures = {name: sum(got.figures[name] for got in found) / len(found) for name in found[0].figures}
    if scored := sum(got.tokens for got in found):
        figures["loss"] = -sum(got.logp for got in found if got.tokens) / scored
    if isinstance(part.metric, PerplexityMetric):
        text_bytes = sum(len(got.target.encode()) for got in found)
        figures["bits_per_byte"] = figures["loss"] * scored / math.log(2) / text_bytes
    if isinstance(part.metric, Generate):
        references = [one.question.answers for one in asked]
        figures |= corpus_figures([got.prediction for got in found], references, part.metric)
        figures |= reply_figures([said[0] for said in replies], how.tokens_after)
    counted = {name: float(count) for name, count in sorted(task.counted.items()) if count}
    return items, Summary(metric_name(part), figures | counted)


def reply_figures(texts: Sequence[str], tokens_after: Callable[[str, str], int]) -> dict[str, float]:
    """Compute `answer_statistics` of generated replies, as figures of a task."""
    told = answer_statistics(texts, [tokens_after("", text) for text in texts])
    return {f"reply_{name}": value for name, value in told.items()}


def metric_name(part: RowsPart) -> str:
    """Return the name of the score of a part's items."""
    metric = part.metric
    if isinstance(metric, Generate):
        return {"exact": "exact_match", "normalised": "normalised_match", "numeric": "numeric_match"}.get(
            metric.match, metric.match
        )
    if isinstance(metric, Choice):
        return "accuracy" if metric.normalise == "none" else f"accuracy_per_{metric.normalise[:-1]}"
    if isinstance(metric, LikelihoodMetric):
        return "greedy" if metric.score == "greedy" else "logp_per_token"
    return "preference_accuracy" if isinstance(metric, Preference) else "logp_per_token"


def _reply(asked: PreparedQuestion, said: Sequence[Any], part: RowsPart, how: Prompting) -> ScoredReply:
    metric = part.metric
    if isinstance(metric, Generate):
        return _written(asked.question, said[0], metric)
    if isinstance(metric, PerplexityMetric):
        (text,) = asked.requests[0].arguments
        tokens = how.tokens_after("", text)
        return ScoredReply("", text, said[0] / max(1, tokens), said[0], tokens, {})
    logps = [logp for logp, _ in said]
    tokens_of = [how.tokens_after(*request.arguments) for request in asked.requests]
    if isinstance(metric, Choice):
        return _chosen(asked, logps, tokens_of, metric)
    if isinstance(metric, LikelihoodMetric):
        greedy, per_token = float(said[0][1]), logps[0] / max(1, tokens_of[0])
        value = greedy if metric.score == "greedy" else per_token
        target = asked.question.answers[0]
        return ScoredReply(target if greedy else "", target, value, logps[0], tokens_of[0], {"greedy": greedy})
    return _preferred(asked.question, logps, tokens_of, metric)


def _chosen(asked: PreparedQuestion, logps: Sequence[float], tokens_of: Sequence[int], metric: Choice) -> ScoredReply:
    """Multiple choice: of equally likely endings the first, as numpy's and so lm-eval's arg-max has it."""
    question = asked.question
    characters = [len(text) for text in _endings(metric, question)]
    best = {
        name: max(range(len(logps)), key=[logp / max(1, by) for logp, by in zip(logps, bys, strict=True)].__getitem__)
        for name, bys in (("none", [1] * len(logps)), ("characters", characters), ("tokens", tokens_of))
    }
    right = question.right
    figures = {
        "accuracy": float(best["none"] in right),
        "accuracy_per_character": float(best["characters"] in right),
        "accuracy_per_token": float(best["tokens"] in right),
    }
    shown = _endings(metric, question)
    chosen = best[metric.normalise]
    first = right[0]
    return ScoredReply(shown[chosen], shown[first], float(chosen in right), logps[first], tokens_of[first], figures)


def _preferred(question: Question, logps: Sequence[float], tokens_of: Sequence[int], metric: Preference) -> ScoredReply:
    by = tokens_of if metric.normalise == "tokens" else [1, 1]
    chosen, rejected = (logp / max(1, each) for logp, each in zip(logps, by, strict=True))
    texts = [str(question.fields[name]) for name in ("chosen", "rejected")]
    prefers = chosen > rejected
    return ScoredReply(
        texts[not prefers], texts[0], float(prefers), logps[0], tokens_of[0], {"margin": chosen - rejected}
    )


def _written(question: Question, text: str, metric: Generate) -> ScoredReply:
    answer = extract_answer(text, metric.extract)
    value = score_answer(answer, question.answers, metric.match)
    figures = {"answered": float(answer is not None)}
    return ScoredReply(answer or "", question.answers[0], value, math.nan, 0, figures)


def continuation_tokens(tokenizer: PreTrainedTokenizerBase, *, apart: bool) -> Callable[[str, str], int]:
    """Build a function that counts the tokens of a continuation as lm-eval scores them.

    Args:
        tokenizer: the model's own.
        apart: whether contexts and continuations are tokenised apart, as for encoder-decoders and after a chat
            template; else together, and what the context makes up is taken off.
    """

    def count(context: str, continuation: str) -> int:
        if apart or not context:
            return len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        bare = context.rstrip()
        whole = tokenizer(context + continuation)["input_ids"]
        return len(whole) - len(tokenizer(bare)["input_ids"])

    return count
