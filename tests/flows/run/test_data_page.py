"""The drift of the data as it was logged, read back for the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.registered import workspace_at
from flows.run.data_page import NUMBERS, logged_drift, publish_data_page
from tasks.registry.client import connect
from tasks.validate.profile import EDGES, drift


def numbers(counts: list[int]) -> dict[str, Any]:
    histograms = {name: [*counts, *([0] * (len(edges) - len(counts)))] for name, edges in EDGES.items()}
    sides: dict[str, Any] = {
        "quarantine": [],
        "refused": [],
        "checks": {},
        "contamination": {},
        "repairs": {},
        "sources": {},
    }
    rows = dict.fromkeys(("checked", "clean", "quarantined", "merged", "repaired", "refused"), sum(counts))
    pairs = {"exact": 0, "near": 0, "examples": []}
    return {"rows": rows, "histograms": histograms, "scripts": {"latin": counts[0]}, "duplicates": pairs, **sides}


def validated(workspace: Path, counts: list[int]) -> dict[str, Any]:
    """Leaves what `validate` would, of other data each time, and logs it."""
    found = numbers(counts)
    (workspace / NUMBERS).parent.mkdir(parents=True, exist_ok=True)
    (workspace / NUMBERS).write_text(json.dumps(found))
    lock = {"stages": {"validate": {"cmd": "validate", "deps": [{"path": "data/raw", "md5": str(counts)}]}}}
    (workspace / "dvc.lock").write_text(json.dumps(lock))  # YAML, too
    publish_data_page(connect(workspace), workspace)
    return found


def test_the_logged_drift_is_that_against_the_state_before(tmp_path: Path) -> None:
    workspace = workspace_at(tmp_path / "work")
    assert logged_drift(workspace) == {}
    first = validated(workspace, [5, 1])
    assert logged_drift(workspace) == {}
    second = validated(workspace, [1, 9])
    assert logged_drift(workspace) == drift(second, first)
    assert logged_drift(workspace)["words"] > 0.25
