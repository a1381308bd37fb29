"""Places: the clone, and the files that one stage writes and another reads."""

from __future__ import annotations

from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
"""The folder that this code runs from, with `tasks`, `data`, `recipes` and dvc.yaml in it."""

METRICS = "metrics.json"

EXAMPLES = "examples.parquet"

EQUIVALENCE = "equivalence.json"
"""Where a model folder says how far it is from the model that was trained."""

STATE = Path(".temper")
"""The folder of a workspace's own state."""

JOURNALS = Path("evaluations")
"""Where it keeps its journals."""


def cost_file(state: Path, name: str) -> Path:
    """Return the file that keeps what the evaluation of a model cost."""
    return state / "costs" / f"{name}.json"


LINEAGE = "lineage.json"

BASE_EXAMPLES = "base.parquet"
"""What the base model's items are called among a version's artifacts."""
