"""Promotion as a flow: the verdict is on the run's page, and there a person may be asked."""

# no postponed annotations here, as in retrain.py
from pathlib import Path

from prefect import flow

from flows.registry import promotion
from flows.registry.approval import show_verdict
from flows.registry.promotion import Promotion


@flow(name="promote", validate_parameters=False)
def promote(workspace: Path, version: str | None = None, reason: str = "", record: str | None = None) -> Promotion:
    """Make a version champion if the gate lets it; see `flows.registry.promotion.promote`."""
    return promotion.promote(workspace, version, reason, show_verdict, record)
