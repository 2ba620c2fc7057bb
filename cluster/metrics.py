"""Prometheus metrics of a run, served by the Ray cluster, each with the tags `run` and `stage`.

Ray's agent on every node serves them as `ray_calibprune_...`, counters with the suffix `_total`. The Grafana
dashboard for them is grafana/calibprune.json.
"""

from typing import Any

from ray.util.metrics import Counter, Gauge

from calibprune.events import Event, EventHandler, Lost, Pace, Resumed, StageBegun, UnitDone
from calibprune.stage import Record
from cluster.label import Label


def _metric(label: Label, kind: type, name: str, description: str, *tags: str) -> Any:
    metric = kind(f"calibprune_{name}", description, ("run", "stage", *tags))
    return metric.set_default_tags(label.tags)


class WorkMetrics(EventHandler):
    """Metrics of what an engine or worker commits, kept in its process."""

    def __init__(self, label: Label) -> None:
        super().__init__()
        self._label = label
        self._layers: LayerMetrics | None = None
        self._samples: SampleMetrics | None = None

    def handle_event(self, event: Event) -> None:
        if not isinstance(event, UnitDone):
            return
        if "bytes_written" in event.record.facts:
            self._layers = self._layers or LayerMetrics(self._label)
            self._layers.record(event.record)
        elif "finish_reasons" in event.record.facts:
            self._samples = self._samples or SampleMetrics(self._label)
            self._samples.record(event.record)


class LayerMetrics:
    """Metrics of the layers that a worker commits."""

    def __init__(self, label: Label) -> None:
        self._layers = _metric(label, Counter, "layers_pruned", "Layers committed.")
        self._read = _metric(label, Counter, "checkpoint_read_bytes", "Bytes of layers read.")
        self._written = _metric(
            label, Counter, "checkpoint_written_bytes", "Bytes of shards written."
        )
        self._seconds = _metric(
            label, Gauge, "layer_seconds", "Seconds of a layer by kind of work.", "layer", "work"
        )
        self._memory = _metric(
            label, Gauge, "peak_memory_bytes", "Peak memory of a worker.", "worker"
        )
        self._sparsity = _metric(
            label, Gauge, "sparsity", "Fraction of a linear's weights that are zero.", "layer", "linear"
        )  # fmt: skip
        self._error = _metric(
            label, Gauge, "relative_output_error", "||(W - W') X|| / ||W X||.", "layer", "linear"
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


class SampleMetrics:
    """Metrics of the shards of samples that an engine commits."""

    def __init__(self, label: Label) -> None:
        self._shards = _metric(label, Counter, "shards_committed", "Shards of samples committed.")
        self._samples = _metric(label, Counter, "samples", "Samples committed.")
        self._tokens = _metric(
            label, Counter, "generated_tokens", "Tokens generated and committed."
        )

    def record(self, record: Record) -> None:
        self._shards.inc()
        for counter, name in ((self._samples, "rows"), (self._tokens, "tokens")):
            if record.facts.get(name):
                counter.inc(record.facts[name])


class QueueMetrics:
    """Metrics of the driver's work queue."""

    def __init__(self, label: Label) -> None:
        self._waiting = _metric(label, Gauge, "units_waiting", "Units that wait for an engine.")
        self._running = _metric(label, Gauge, "units_running", "Units in progress on an engine.")
        self._ready = _metric(label, Gauge, "engines_ready", "Engines that are ready for units.")

    def record(self, waiting: int, running: int, ready: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)
        self._ready.set(ready)


class StageMetrics(EventHandler):
    """Metrics of a stage's progress and losses, kept in the driver."""

    def __init__(self, label: Label) -> None:
        super().__init__()
        self._units = _metric(label, Gauge, "units", "Units of a stage.")
        self._done = _metric(label, Gauge, "units_done", "Committed units of a stage.")
        self._left = _metric(
            label, Gauge, "seconds_left", "Expected seconds until the stage is done."
        )
        self._failures = _metric(label, Counter, "failures", "Losses by kind.", "kind")
        self._pace = Pace(0, 0)

    def handle_event(self, event: Event) -> None:
        match event:
            case StageBegun():
                self._pace = Pace(event.units, event.done)
            case UnitDone():
                self._pace.add()
            case Resumed():
                self._pace.to(event.done)
            case Lost():
                self._failures.inc(1, {"kind": event.kind})
                return
            case _:
                return
        self._units.set(self._pace.total)
        self._done.set(self._pace.done)
        if self._pace.seconds_left is not None:
            self._left.set(self._pace.seconds_left)
