"""Evaluate the untouched base model, once: the yardstick of every method and of the gate.

Reads:  data/base/, held-out chats of data/rendered/ (of an encoder-decoder model: pairs).
Writes: data/reports/base/examples.parquet and metrics.json.
Params: evaluate
Fails:  no held-out rows (65, never retried).
"""

from __future__ import annotations

from tasks.core.layout import STATE
from tasks.core.stage import run_stage
from tasks.evaluate.params import Evaluate
from tasks.evaluate.stage import evaluate_model


def main() -> None:
    """Run the stage `baseline`."""
    with run_stage(__doc__, "model", "rendered", "out", may_fetch=True) as stage:
        evaluate_model(
            stage.path("model"),
            stage.path("rendered"),
            stage.path("out"),
            "base",
            None,
            stage.section("evaluate", Evaluate),
            stage.workspace / STATE,
        )


if __name__ == "__main__":
    main()
