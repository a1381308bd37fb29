"""A workspace whose models were trained and evaluated, as far as files tell: made from a seed, with no model run."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from tasks.core.artifacts import as_json
from tasks.evaluate.answer_metrics import answer_statistics
from tasks.evaluate.params import Evaluate
from tasks.orchestration.params import load_params
from tasks.reports.statistics import bootstrap
from tests.conftest import ROOT

SUITES: Mapping[str, tuple[str, ...]] = {
    "held_out": ("arithmetic", "counting", "dates", "ordering", "reading", "translation", "units", "words"),
    "agieval": ("aqua_rat", "logiqa_en", "lsat_ar", "sat_math"),
    "gsm8k": ("gsm8k",),
}
SKILL = {"base": 0.08, "qlora": 0.9, "orpo": 0.86, "reft": 0.62}
"""How likely a model is right on an item of middling difficulty."""


def write_workspace(folder: Path, rows: int = 24, seed: int = 1) -> Path:
    """Writes params, the graph, reports of the base and three methods, their adapters and the times of their stages."""
    folder.mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder / name)
    params = load_params(folder / "params.yaml").evaluate.model_copy(update={"bootstrap_samples": 200})
    for model in SKILL:
        write_report(folder, model, items(model, rows, seed), params)
        if model != "base":
            _write_adapter(folder, model, seed)
    return folder


def items(model: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """So many rows of examples.parquet in each suite."""
    made = []
    for suite, tasks in SUITES.items():
        for number in range(rows):
            task = tasks[number % len(tasks)]
            asked = Random(f"{seed} {suite} {number}")  # the same of every model
            one, other, hard = asked.randrange(10, 99), asked.randrange(10, 99), asked.random()
            prompt = f"<|im_start|>user\nA shop has {one} {task} and gets {other} more. How many?<|im_end|>\n"
            right = Random(f"{model} {prompt}").random() < SKILL[model] * (
                1.2 - 0.5 * hard - 0.4 * (suite != "held_out")
            )
            made.append(item(suite, task, number, prompt, str(one + other), str(one + other + (not right) * 10)))
    return made


def item(suite: str, task: str, number: int, prompt: str, target: str, prediction: str) -> dict[str, Any]:
    """One row of examples.parquet, scored by exact match."""
    return {
        "suite": suite,
        "task": task,
        "id": f"{suite}-{number}",
        "prompt": prompt,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "target": target,
        "prediction": prediction,
        "score": float(prediction == target),
        "logp": -0.5 * len(target),
        "tokens": len(target),
    }


def write_report(folder: Path, model: str, rows: list[dict[str, Any]], params: Evaluate) -> None:
    """Writes examples.parquet and metrics.json of a model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = folder / "data" / "reports" / model
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), out / "examples.parquet")
    suites: dict[str, Any] = {}
    for suite in sorted({row["suite"] for row in rows}):
        of_suite = [row for row in rows if row["suite"] == suite]
        tasks = {
            task: {**_scored([row for row in of_suite if row["task"] == task], params), "figures": {}}
            for task in sorted({row["task"] for row in of_suite})
        }
        suites[suite] = {**_scored(of_suite, params), "tasks": tasks}
    metrics = {
        "model": model,
        "loss": -sum(row["logp"] for row in rows) / sum(row["tokens"] for row in rows),
        "exact_match": suites["held_out"]["score"],
        "suites": suites,
        "answers": answer_statistics([row["prediction"] for row in rows], [row["tokens"] for row in rows]),
    }
    if model != "base":
        metrics["forgetting"] = {"loss": 3.3 + SKILL[model] / 10, "base_loss": 3.3, "tokens": 20000}
    (out / "metrics.json").write_text(as_json(metrics))
    costs = folder / ".temper" / "costs"
    costs.mkdir(parents=True, exist_ok=True)
    (costs / f"{model}.json").write_text(
        as_json({"seconds": 31.5, "tokens": 4000, "tokens_per_s": 4000 / 31.5, "device": "cpu"})
    )


def _scored(rows: list[dict[str, Any]], params: Evaluate) -> dict[str, Any]:
    score = bootstrap([row["score"] for row in rows], params.resampling)._asdict()
    return {"metric": "exact_match", "rows": len(rows), "score": score}


def _write_adapter(folder: Path, method: str, seed: int) -> None:
    random, steps, floor = Random(f"{seed} {method}"), 300, 1.05 - SKILL[method]
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = floor + 4 * math.exp(-step / 40)
        row = {"step": step, "loss": loss * random.uniform(0.8, 1.25), "learning_rate": 1e-3}
        log.append(row | ({"held_out_loss": loss * 1.1} if step % 50 == 0 else {}))
    adapter = folder / "data" / "adapters" / method
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 850_000)
    (adapter / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    summary = {
        "key": f"key of {method}",
        "method": method,
        "steps": steps,
        "kept_step": steps,
        "tokens": 1_234_567,
        "trainable_parameters": 212_992,
        "held_out_loss_before": 4.6,
        "held_out_loss_after": log[-1]["held_out_loss"],
        "params": {"adapter": {"name": "qlora"}, "objective": {"name": "sft"}},
    }
    (adapter / "summary.json").write_text(as_json(summary))
    entry = {"stage": f"train@{method}", "state": "completed", "seconds": 154.3, "key": f"key of {method}", "at": ""}
    with (folder / ".temper" / "journal.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
