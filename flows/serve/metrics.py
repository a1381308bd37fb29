"""Figures for Prometheus: requests, tokens, latency, first token and queue, by model and version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tasks.inference.continuous_batching import State

if TYPE_CHECKING:
    from tasks.validate.profile import Shift

_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OF_VERSION = ("model", "version", "route")

States = Callable[[], Iterable[tuple[str, str, State]]]
"""Gives the state of every engine, with its model and version."""


class Metrics:
    """Counters of one server.

    Args:
        states: of the engines, asked when somebody looks.
    """

    def __init__(self, states: States) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(states))
        common: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter(
            "temper_requests", "Requests that ended", (*_OF_VERSION, "endpoint", "status"), **common
        )
        self.prompt_tokens = Counter("temper_prompt_tokens", "Tokens of prompts", _OF_VERSION, **common)
        self.answer_tokens = Counter("temper_answer_tokens", "Tokens of answers", _OF_VERSION, **common)
        self.seconds = Histogram(
            "temper_request_seconds", "From a request to the end of its answer", _OF_VERSION, buckets=_SECONDS, **common
        )
        self.first_token_s = Histogram(
            "temper_first_token_seconds", "To the first token of an answer", _OF_VERSION, buckets=_SECONDS, **common
        )
        self.shadow_dropped = Counter(
            "temper_shadow_dropped", "Requests that a shadow had no room for", ("model", "version"), **common
        )
        self.feedback = Counter("temper_feedback", "What people said of answers", ("kind",), **common)
        self._drift = Gauge(
            "temper_drift", "Stability index of prompts beside the training rows", ("column",), **common
        )
        self._drift_by_chance = Gauge(
            "temper_drift_by_chance", "What it is on average where nothing moved", ("column",), **common
        )

    def tell_drift(self, columns: Mapping[str, Shift]) -> None:
        """Tell how far prompts moved from the rows that were trained on."""
        for name, each in columns.items():
            if each.rows and each.rows_before:
                self._drift.labels(name).set(each.psi)
                self._drift_by_chance.labels(name).set(each.expected)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    def __init__(self, states: States) -> None:
        self._states = states

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what the engines do at this moment."""
        about = {
            "running": "Requests that are being answered",
            "waiting": "Requests in the queue",
            "cache_bytes": "Memory of keys and values",
            "most_cache_bytes": "The most memory of keys and values",
            "tokens": "Tokens written since the version was loaded",
        }
        states = list(self._states())
        for name, said in about.items():
            family = GaugeMetricFamily(f"temper_engine_{name}", said, labels=("model", "version"))
            for model, version, state in states:
                family.add_metric((model, version), getattr(state, name))
            yield family
