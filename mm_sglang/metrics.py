"""Prometheus metrics of mm_sparse, beside SGLang's own under --enable-metrics; silent without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

REMEMBERED = 4096  # requests that are not counted again for the same reason


class Metrics:
    """Counters and gauges `mm_sglang:*`; every method does nothing when `on` is false.

    prometheus_client is imported late: SGLang sets PROMETHEUS_MULTIPROC_DIR before its schedulers start.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        if not on:
            return
        from prometheus_client import Counter, Gauge

        def counter(name: str, what: str, *labels: str) -> Any:
            return Counter(f"mm_sglang:{name}", what, labelnames=labels)

        def gauge(name: str, what: str) -> Any:
            return Gauge(f"mm_sglang:{name}", what, multiprocess_mode="mostrecent")

        self._tokens = counter("prefill_tokens_total", "Tokens prefilled, by mode.", "mode")
        self._dense = counter("dense_chunks_total", "Chunks left to the dense backend, by reason.", "reason")
        self._requests = counter("dense_requests_total", "Requests with such chunks, by reason.", "reason")
        self._counted: dict[tuple[str, str], None] = {}
        self._computed = counter("tiles_computed_total", "Tiles computed, in one sampled layer a batch.")
        self._causal = counter("tiles_causal_total", "Tiles dense attention would have computed in the same layers.")
        self._stages = counter("stage_seconds_total", "Device time by stage, in one sampled layer a batch.", "stage")
        self._recall = gauge("recall_mean", "Mean recall of the last probe, over heads.")
        self._worst = gauge("recall_worst", "Recall of the worst head of the last probe.")
        self._chosen = counter("auto_heads_total", "Heads whose recipe auto chose, by pattern.", "pattern")
        self._guarded = counter(
            "guarded_heads_total", "Heads the guard has raised or lowered, by what it did.", "action"
        )

    def sparse_chunk(self, tokens: int) -> None:
        if self.on:
            self._tokens.labels(mode="sparse").inc(tokens)

    def dense_chunk(self, reason: str, tokens: int, rid: str) -> None:
        """A chunk of request `rid`."""
        if not self.on:
            return
        self._tokens.labels(mode="dense").inc(tokens)
        self._dense.labels(reason=reason).inc()
        if (reason, rid) not in self._counted:
            self._requests.labels(reason=reason).inc()
            self._counted[reason, rid] = None
            if len(self._counted) > REMEMBERED:
                del self._counted[next(iter(self._counted))]

    def tiles(self, computed: int, causal: int) -> None:
        if self.on:
            self._computed.inc(computed)
            self._causal.inc(causal)

    def stages(self, milliseconds: Mapping[str, float]) -> None:
        if self.on:
            for stage, value in milliseconds.items():
                self._stages.labels(stage=stage).inc(value / 1e3)

    def recall(self, by_head: torch.Tensor) -> None:
        if self.on:
            self._recall.set(float(by_head.mean()))
            self._worst.set(float(by_head.min()))

    def guarded(self, action: str) -> None:
        if self.on:
            self._guarded.labels(action=action).inc()

    def chosen(self, pattern: str, heads: int) -> None:
        if self.on:
            self._chosen.labels(pattern=pattern).inc(heads)
