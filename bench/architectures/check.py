"""One model through all that temper does with a base: scored, trained, reloaded and merged, against its own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tasks.adapters.params import AnyAdapter, LoraAdapter, ReftAdapter
from tasks.core.errors import TemperError
from tasks.inference.rows import TokenRow

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.models.loader import Model

T = TypeVar("T")

NATS = 1e-4
"""What a log-probability may differ by, float32."""

ROWS = (  # of several lengths; two begin with the same prompt
    TokenRow([5, 17, 33, 60, 8, 71, 22, 90, 14], [False] * 4 + [True] * 5, 4),
    TokenRow([41, 9, 77, 3, 56, 12, *range(20, 31)], [False] * 6 + [True] * 11, 6),
    TokenRow([5, 17, 33, 60, 44, 81, 29], [False] * 4 + [True] * 3, 4),
    TokenRow([88, 6, 35, 52, 67, 19, 73, 11, 48, 62, 27, 39], [False] * 3 + [True] * 9, 3),
)


class Outcome(NamedTuple):
    """What came of a model.

    Attributes:
        way: how rows of it are computed: `joined`, `padded`, `one length at a time`, `as a whole`.
        lora: empty if it was trained, reloaded, merged and evaluated right; else why not.
        reft: the same, but for the merging.
        nats: the largest difference of a log-probability.
    """

    way: str
    lora: str
    reft: str
    nats: float


def check_model(base: Path, work: Path) -> Outcome:
    """Take a base, a folder, through everything; what is refused is in the outcome."""
    from tasks.inference.logprobs import find_out
    from tasks.models.loader import load_model

    try:
        model = load_model(base, full_precision=True)
        if model.config.is_encoder_decoder:
            raise NotImplementedError("rows of an encoder-decoder are pairs, which are checked in the tests")
        way, worst = find_out(model), _scored_right(model)
    except TemperError as error:
        refused = _said(error)
        return Outcome("refused", refused, refused, 0.0)
    outcomes = {}
    for adapter in (LoraAdapter(name="lora", rank=2, alpha=4.0), ReftAdapter(name="loreft", rank=2, positions="f1+l1")):
        try:
            worst = max(worst, _trained_right(base, adapter, work / adapter.name))
            outcomes[adapter.name] = ""
        except TemperError as error:
            outcomes[adapter.name] = _said(error)
    return Outcome(way, outcomes["lora"], outcomes["loreft"], worst)


def _said(error: TemperError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    told = [lines[0].rpartition(": ")[2], *(line.removeprefix("got:").strip() for line in lines if "got:" in line)]
    return ": ".join(told)[:160]


def _scored_right(model: Model) -> float:
    """Compare scores of rows together, of rows alone, and of endings, with the model's own logits of each row."""
    import torch

    from tasks.evaluate.continuation_scores import Continuation, score_continuations
    from tasks.inference.logprobs import score_tokens

    own = [_own_logp(model, row) for row in ROWS]
    with torch.no_grad():
        together = score_tokens(model, ROWS).logp
        alone = torch.cat([score_tokens(model, [row]).logp for row in ROWS])
    endings = [Continuation(row.ids[: row.prompt_tokens], row.ids[row.prompt_tokens :]) for row in ROWS]
    sums = torch.tensor([each.logp for each in score_continuations(model, endings)])
    found = [(together, torch.cat(own)), (alone, torch.cat(own)), (sums, torch.stack([each.sum() for each in own]))]
    return max(_apart(*pair) for pair in found)


def _own_logp(model: Any, row: TokenRow) -> Tensor:
    import torch

    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
    logp: Tensor = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logp[torch.tensor(row.mask[1:])]


def _trained_right(base: Path, adapter: AnyAdapter, work: Path) -> float:
    """Train an adapter; return how far what was reloaded, and merged where it can be, is from what was trained."""
    import torch

    from tasks.adapters.attach import attach, init_adapter, is_mergeable, save_adapter
    from tasks.core.progress import Progress
    from tasks.deltas.base_tensors import check_mergeable
    from tasks.engine.memory import AdaptiveMicroBatch
    from tasks.inference.logprobs import score_tokens
    from tasks.merge.merged_model import merge, write_merged
    from tasks.models.loader import load_model
    from tasks.train.params import Method
    from tasks.train.trainer import plan_training, train

    def scores(model: Any) -> Tensor:
        with torch.no_grad():
            return score_tokens(model.eval(), ROWS).logp

    for name in ("adapter", "merged", "checkpoints"):
        (work / name).mkdir(parents=True)
    method = Method(
        adapter=adapter, epochs=8, batch_size=4, micro_batch_size=4, learning_rate=5e-3, checkpoint_every_steps=100
    )
    model = init_adapter(base, adapter)
    before = float(scores(model).mean())
    training = plan_training(model, [(row,) for row in ROWS], method, AdaptiveMicroBatch(4, fit=False), None)
    with Progress("train", training.plan.steps, "steps") as progress:
        train(training, work / "checkpoints", progress)
    trained = scores(model)
    if not float(trained.mean()) > before:
        raise AssertionError(f"training made it worse: {before} to {float(trained.mean())} nats a token")
    save_adapter(model, work / "adapter")
    worst = _apart(scores(attach(load_model(base, full_precision=True), work / "adapter")), trained)
    if is_mergeable(adapter):
        check_mergeable(base, work / "adapter")
        write_merged(base, work / "adapter", {work / "merged": merge(base, work / "adapter")}, 1 << 30)
        worst = max(worst, _apart(scores(load_model(work / "merged", full_precision=True)), trained))
    return worst


def _apart(found: Tensor, own: Tensor) -> float:
    away = float((found - own).abs().max() / own.abs().max().clamp_min(1.0))
    if not away <= NATS:
        raise AssertionError(f"log-probabilities differ by {away} of what they are")
    return away


def reported(outcome: Callable[[], T]) -> T | str:
    """Return what comes of something, or what kept it from coming."""
    try:
        return outcome()
    except Exception as error:  # whatever a library makes of a model: it goes into the table
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
