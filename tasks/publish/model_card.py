"""Model cards: Markdown with the head that the Hugging Face hub reads, of adapters, model folders and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.adapters.files import CONFIG, read_adapter_config, said_base
from tasks.adapters.package import FOLDER
from tasks.core.layout import EQUIVALENCE

CARD = "README.md"
SUMMARY = "summary.json"


def card(folder: Path) -> str:
    """Build a model card from what the folder records: base, method, figures, params."""
    if not (folder / CONFIG).is_file():
        return _model_card(folder)
    config, base = read_adapter_config(folder), said_base(folder)
    summary = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else {}
    adapter = summary.get("params", {}).get("adapter", {})
    method = str(adapter.get("name") or config["peft_type"]).lower()
    head = {"library_name": "peft", "tags": ["temper", method], "base_model": base.name}
    facts = {
        "method": method,
        "base": base.name,
        "base revision": base.revision,
        "base weights, SHA-256": base.weights_sha256,
        "trainable parameters": summary.get("trainable_parameters"),
        "training rows": summary.get("rows"),
        "steps": summary.get("steps"),
        "held-out loss before": summary.get("held_out_loss_before"),
        "held-out loss after": summary.get("held_out_loss_after"),
    }
    return _page(head, "Adapter", facts, summary.get("params"))


def _model_card(folder: Path) -> str:
    facts = {"architecture": json.loads((folder / "config.json").read_text()).get("model_type")}
    if (folder / EQUIVALENCE).is_file():
        found = json.loads((folder / EQUIVALENCE).read_text())
        facts |= {"form": found["form"], "mean KL from the model that was trained, nats a token": found["mean_kl"]}
    if (folder / FOLDER).is_dir():
        facts["base weights, SHA-256"] = said_base(folder / FOLDER).weights_sha256
    return _page({"library_name": "transformers", "tags": ["temper"]}, "Model", facts)


def _page(
    head: Mapping[str, Any], title: str, facts: Mapping[str, Any], params: Mapping[str, Any] | None = None
) -> str:
    from huggingface_hub import ModelCardData

    lines = ["---", ModelCardData(**head).to_yaml(), "---", "", f"# {title}", ""]
    lines += ["Made by temper.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    if params:
        lines += ["", "Params:", "", "```json", json.dumps(params, indent=2, sort_keys=True), "```"]
    return "\n".join(lines) + "\n"


# --- of a registered version ------------------------------------------------------------------------------------------


def version_card(lineage: Mapping[str, Any]) -> str:
    """Write the card of a registered version, made of its lineage.

    Args:
        lineage: as `tasks.register.lineage.lineage_of` gives it.
    """
    base, data = lineage["base"], lineage["data"]
    licences = sorted({str(source["licence"]) for source in data["sources"].values()})
    head = {"library_name": "transformers", "tags": ["temper", lineage["method"]], "base_model": base["name"]}
    facts = {
        "method": f"{lineage['method']}: {lineage['adapter']} by {lineage['objective']}",
        "form": lineage["merge"]["form"],
        "base": base["name"] or base["kind"],
        "base revision": base["revision"],
        "base weights, SHA-256": base["weights_sha256"],
        "chat template, SHA-256": lineage["templates"]["model"],
        "training rows": data["train_rows"],
        "git commit": lineage["git_commit"],
    }
    terms = (
        f"The rows are licensed {', '.join(licences)}. The base's own licence applies, too: a tuned model is a "
        "derivative of both."
    )
    sections = [
        _page(head, lineage["model"], facts).rstrip(),
        "## Figures\n\n" + _figures(lineage["evaluation"]),
        "## Data\n\n" + _sources(data["sources"]),
        "## Licence\n\n" + terms,
        "## Limits\n\n" + _limits(lineage),
    ]
    return "\n\n".join(sections) + "\n"


def _figures(evaluation: Mapping[str, Any]) -> str:
    lines = ["| suite | items | metric | score | interval | base |", "|---|---|---|---|---|---|"]
    for suite, found in evaluation["suites"].items():
        score, base = found["score"], evaluation["base"].get(suite)
        lines.append(
            f"| {suite} | {found['rows']} | {found['metric']} | {score['mean']:.3f} | [{score['low']:.3f}, "
            f"{score['high']:.3f}] | {'' if base is None else f'{base:.3f}'} |"
        )
    return "\n".join(lines)


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| source | kind | use | licence |", "|---|---|---|---|"]
    lines += [f"| {name} | {each['kind']} | {each['use']} | {each['licence']} |" for name, each in sources.items()]
    return "\n".join(lines)


def _limits(lineage: Mapping[str, Any]) -> str:
    rows = lineage["evaluation"]["suites"].values()
    found = [f"{share:.1%} of {suite}" for suite, share in lineage["contamination"].items() if share]
    items = sum(each["rows"] for each in rows)
    told = [
        f"It was evaluated on {items} items of the suites above; what it says of anything else is unknown.",
        "Its facts are those of the base and of the rows; it may state wrong ones in the same tone.",
        f"Of the evaluation items these stand in the training rows: {', '.join(found)}." if found else "",
    ]
    return "\n".join(f"- {each}" for each in told if each)
