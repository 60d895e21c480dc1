"""Figures of a server as Prometheus reads them, under vLLM's names where they mean the same: dashboards know those.

What happens to each text is counted as it happens; what the ring and its boards say is read when somebody asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flowspec_edge.config import Piece
from flowspec_edge.origin.status import ServiceStatus
from flowspec_edge.web.turns import Turns

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_WHOLE_S = (0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
_LENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody reads
Status = Callable[[], ServiceStatus]


class Metrics:
    """The figures of one server. ``status`` tells of the ring, where there is one."""

    def __init__(self, model: str, turns: Turns, status: Status | None) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Read(model, turns, status))
        self.energy = _Energy(model)
        self._registry.register(self.energy)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return found.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self._registry).labels(model)

        self.queued_s = histogram("vllm:request_queue_time_seconds", "until a text had its turn", _FIRST_S)
        self.first_s = histogram("vllm:time_to_first_token_seconds", "from its turn on", _FIRST_S)
        self.token_s = histogram(
            "vllm:request_time_per_output_token_seconds", "mean of a text, behind its first", _TOKEN_S
        )
        self.whole_s = histogram("vllm:e2e_request_latency_seconds", "a text, its time in the queue included", _WHOLE_S)
        self.acceptance = histogram("flowspec:acceptance_length", "tokens per verification, bonus included", _LENGTHS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "tokens of prompts")
        self.queried_tokens = counter(
            "vllm:prefix_cache_queries", "tokens of prompts that earlier texts could begin like"
        )
        self.cached_tokens = counter("vllm:prefix_cache_hits", "of these, tokens that an earlier text had left")
        self.generation_tokens = counter("vllm:generation_tokens", "tokens written")
        self.rows_sent = counter("flowspec:rows_sent", "rows that entered the ring behind prompts")
        self.rows_useful = counter("flowspec:rows_useful", "rows that became text")
        self.trips = counter("flowspec:trips", "chunks that came back")
        self._ended = Counter(
            "vllm:request_success",
            "texts by how they ended",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._model = model

    def begin(self) -> TextRecord:
        """A text has come."""
        return TextRecord(self)

    def end(self, reason: str) -> None:
        """A text has ended so."""
        self._ended.labels(self._model, reason).inc()

    def write(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class TextRecord:
    """What happens to one text, as it happens."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._came = self._turn = self._last = time.monotonic()
        self._first: float | None = None
        self._num_tokens = self._num_first = 0
        self._reason = "abort"

    def begin_turn(self) -> None:
        self._turn = time.monotonic()
        self._metrics.queued_s.observe(self._turn - self._came)

    def take(self, piece: Piece) -> None:
        if num_tokens := len(piece.token_ids):
            self._last = time.monotonic()
            self._num_tokens += num_tokens
            if self._first is None:
                self._first, self._num_first = self._last, num_tokens
                self._metrics.first_s.observe(self._last - self._turn)
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason
        if (found := piece.statistics) is not None:
            self._metrics.prompt_tokens.inc(found.get("prompt_tokens", 0))
            self._metrics.queried_tokens.inc(found.get("prompt_tokens", 0))
            self._metrics.cached_tokens.inc(found.get("cached_tokens", 0))
            self._metrics.rows_sent.inc(found.get("rows_sent", 0))
            self._metrics.rows_useful.inc(found.get("rows_useful", 0))
            self._metrics.trips.inc(found.get("trips", 0))
            if (joules := found.get("joules")) is not None:
                self._metrics.energy.add(joules, self._num_tokens)
            if length := found.get("acceptance_length"):
                self._metrics.acceptance.observe(length)

    def fail(self) -> None:
        """It ends with an error."""
        self._reason = "error"

    def end(self) -> None:
        metrics = self._metrics
        metrics.generation_tokens.inc(self._num_tokens)
        metrics.whole_s.observe(time.monotonic() - self._came)
        if self._first is not None and (num_behind := self._num_tokens - self._num_first):
            metrics.token_s.observe((self._last - self._first) / num_behind)
        metrics.end(self._reason)


class _Energy(Collector):
    """What boards took for texts. Where none can tell, there are no such figures: none is not nothing."""

    def __init__(self, model: str) -> None:
        self._model, self._joules, self._num_tokens = model, 0.0, 0

    def add(self, joules: float, num_tokens: int) -> None:
        self._joules += joules
        self._num_tokens += num_tokens

    def collect(self) -> Iterator[Metric]:
        if self._num_tokens:
            labels = ["model_name"]
            energy = CounterMetricFamily(
                "flowspec:text_joules", "that boards which can tell took for texts", labels=labels
            )
            tokens = CounterMetricFamily("flowspec:metered_tokens", "of these texts, written here", labels=labels)
            energy.add_metric([self._model], self._joules)
            tokens.add_metric([self._model], self._num_tokens)
            yield from (energy, tokens)


class _Read(Collector):
    """What is read when somebody asks."""

    def __init__(self, model: str, turns: Turns, status: Status | None) -> None:
        self._model, self._turns, self._status = model, turns, status

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "texts that are written", self._turns.num_writing)
        yield self._gauge("vllm:num_requests_waiting", "texts that wait for their turn", self._turns.num_waiting)
        if self._status is None:
            return
        status = self._status()
        yield self._gauge("flowspec:ready", "whether a text can be written now", float(status.is_ready))
        yield self._gauge("flowspec:kept_sessions", "ended ones that the ring keeps", status.kept.num_sessions)
        yield self._gauge("flowspec:kept_session_bytes", "of their caches on all boards", status.kept.num_bytes)
        yield from self._stages(status)
        yield from self._boards(status)
        links = CounterMetricFamily(
            "flowspec:link_bytes", "of the ring's data links at the origin", labels=["direction"]
        )
        links.add_metric(["sent"], status.sent_bytes)
        links.add_metric(["received"], status.received_bytes)
        yield links

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _stages(self, status: ServiceStatus) -> Iterator[Metric]:
        """The rate of the first is a stage's busy share; they begin anew with each ring."""
        labels = ["node"]
        busy = CounterMetricFamily("flowspec:stage_busy_seconds", "in which a stage ran forwards", labels=labels)
        waited = CounterMetricFamily("flowspec:stage_wait_seconds", "that chunks waited for a stage", labels=labels)
        rows = CounterMetricFamily("flowspec:stage_rows", "rows that a stage ran", labels=labels)
        layers = GaugeMetricFamily("flowspec:stage_layers", "layers of a stage", labels=labels)
        for stage in status.stages:
            busy.add_metric([stage.node], stage.work.busy_s)
            waited.add_metric([stage.node], stage.work.waited_s)
            rows.add_metric([stage.node], stage.work.num_rows)
            layers.add_metric([stage.node], stage.stop - stage.start)
        yield from (busy, waited, rows, layers)

    def _boards(self, status: ServiceStatus) -> Iterator[Metric]:
        hot = GaugeMetricFamily("flowspec:board_temperature_celsius", "of boards that can tell", labels=["node"])
        free = GaugeMetricFamily("flowspec:board_free_memory_bytes", "of what a node offers", labels=["node"])
        power = GaugeMetricFamily("flowspec:board_watts", "of boards that can tell", labels=["node"])
        energy = CounterMetricFamily("flowspec:board_joules", "since its node began", labels=["node"])
        told: dict[str, GaugeMetricFamily | CounterMetricFamily]
        told = {"temperature_c": hot, "free_memory_bytes": free, "watts": power, "joules": energy}
        for board in status.boards:
            for name, family in told.items():
                if board.get(name) is not None:
                    family.add_metric([board["node"]], board[name])
        yield from told.values()
