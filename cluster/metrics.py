"""What records and drivers say, as Prometheus metrics of the Ray cluster, each with the tags `run` and `stage`.

Ray's own agent on every node serves them, as `ray_calibprune_...`, counters with `_total` behind the name. Grafana's
dashboard for them is grafana/calibprune.json.
"""

from typing import Any

from ray.util.metrics import Counter, Gauge

from calibprune.failures import Failure
from calibprune.stage import Record
from cluster.label import Label


class _Metrics:
    def __init__(self, label: Label) -> None:
        self._label = label

    def _make(self, kind: type, name: str, description: str, *tags: str) -> Any:
        metric = kind(f"calibprune_{name}", description, ("run", "stage", *tags))
        return metric.set_default_tags(self._label.tags)


class LayerMetrics(_Metrics):
    """Set on the worker that committed a layer."""

    def __init__(self, label: Label) -> None:
        super().__init__(label)
        self._layers = self._make(Counter, "layers_pruned", "Layers committed.")
        self._read = self._make(Counter, "checkpoint_read_bytes", "Bytes of layers read.")
        self._written = self._make(Counter, "checkpoint_written_bytes", "Bytes of shards written.")
        self._seconds = self._make(Gauge, "layer_seconds", "By kind of work.", "layer", "work")
        self._memory = self._make(Gauge, "peak_memory_bytes", "Peak of a worker.", "worker")
        self._sparsity = self._make(
            Gauge, "sparsity", "Fraction of a linear's weights that are zero.", "layer", "linear"
        )
        self._error = self._make(
            Gauge, "relative_output_error", "||(W - W') X|| / ||W X||.", "layer", "linear"
        )

    def record(self, record: Record) -> None:
        facts = record.facts
        for counter, name in ((self._read, "bytes_read"), (self._written, "bytes_written")):
            if facts.get(name):  # a counter takes no zero
                counter.inc(facts[name])
        if "layer" not in facts:
            return
        layer = str(facts["layer"])
        self._layers.inc()
        self._memory.set(facts["peak_memory_bytes"], {"worker": str(facts["worker"])})
        for work, seconds in facts["seconds"].items():
            self._seconds.set(seconds, {"layer": layer, "work": work})
        for linear, of in facts["linears"].items():
            tags = {"layer": layer, "linear": linear}
            self._sparsity.set(of["zeros"] / of["parameters"], tags)
            self._error.set(of["relative_error"], tags)


class SampleMetrics(_Metrics):
    """Set on the worker that committed a shard of samples."""

    def __init__(self, label: Label) -> None:
        super().__init__(label)
        self._shards = self._make(Counter, "shards_committed", "Shards of samples committed.")
        self._samples = self._make(Counter, "samples", "Samples committed.")
        self._tokens = self._make(Counter, "generated_tokens", "Tokens generated and committed.")

    def record(self, record: Record) -> None:
        self._shards.inc()
        for counter, name in ((self._samples, "rows"), (self._tokens, "tokens")):
            if record.facts.get(name):
                counter.inc(record.facts[name])


class QueueMetrics(_Metrics):
    """Set by the driver that hands units to a crew."""

    def __init__(self, label: Label) -> None:
        super().__init__(label)
        self._waiting = self._make(Gauge, "units_waiting", "Units that no engine has yet.")
        self._running = self._make(Gauge, "units_running", "Units under way on an engine.")
        self._ready = self._make(Gauge, "engines_ready", "Engines that take units.")

    def record(self, waiting: int, running: int, ready: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)
        self._ready.set(ready)


class StageMetrics(_Metrics):
    """Set by the driver: how far a stage is, and what failed."""

    def __init__(self, label: Label) -> None:
        super().__init__(label)
        self._units = self._make(Gauge, "units", "Units of a stage.")
        self._done = self._make(Gauge, "units_done", "Units that are committed.")
        self._left = self._make(Gauge, "seconds_left", "Expected, at the recent pace.")
        self._failures = self._make(Counter, "failures", "What was lost, by kind.", "kind")

    def record(self, done: int, units: int, seconds_left: float | None) -> None:
        self._units.set(units)
        self._done.set(done)
        if seconds_left is not None:
            self._left.set(seconds_left)

    def failed(self, failure: Failure) -> None:
        self._failures.inc(1, {"kind": failure.kind})
