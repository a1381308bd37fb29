"""Names in the MLflow registry: of models, aliases and tags, and of what a version holds."""

from __future__ import annotations

import re

CHAMPION, CHALLENGER = "champion", "challenger"
"""The aliases that temper itself gives: what is in use, and what was registered last."""

ARTIFACT = "model"
"""The name under which a version keeps its model folder."""

ABOUT = "about.d"
"""And its description: card, lineage, bill of materials, signature. No method can be called so."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ALIAS = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"v\d+")


def registry_name(name: str) -> str:
    """Check that a text is a valid name of a registered model, and return it.

    MLflow itself lets through names that look alike (Cyrillic letters) or that no address can hold.

    Raises:
        ValueError: it is none.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError("a name may use A-Z a-z 0-9 . _ - and begins with a letter or digit, at most 100 characters")
    return name


def method_alias(alias: str) -> str:
    """Check that a method may have this name, which becomes the alias of its latest version; return it.

    A method with the name of an alias that means something else would move that alias past the gate.

    Raises:
        ValueError: MLflow or temper gives the alias another meaning, or it has other characters.
    """
    if alias in (CHAMPION, CHALLENGER, "latest") or _VERSION.fullmatch(alias):
        raise ValueError(f'alias "{alias}" is reserved: call the method otherwise')
    if _ALIAS.fullmatch(alias) is None:
        raise ValueError("an alias may use a-z 0-9 _ -, at most 64 characters")
    return alias


METHOD = "temper.method"
TRAIN_KEY = "temper.train_key"
GIT_COMMIT = "temper.git_commit"
MANIFEST_TAG = "temper.model_manifest_sha256"
WEIGHTS_TAG = "temper.weights_sha256"
BASE_WEIGHTS = "temper.base_weights_sha256"
HELD_OUT_COUNT = "temper.held_out_rows"
TRAINING_TEMPLATE = "temper.training_template_sha256"
EVALUATION_TEMPLATE = "temper.evaluation_template_sha256"

TEMPLATE_TAG = "temper.template_sha256"
"""The template that the model is served with."""

MEAN_KL = "temper.mean_kl"
"""Of the model that was trained against the one that is served, nats per token."""

CONTAMINATION = "temper.contamination"
"""By suite, the share of its items that stand in the training rows; JSON."""

REPORT = "temper.report"
"""Where among the artifacts of its run the report is that belongs to this version."""

LINEAGE_TAG = "temper.lineage"
"""Where its lineage is, likewise."""

VERDICT = "temper.verdict"
"""The gate's last verdict, as JSON."""
VERDICT_DIGEST = "temper.verdict_sha256"

SIGNED = "temper.signed"
"""Whether the model's files were signed when it was registered."""


def digest_of(file: str) -> str:
    """Return the tag with the SHA-256 of a file of the report."""
    return f"temper.{file}_sha256"


def score_of(suite: str) -> str:
    """Return the tag with the mean score on a suite."""
    return f"temper.score.{suite}"
