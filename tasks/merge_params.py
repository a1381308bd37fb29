"""The section `merge` of params.yaml."""

from __future__ import annotations

from typing import Literal

from tasks.fields import Count, Positive, Section


class Merge(Section):
    """Folding an adapter into the 16-bit base, and how closely the two must agree."""

    onto: Literal["original", "dequantized"]
    """What the update is added to: the base's weights, or what their 4-bit form stands for (what was trained on)."""
    probe_rows: Count
    """Held-out rows on which adapter model and merged model are compared."""
    max_mean_kl: Positive
    """Nats per token, adapter model against merged model."""
