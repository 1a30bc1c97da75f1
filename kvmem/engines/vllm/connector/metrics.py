"""Shows the connector's counts on vLLM's own /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvmem.engines.vllm.connector.counts import COUNTER, METRICS, key_of, name_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ConnectorStats(KVConnectorStats):
    """Changes of the counts: increases of counters and values of gauges, by `counts.key_of`."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Adds what came later."""
        for key, value in other.data.items():
            is_counter = METRICS[name_of(key)].kind == COUNTER
            self.data[key] = self.data.get(key, 0) + value if is_counter else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log shows of an interval."""
        return {key: round(value, 3) for key, value in self.data.items() if value}


class ConnectorMetrics(KVConnectorPromMetrics):
    """The metrics of `counts.METRICS`, each with vLLM's labels and its own. All exist from the start, as 0."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self.children: dict[int, dict[str, Any]] = {engine: {} for engine in per_engine_labelvalues}
        for name, metric in METRICS.items():
            kind: Any = self._counter_cls if metric.kind == COUNTER else self._gauge_cls
            extra: dict[str, Any] = {} if metric.kind == COUNTER else {"multiprocess_mode": "mostrecent"}
            labels = [*labelnames, metric.label] if metric.label else labelnames
            family = kind(name=name, documentation=metric.documentation, labelnames=labels, **extra)
            for engine, values in per_engine_labelvalues.items():
                for value in metric.label_values:
                    child = family.labels(*values, value) if metric.label else family.labels(*values)
                    self.children[engine][key_of(name, value)] = child

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.items():
            child = self.children[engine_idx][key]
            if METRICS[name_of(key)].kind == COUNTER:
                child.inc(value)
            else:
                child.set(value)
