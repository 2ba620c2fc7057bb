"""vLLM engines for the stages that need them: checks that they can work, their needs, and a crew of them."""

import importlib.metadata
import importlib.util

from calibprune import storage
from calibprune.calibration.engine import STREAMED, model_and_revision, vllm_version
from calibprune.config.model import ClusterSettings
from calibprune.errors import UserError
from calibprune.events import note
from calibprune.model import Skeleton
from calibprune.process import host_memory
from calibprune.stage import Stage
from cluster.crew import Crew
from cluster.generator import Generator
from cluster.places import Bundle, Need, capacity
from cluster.session import engine_bundle, needs_gpus
from jobs.run import Run

PLUGGED_IN = ("dclm", "openlm")
"""Types of models that vLLM knows by our plugin."""
MIN_SEQUENCES = 16
"""Number of sequences for whose keys and values the GPUs of an engine must have room beside the weights."""


def on_gpus(cluster: ClusterSettings) -> bool:
    """Returns whether workers will have GPUs, as far as that is known without asking the cluster."""
    if cluster.gpus_per_worker is None:
        return needs_gpus(vllm_version())
    return cluster.gpus_per_worker > 0


def check_engines(run: Run, stage: str) -> None:
    """Raises UserError where vLLM is missing or cannot read the model, or where an engine needs more GPUs than the run
    has."""
    model_url, cluster = run.skeleton.checkpoint.url, run.config.cluster
    split, parts = run.config.generate.tensor_parallel, run.config.generate.pipeline_parallel
    if on_gpus(cluster) and split * parts > cluster.worker_count:
        times = f" x generate.pipeline_parallel {parts}" if parts > 1 else ""
        raise UserError(
            f"generate.tensor_parallel {split}{times} is more GPUs for one engine than the run has: cluster.workers is "
            f"{cluster.worker_count}, with one GPU each: raise cluster.workers or lower generate.tensor_parallel"
        )
    layers = len(run.skeleton.layers)
    if parts > layers:
        raise UserError(
            f"generate.pipeline_parallel {parts} is more parts than the model's {layers} layers"
        )
    if parts > 1 and not on_gpus(cluster):
        raise UserError("generate.pipeline_parallel splits a model over GPUs: set it to 1 on CPUs")
    if vllm_version() is None:
        raise UserError(
            f'vLLM is not installed, {stage} needs it: pip install "calibprune[cuda]" on a machine with '
            f'NVIDIA GPUs, "calibprune[cpu]" on one without'
        )
    if run.skeleton.model.config.model_type in PLUGGED_IN and not _has_plugin():
        raise UserError(
            f"vLLM, which {stage} needs, knows {run.config.model.path} by a plugin that comes with an installed "
            f"calibprune: run `make setup` again, or `pip install .` in the checkout"
        )
    if model_url.startswith("hf://"):
        model_and_revision(model_url)
        return
    if storage.is_local(model_url):
        return
    if not model_url.startswith(STREAMED):
        raise UserError(
            f"vLLM, which {stage} needs, does not read {model_url}: give a folder that every node mounts, a hub id, or "
            f"a URL that begins with {', '.join(STREAMED)}"
        )
    if importlib.util.find_spec("runai_model_streamer") is None:
        raise UserError(
            f"vLLM, which {stage} needs, reads {model_url} with its streamer, which is not installed: pip install "
            f'"vllm[runai]", or give a folder that every node mounts'
        )


def _has_plugin() -> bool:
    """Returns whether vLLM's processes will find `calibprune.models.register_with_vllm`."""
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    return any(point.value.startswith("calibprune.") for point in found)


def engines(run: Run, name: str, stage: Stage, units: int, most_tokens: int) -> Crew:
    """Returns a crew of vLLM engines that commit to the stage, at most one per unit of work."""
    settings, cluster = run.config.generate, run.config.cluster
    bundle = engine_bundle(cluster, settings)
    count = _count(run, bundle, units)
    room = capacity(bundle)
    note(f"starting {min(count, room) or count} vLLM engine{'s' * (count > 1)}")
    if 0 < room < count:
        note(f"{count} were asked for; the others start when nodes join")
    model = run.skeleton.checkpoint.url
    return Crew(
        Generator, count, bundle,
        [run.config.model, model, run.dtype, most_tokens, settings, stage.url,
         bundle.cpus // max(1, bundle.gpus), model_bytes(run.skeleton),
         cache_bytes(run.skeleton, most_tokens), bundle.parts > 1],
        start_seconds=cluster.start_timeout_seconds,
        concurrency=settings.shards_in_flight + 1,
        label=run.label(name),
    )  # fmt: skip


def engine_need(run: Run, stage: str, units: int, most_tokens: int, work: str) -> Need:
    """Returns what the engines of a stage ask of the cluster."""
    settings = run.config.generate
    bundle = engine_bundle(run.config.cluster, settings)
    host, gpu = engine_bytes(run, bundle.gpus * bundle.parts, most_tokens)
    return Need(
        stage, "engine", _count(run, bundle, units), 1, bundle, work,
        host_bytes=host, gpu_bytes=gpu, gpu_share=settings.gpu_memory_utilization,
        more_room="raise generate.tensor_parallel, or generate.pipeline_parallel over nodes, or take larger GPUs",
    )  # fmt: skip


def _count(run: Run, bundle: Bundle, units: int) -> int:
    """Returns the number of engines: as configured, else as many as the pruning workers' GPUs hold, or one per worker
    on CPUs; at most one per unit."""
    workers, asked = run.config.cluster.worker_count, run.config.generate.engines
    held = workers // (bundle.gpus * bundle.parts) if bundle.gpus else workers
    return min(asked or max(1, held), units)


def model_bytes(skeleton: Skeleton) -> int:
    """Returns the bytes of all weights in the dtype of the forwards, as an engine holds them."""
    parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    return parameters * skeleton.dtype.itemsize


def cache_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Returns the bytes of the keys and values of one sequence."""
    config = skeleton.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * skeleton.dtype.itemsize * tokens


def engine_bytes(run: Run, gpus: int, most_tokens: int) -> tuple[int | None, int]:
    """Returns (host bytes of one engine, bytes on each of its GPUs): weights, and room for enough sequences to be worth
    reading the weights for."""
    weights, cache = model_bytes(run.skeleton), cache_bytes(run.skeleton, most_tokens)
    if gpus:
        sequences = min(MIN_SEQUENCES, run.config.generate.max_concurrent or MIN_SEQUENCES)
        return None, (weights + sequences * cache) // gpus
    return host_memory() + weights + (run.config.generate.cpu_kvcache_gib << 30), 0
