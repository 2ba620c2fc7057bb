"""Computes what pruning LLaMA-3 8B to 405B and DCLM-7B takes: GPUs, memory, bytes moved, an estimate of the time.

    python benchmarks/sizing.py [--method sparsegpt] [--sequences 128] [--tokens 2048] [--samples 5000]

Memory and bytes are computed as `calibprune check` does from the headers of a checkpoint; here it is a sparse file with
the true shapes and no weights, which takes no disk. Times are ESTIMATES; none was measured on these GPUs:

- generate: every token of every sample takes 2 operations a parameter, at `--decode-mfu` of the peak; and every step of
  an engine reads all weights once, at `--hbm-share` of the memory's rate, for 256 samples at the same time. The larger
  counts.
- prune, least: one dense forward over the calibration tokens at `--mfu` of the peak, or reading and writing the
  checkpoint at `--storage` a node of eight GPUs. The larger counts, since the two overlap; no calibrated method is
  faster.
- prune: the same with the forward times what our prune stage takes over a dense forward, measured by
  benchmarks/prune_speed.py on CPUs with a model of 135M: wanda 1.25, sparsegpt 2.32. GPUs may well differ.
- evaluate: two dense forwards over the held-out tokens, or reading two checkpoints. The larger counts.
"""

import argparse
import json
import tempfile
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from calibprune.checkpoint import SINGLE
from calibprune.config import Config
from calibprune.pruning.memory import GPU_SHARE
from calibprune.text import duration
from jobs.engines import cache_bytes, engine_bytes, model_bytes
from jobs.preflight import bytes_read, bytes_stored
from jobs.prune import movable, pruning_memory
from jobs.run import Run
from tests.openlm import PUBLISHED
from tests.openlm import write_shapes as write_openlm_shapes

SHAPES = {
    "8B": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32},
    "70B": {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64},
    "405B": {"hidden": 16384, "intermediate": 53248, "layers": 126, "heads": 128},
}
"""Shapes from the published config.json; all have 8 heads of keys and values, and a vocabulary of 128256."""
CLUSTERS = [("8B", 1, "H100"), ("8B", 8, "H100"), ("70B", 8, "H100"), ("70B", 16, "H100"), ("405B", 8, "H200"),
            ("405B", 16, "H200"), ("DCLM-7B", 1, "H100"), ("DCLM-7B", 8, "H100")]  # fmt: skip
"""Model, number of GPUs and their kind. The 812 GB of 405B need H200s: an engine stays on one node of eight GPUs."""
GPU_BYTES = {"H100": 80 << 30, "H200": 140 << 30}
MEMORY_BYTES_A_SECOND = {"H100": 3.35e12, "H200": 4.8e12}
PEAK_FLOPS = 989e12
"""FLOP/s of a GPU of either kind in dense bfloat16, by the data sheets."""
GPUS_A_NODE = 8
OVER_FORWARD = {"wanda": 1.25, "sparsegpt": 2.32}
"""Seconds of prune over those of a dense forward, as measured on CPUs by prune_speed.py."""
AT_THE_SAME_TIME = 256

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--method", choices=OVER_FORWARD, default="sparsegpt")
parser.add_argument("--sequences", type=int, default=128)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--samples", type=int, default=5000)
parser.add_argument("--held-out-tokens", type=int, default=300_000)
parser.add_argument("--mfu", type=float, default=0.4)
parser.add_argument("--decode-mfu", type=float, default=0.1)
parser.add_argument("--hbm-share", type=float, default=0.6)
parser.add_argument("--storage", type=float, default=2e9, help="bytes a second of one node")


def write_shapes(folder: Path, hidden: int, intermediate: int, layers: int, heads: int) -> str:
    """Writes a bfloat16 checkpoint with every tensor's header and none of its bytes; returns the folder."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    cache = 8 * hidden // heads
    of_a_layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (cache, hidden),
        "self_attn.v_proj": (cache, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (128256, hidden),
    }
    for index in range(layers):
        for name, shape in of_a_layer.items():
            shapes[f"model.layers.{index}.{name}.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * (shape[0] * shape[1] if len(shape) > 1 else shape[0])
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    packed = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)
    return str(folder)


def tensor_parallel(weights: int, cache: int, gpu_bytes: int) -> int:
    """Returns the minimum number of GPUs of an engine that hold the weights and 32 full sequences."""
    for parts in (1, 2, 4, GPUS_A_NODE):
        if (weights + 32 * cache) / parts <= 0.9 * gpu_bytes:
            return parts
    raise SystemExit("no engine on one node holds this model")


def row(run: Run, gpus: int, kind: str, options: argparse.Namespace) -> list[str]:
    """Returns a row of the table: engines, memory, bytes and times."""
    weights, gpu_bytes = model_bytes(run.skeleton), GPU_BYTES[kind]
    most = options.tokens + 1
    parts = tensor_parallel(weights, cache_bytes(run.skeleton, most), gpu_bytes)
    engines = gpus // parts
    _, engine = engine_bytes(run, parts, most)
    memory, host = pruning_memory(run, gpus, on_gpu=True), pruning_memory(run, gpus, on_gpu=False)
    batches = -(-options.sequences // run.config.prune.batch_sequences)
    moved = movable(memory, batches, gpus) if memory.bytes > GPU_SHARE * gpu_bytes else 0
    on_host = max(host.layers + moved, host.outside)

    flops = (
        weights  # operations of one token's forward: 2 per parameter, and a parameter has 2 bytes
    )
    rate = gpus * PEAK_FLOPS * options.mfu
    storage = -(-gpus // GPUS_A_NODE) * options.storage
    tokens, size = options.samples * options.tokens, run.skeleton.checkpoint.bytes
    step = weights / parts / (MEMORY_BYTES_A_SECOND[kind] * options.hbm_share)
    generate = max(
        tokens * flops / (gpus * PEAK_FLOPS * options.decode_mfu),
        tokens / AT_THE_SAME_TIME / engines * step,
    )
    forward, transfer = options.sequences * options.tokens * flops / rate, 2 * size / storage
    prune = max(forward * OVER_FORWARD[options.method], transfer)
    evaluate = 2 * max(options.held_out_tokens * flops / rate, size / storage)
    return [
        f"{gpus} x {kind}", f"{engines} x {parts}", f"{engine / 2**30:.0f} GiB",
        f"{(memory.bytes - moved) / 2**30:.0f} GiB", f"{on_host / 2**30:.0f} GiB",
        f"{bytes_read(run, engines) / 1e9:,.0f} GB", f"{bytes_stored(run) / 1e9:,.0f} GB",
        *map(duration, (generate, max(forward, transfer), prune, evaluate)),
    ]  # fmt: skip


def main() -> None:
    options = parser.parse_args()
    table = Table(
        "model", "GPUs", "engines", "GPU, engine", "GPU, prune", "host, prune", "read", "written",
        "generate", "prune, least", "prune", "evaluate", box=box.ASCII2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, gpus, kind in CLUSTERS:
            model = Path(folder, name)
            model.mkdir(exist_ok=True)
            if name in PUBLISHED:
                path = str(write_openlm_shapes(model, PUBLISHED[name]))
            else:
                path = write_shapes(model, **SHAPES[name])
            settings = {
                "model": {"path": path, "dtype": "bfloat16"},
                "output": str(Path(folder, "run")),
                "generate": {"samples": options.samples, "max_tokens": options.tokens},
                "curate": {"sequences": options.sequences, "sequence_tokens": options.tokens},
                "prune": {"method": options.method, "batch_sequences": 2},
                "evaluate": {"perplexity": [{"name": "held-out", "path": "python-docs"}]},
            }
            table.add_row(name, *row(Run(Config.model_validate(settings)), gpus, kind, options))
    print(
        f"{options.method}, {options.sequences} x {options.tokens} tokens of {options.samples} samples; ESTIMATED "
        f"times: MFU {options.mfu:g}, decoding {options.decode_mfu:g}, {options.storage / 1e9:g} GB/s of storage a node"
    )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
