"""Stand-ins for the stages' outputs, made without training: something to register, promote and roll back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.clock import ROOT
from tasks.register.lineage import StagePaths


def made(folder: Path, base: Path, right: int, *, of: int = 200, method: str = "qlora") -> StagePaths:
    """Write what the stages would have made of a base model that was trained to answer `right` of the held-out rows.

    Args:
        folder: where it is written, an empty one.
        base: a model folder; the model that was tuned is a copy of it.
        right: how many held-out rows it answers; the base itself answers none.
        of: how many there are.
        method: which trained it.
    """
    from tasks.core.artifacts import as_json, atomic_folder
    from tasks.core.layout import EQUIVALENCE, EXAMPLES, METRICS
    from tasks.core.parquet import write_rows
    from tasks.models.loader import model_files
    from tasks.orchestration.params import load_params
    from tasks.render.stage import rendered_schema
    from tasks.reports.items import HELD_OUT, Item, Summary, prompt_digest, suite_metrics, write_items
    from tasks.tokenization.chat_template import load_tokenizer, template_digest

    params = load_params(ROOT / "recipes" / "quickstart.yaml")
    places = StagePaths(*(folder / name for name in StagePaths._fields))._replace(baseline=folder / "baseline.parquet")
    tokenizer = load_tokenizer(base)
    template, ids = template_digest(tokenizer), list(tokenizer("What is trained?")["input_ids"])
    for place in (places.model, places.base):
        with atomic_folder(place, {"base": {"kind": "local"}}) as draft:
            for file in model_files(base):
                shutil.copyfile(file, draft / file.name)
            if place == places.model:
                (draft / EQUIVALENCE).write_text(as_json({"form": "merged", "mean_kl": 1e-4, "answers": right}))
    about: dict[str, Any] = {
        "template_sha256": template,
        "contamination_ngram": params.validate_.contamination_ngram,
        "train": {},
        "held_out": {},
    }
    with atomic_folder(places.rendered, about) as draft:
        (draft / "train").mkdir()
        row = {"id": "1", "family": "", "ids": ids, "mask": [False] * (len(ids) - 1) + [True]}
        write_rows(draft / "train" / "chat.parquet", [row | {"prompt_tokens": len(ids) - 1}], rendered_schema("chat"))
        about["train"]["chat"], about["held_out"]["chat"] = {"rows": 1}, {"rows": of}
    items = []
    for number in range(of):
        prompt = f"What comes after {number}, in words?"
        items.append(Item(HELD_OUT, "t", str(number), prompt, prompt_digest(prompt), "x", "y", 0.0, -2.0, 1))
    write_items(places.baseline, items)
    answers = [
        item._replace(score=float(n < right), logp=-1.0, prediction=item.target if n < right else item.prediction)
        for n, item in enumerate(items)
    ]
    places.reports.mkdir()
    write_items(places.reports / EXAMPLES, answers)
    suites = suite_metrics(answers, {(HELD_OUT, "t"): Summary("exact_match", {})}, params.evaluate.resampling)
    (places.reports / METRICS).write_text(as_json({"suites": suites, "template_sha256": template}))
    summary = {"key": f"train-{right}", "steps": 1, "kept_step": 1, "rows": 1, "held_out_loss_after": 1.0}
    summary |= {"params": params.train[method].model_dump(), "data": {"train/chat.parquet": "0" * 64}}
    with atomic_folder(places.adapter) as draft:
        (draft / "summary.json").write_text(as_json(summary))
        (draft / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return places


def model_and_sources(workspace: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """Return the name that versions of a workspace get, and what their lineage tells of its sources."""
    from tasks.orchestration.params import load_params

    params = load_params(workspace / "params.yaml")
    facts = {"kind", "use", "licence"}
    return params.register_.model, {n: s.model_dump(include=facts) for n, s in params.ingest.sources.items()}


def workspace_at(folder: Path) -> Path:
    """Create a workspace in which nothing has run: the params of the quickstart, and the graph."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder
