"""Evaluates the untouched base model, once: the yardstick of every method and of the gate.

Reads:  data/base/, held-out chats of data/rendered/ (of an encoder-decoder model: pairs).
Writes: data/reports/base/examples.parquet and metrics.json.
Params: evaluate
Fails:  no held-out rows (65, never retried).
"""

from __future__ import annotations

from tasks import process
from tasks.evaluate import evaluate_model
from tasks.journal import STATE


def main() -> None:
    """The stage `baseline`."""
    with process.stage(__doc__, "model", "rendered", "out", may_fetch=True) as stage:
        evaluate_model(
            stage.path("model"),
            stage.path("rendered"),
            stage.path("out"),
            "base",
            None,
            stage.params.evaluate,
            stage.workspace / STATE,
        )


if __name__ == "__main__":
    main()
