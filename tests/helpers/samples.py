"""Small things that tests are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.base.params import PretrainBase
from tasks.evaluate.params import Evaluate
from tasks.evaluate.suite_params import RowsSuite
from tasks.inference.params import GREEDY
from tasks.ingest.params import FileSource
from tasks.render.params import Render
from tasks.train.params import Method
from tasks.validate.params import Checks, Validate

PICO_SETTINGS = [
    "ingest.sources.chats.count=120",
    "ingest.sources.pairs.count=60",
    "train.qlora.batch_size=16",
    "train.qlora.micro_batch_size=8",
    "train.qlora.checkpoint_every_steps=2",
    "train.orpo.batch_size=16",
    "train.orpo.micro_batch_size=8",
    "train.orpo.checkpoint_every_steps=2",
    "train.reft.epochs=1",
    "train.reft.adapter.rank=2",
    "train.reft.checkpoint_every_steps=2",
    "merge.probe_examples=2",
    "merge.max_mean_kl=0.5",
    "evaluate.max_new_tokens=4",
    "promote.metric=loss",
    "promote.max_noise=10.0",
    "promote.bootstrap_samples=200",
]
"""What makes the quickstart run in seconds a stage."""


def pretrain_params(**changes: Any) -> PretrainBase:
    """A pico shape: two layers of 64 numbers, the least width that 4-bit weights are read back right at."""
    values: dict[str, Any] = {
        "kind": "pretrain",
        "path": "data/clean",
        "rows": ["text", "chat"],
        "held_out": 0.1,
        "held_out_rows": 20,
        "vocabulary": 400,
        "hidden_size": 64,
        "mlp_size": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "context_tokens": 32,
        "tokens": 640,
        "batch_tokens": 128,
        "learning_rate": 0.01,
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "checkpoint_every_steps": 2,
        "seed": 1,
    }
    return PretrainBase.model_validate({**values, **changes})


QLORA: dict[str, Any] = {
    "name": "qlora",
    "rank": 2,
    "alpha": 4.0,
    "dropout": 0.0,
    "targets": "all-linear",
    "quantization": "nf4",
    "double_quantization": True,
    "compute_dtype": "auto",
}
LORA: dict[str, Any] = {"name": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "all-linear"}
ADALORA: dict[str, Any] = {
    "name": "adalora",
    "rank": 4,
    "target_rank": 2,
    "alpha": 4.0,
    "dropout": 0.0,
    "targets": "all-linear",
    "warmup_steps": 1,
    "final_steps": 2,
    "every_steps": 1,
    "orthogonality": 0.5,
    "smoothing": 0.85,
}
IA3: dict[str, Any] = {"name": "ia3", "targets": ["k_proj", "v_proj", "down_proj"], "inputs_of": ["down_proj"]}
LOREFT: dict[str, Any] = {
    "name": "loreft",
    "rank": 2,
    "layers": "all",
    "component": "block_output",
    "positions": "last",
    "share_weights": False,
    "bias": True,
    "dropout": 0.0,
    "cache_mib": 16,
}
LEARNT_PROMPTS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"name": "prompt_tuning", "tokens": 4, "start": "random", "text": ""},
    "prompt_tuning from words": {"name": "prompt_tuning", "tokens": 4, "start": "vocabulary", "text": ""},
    "p_tuning mlp": {"name": "p_tuning", "tokens": 4, "encoder": "mlp", "hidden_size": 8, "dropout": 0.0},
    "p_tuning lstm": {"name": "p_tuning", "tokens": 4, "encoder": "lstm", "hidden_size": 8, "dropout": 0.0},
    "prefix": {"name": "prefix", "tokens": 4, "hidden_size": 8},
    "p_tuning_v2": {"name": "p_tuning_v2", "tokens": 4},
}
LORA_8_BIT: dict[str, Any] = {**LORA, "name": "lora8bit", "outlier_threshold": 6.0}
SFT = {"name": "sft", "label_smoothing": 0.0, "neftune_alpha": 0.0}
ORPO = {"name": "orpo", "weight": 0.1, "likelihood": "reply"}
DPO = {"name": "dpo", "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "reference": "adapter_off"}
SIMPO = {"name": "simpo", "beta": 2.0, "gamma": 0.5}
KTO = {
    "name": "kto",
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "reference": "adapter_off",
}


def method(adapter: dict[str, Any], objective: dict[str, Any], **changes: Any) -> Method:
    """A short training."""
    values: dict[str, Any] = {
        "adapter": adapter,
        "objective": objective,
        "epochs": 1,
        "batch_size": 4,
        "micro_batch_size": changes.get("batch_size", 4),
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "checkpoint_every_steps": 2,
        "evaluation": "none",
        "samples": "none",
        "fit_memory": False,
        "report_to": [],
        "seed": 1,
    }
    return Method.model_validate({**values, **changes})


RENDER = Render(held_out=0.1, max_tokens=128, too_long="refuse", loss_on="all")

CHECKS = {name: {"action": "reject", "mostly": 0.0} for name in Checks.model_fields}


def validate_params(checks: dict[str, str] | None = None, **changes: Any) -> Validate:
    """Every check rejects, whatever share fails, unless an action is given for it."""
    actions = {name: {"action": action, "mostly": 0.0} for name, action in (checks or {}).items()}
    values: dict[str, Any] = {
        "max_quarantined": 0.5,
        "max_turns": 8,
        "max_characters": 500,
        "outlier_deviations": 100.0,
        "contamination_ngram": 13,
        "checks": {**CHECKS, **actions},
        "duplicates": {
            "exact": "drop",
            "near": "drop",
            "similarity": 0.7,
            "permutations": 128,
            "bands": 32,
            "keep": "first",
        },
    }
    return Validate.model_validate({**values, **changes})


def file_source(path: Path, **changes: Any) -> FileSource:
    """A file of rows to learn from, told by its content; no row of it may be malformed."""
    values: dict[str, Any] = {
        "kind": "file",
        "path": str(path),
        "use": "train",
        "licence": "CC0-1.0",
        "format": "auto",
        "encoding": "utf-8",
        "max_refused": 0.0,
        "take": "all",
    }
    return FileSource.model_validate({**values, **changes})


EVALUATE = Evaluate(
    rows=8,
    batch_size=4,
    max_new_tokens=3,
    bootstrap_samples=200,
    confidence=0.95,
    seed=1,
    generation=GREEDY,
    suites={},
    general_text="none",
)


def stored(folder: Path) -> dict[str, Any]:
    """The tensors of a model folder as its file holds them."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    return tensors


def rows_suite(path: Path | str, metric: dict[str, Any], columns: dict[str, Any], **changes: Any) -> RowsSuite:
    """A suite of one file of rows, asked plainly."""
    values: dict[str, Any] = {
        "kind": "rows",
        "path": str(path),
        "sha256": "none",
        "files": "*",
        "task": "one",
        "columns": columns,
        "prompt": "{{ question }}",
        "delimiter": " ",
        "metric": metric,
        "shots": "none",
        "max_new_tokens": 4,
        "limit": "none",
        "chat_template": False,
    }
    return RowsSuite.model_validate({**values, **changes})


CHOICE = {"name": "choice", "endings": "texts", "normalise": "none"}
MULTIPLE = {"question": "question", "choices": "choices", "answer": "answer"}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file with a JSON object in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
