"""Counters for Prometheus, of all Senders and Receivers of this process. Needs prometheus-client (the extra `metrics`).

    rdmaxfer.metrics.serve(9400)

answers at http://127.0.0.1:9400/metrics; in a program that has an endpoint of its own, `REGISTRY.register(Collector())`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rdmaxfer.node import nodes
from rdmaxfer.statistics import Latency

if TYPE_CHECKING:
    from prometheus_client.core import Metric

GAUGES = {"peers", "reconnecting", "unreleased", "leased", "pinned_bytes"}
"""Statistics that go up and down. All others count from the beginning."""
LABELS = ("role", "name", "id")
QUANTILES = (("0.5", "median_s"), ("0.9", "p90_s"), ("0.99", "p99_s"), ("1", "most_s"))


class Collector:
    """Reads `statistics()` whenever Prometheus asks. Each metric is called rdmaxfer_FIELD; `id` tells those of one name apart."""

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for node in nodes():
            labels = [node.role, node.identity or node.name, node.id.hex()[:8]]
            statistics = node.statistics()
            for field in dataclasses.fields(statistics):
                value = getattr(statistics, field.name)
                name = f"rdmaxfer_{field.name}"
                if isinstance(value, Latency):
                    family = families.setdefault(
                        name, GaugeMetricFamily(f"{name}_seconds", "see rdmaxfer.Latency", labels=[*LABELS, "quantile"])
                    )
                    for quantile, attribute in QUANTILES:
                        family.add_metric([*labels, quantile], getattr(value, attribute))
                elif isinstance(value, int):
                    kind = GaugeMetricFamily if field.name in GAUGES else CounterMetricFamily
                    what = f"see rdmaxfer.{type(statistics).__name__}"
                    families.setdefault(name, kind(name, what, labels=LABELS)).add_metric(labels, value)
        yield from families.values()


def serve(port: int, address: str = "127.0.0.1") -> int:
    """Answer Prometheus at this port (0: any free one), from a thread that ends with the process. Returns the port.

    Whoever can reach `address` can read the counters. Raises ImportError without prometheus-client, and OSError."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(Collector())
    server, _ = start_http_server(port, addr=address, registry=registry)
    return int(server.server_port)


__all__ = ["Collector", "serve"]
