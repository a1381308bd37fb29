"""What the tags of a registered version are called."""

from __future__ import annotations

METHOD = "temper.method"
TRAIN_KEY = "temper.train_key"
GIT_COMMIT = "temper.git_commit"
MANIFEST = "temper.model_manifest_sha256"
WEIGHTS = "temper.weights_sha256"
BASE_WEIGHTS = "temper.base_weights_sha256"
HELD_OUT_ROWS = "temper.held_out_rows"
TRAINING_TEMPLATE = "temper.training_template_sha256"
EVALUATION_TEMPLATE = "temper.evaluation_template_sha256"
TEMPLATE = "temper.template_sha256"
"""The template that the model is served with."""
MEAN_KL = "temper.mean_kl"
"""Of the model that was trained against the one that is served, nats per token."""
LEAKED = "temper.leaked"
"""By suite, the share of its items that stand in the rows that were learnt; JSON."""
REPORT = "temper.report"
"""Where among the artifacts of its run the report is that belongs to this version."""
LINEAGE = "temper.lineage"
"""Where its lineage is, likewise."""
VERDICT = "temper.verdict"
"""The gate's last verdict, as JSON."""
VERDICT_DIGEST = "temper.verdict_sha256"
SIGNED = "temper.signed"
"""Whether the model's files were signed when it was registered."""


def digest_of(file: str) -> str:
    """The tag with the SHA-256 of a file of the report."""
    return f"temper.{file}_sha256"


def score_of(suite: str) -> str:
    """The tag with the mean score on a suite."""
    return f"temper.score.{suite}"
