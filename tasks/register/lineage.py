"""Lineage of a model: base, rows, params, code, and what was measured on the way, in one object."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.adapters.files import identify_base
from tasks.core.artifacts import MANIFEST, digest, read_manifest
from tasks.core.layout import BASE_EXAMPLES, EQUIVALENCE, EXAMPLES, METRICS
from tasks.register.contamination import contamination_by_suite
from tasks.reports.items import by_suite, read_items
from tasks.tokenization.chat_template import load_tokenizer, template_digest


class StagePaths(NamedTuple):
    """Outputs of the stages that belong to one version: folders, and the file of the base model's items."""

    model: Path
    reports: Path
    baseline: Path
    adapter: Path
    base: Path
    rendered: Path


def lineage_of(
    workspace: Path, method: str, made: StagePaths, key: str, model_name: str, sources: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """All that is known of a model: the same content of the same commit gives the same object.

    Args:
        workspace: whose commit it is.
        method: which trained it.
        made: what the stages made.
        key: of the version, as `version_key` computes it.
        model_name: that it is registered under.
        sources: of the rows, by name: kind, use and licence.
    """
    summary, metrics = (
        json.loads(file.read_text()) for file in (made.adapter / "summary.json", made.reports / METRICS)
    )
    model, rendered, base = read_manifest(made.model), read_manifest(made.rendered), identify_base(made.base)
    items, tokenizer = read_items(made.reports / EXAMPLES), load_tokenizer(made.model)
    adapter = read_manifest(made.adapter)["files"]
    return {
        "model": model_name,
        "method": method,
        "key": key,
        "git_commit": git_commit(workspace),
        "base": {"kind": read_manifest(made.base)["base"]["kind"], **base._asdict()},
        "adapter": summary["params"]["adapter"]["name"],
        "objective": summary["params"]["objective"]["name"],
        "training": {
            "key": summary["key"],
            "steps": summary["steps"],
            "held_out_loss": summary["held_out_loss_after"],
            "params": summary["params"],
            "files": {name: file["sha256"] for name, file in adapter.items()},
        },
        "data": {
            "sources": sources,
            "rendered": summary["data"],
            "rows": {
                split: {kind: told["rows"] for kind, told in rendered[split].items()} for split in ("train", "held_out")
            },
            "train_rows": summary["rows"],
        },
        "merge": json.loads((made.model / EQUIVALENCE).read_text()),
        "templates": {
            "training": rendered["template_sha256"],
            "evaluation": metrics["template_sha256"],
            "model": template_digest(tokenizer),
        },
        "evaluation": _evaluation(made, metrics),
        "contamination": contamination_by_suite(items, made.rendered, tokenizer, rendered["contamination_ngram"]),
        "files": {name: file["sha256"] for name, file in model["files"].items()},
        "manifest_sha256": digest(made.model / MANIFEST),
    }


def _evaluation(made: StagePaths, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of the model and its base, and the digests of the files that hold them."""
    base = by_suite(read_items(made.baseline))
    return {
        "suites": metrics["suites"],
        "base": {suite: math.fsum(item.score for item in found.values()) / len(found) for suite, found in base.items()},
        "files": {
            EXAMPLES: digest(made.reports / EXAMPLES),
            METRICS: digest(made.reports / METRICS),
            BASE_EXAMPLES: digest(made.baseline),
        },
    }


def git_commit(workspace: Path) -> str:
    """Return the commit that the workspace is at, with a `+` when files differ from it; empty outside git."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=workspace, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=workspace, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+" if changed.strip() else commit
