"""What done records say, as Prometheus metrics of the Ray cluster."""

from ray.util.metrics import Counter, Gauge

from calibprune.run import Record


class LayerMetrics:
    """Set on the worker that committed a layer; Ray's own agent on every node serves them."""

    def __init__(self) -> None:
        self._layers = Counter("calibprune_layers_pruned", "Layers committed.")
        self._read = Counter("calibprune_checkpoint_read_bytes", "Bytes of layers read.")
        self._written = Counter("calibprune_checkpoint_written_bytes", "Bytes of shards written.")
        self._seconds = Gauge(
            "calibprune_layer_seconds", "Seconds by kind of work.", ("layer", "work")
        )
        self._memory = Gauge(
            "calibprune_peak_memory_bytes", "Peak memory of a worker.", ("worker",)
        )
        self._sparsity = Gauge(
            "calibprune_sparsity",
            "Fraction of a linear's weights that are zero.",
            ("layer", "linear"),
        )
        self._error = Gauge(
            "calibprune_relative_output_error", "||(W - W') X|| / ||W X||.", ("layer", "linear")
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
    """Set on the worker that committed a shard of samples."""

    def __init__(self) -> None:
        self._shards = Counter("calibprune_shards_committed", "Shards of samples committed.")
        self._samples = Counter("calibprune_samples", "Samples committed.")
        self._tokens = Counter("calibprune_generated_tokens", "Tokens generated and committed.")

    def record(self, record: Record) -> None:
        self._shards.inc()
        for counter, name in ((self._samples, "rows"), (self._tokens, "tokens")):
            if record.facts.get(name):
                counter.inc(record.facts[name])
