"""Times one decoder layer of LLaMA-3-70B's true shapes in the real sweep, statistics and solver, against its floor.

    python benchmarks/gpu_layer.py [--method sparsegpt] [--sequences 128] [--tokens 2048] [--repeats 5]
    python benchmarks/gpu_layer.py --hidden 256 --intermediate 704 --heads 8 --kv-heads 2 --sequences 8 --tokens 128

Runs on a GPU where there is one, else on the CPU (with small shapes, as in the second line). Weights are random.
The floor is the time of the forward's floating-point operations and of one triangle of every Gram matrix at the rate
that a plain matrix product of this dtype reaches on this device, and of the factorisations, measured alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.events import UnitDone
from calibprune.model import build_skeleton
from calibprune.pruning.factor import inverse_factor
from calibprune.pruning.loop import prune_layers
from calibprune.pruning.methods import need_of
from calibprune.stage import Stage

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--method", default="sparsegpt")
parser.add_argument("--hidden", type=int, default=8192)
parser.add_argument("--intermediate", type=int, default=28672)
parser.add_argument("--heads", type=int, default=64)
parser.add_argument("--kv-heads", type=int, default=8)
parser.add_argument("--sequences", type=int, default=128)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--batch-sequences", type=int, default=4)
parser.add_argument("--pattern", default="unstructured")
parser.add_argument("--repeats", type=int, default=5)
options = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS_OF_70B = 80


def synchronised(work) -> float:
    """Returns the seconds of `work`, with the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def write_layer(folder: Path) -> str:
    """Writes a model with a small vocabulary, made on the device; its second layer marks the end of the first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=2, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.tokens, rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return str(folder)


def product_rate() -> float:
    """Returns the FLOP/s of a bfloat16 product of the MLP's shape."""
    rows = min(options.sequences * options.tokens, 16384)
    a = torch.randn(rows, options.hidden, dtype=torch.bfloat16, device=device)
    b = torch.randn(options.hidden, options.intermediate, dtype=torch.bfloat16, device=device)
    a @ b
    best = min(synchronised(lambda: a @ b) for _ in range(5))
    return 2 * rows * options.hidden * options.intermediate / best


def factorisation_seconds(widths: list[int]) -> float:
    total = 0.0
    for width in widths:
        gram = torch.eye(width, device=device) * 3 + 0.5 / width
        inverse_factor(gram, 0.01)
        total += min(synchronised(lambda gram=gram: inverse_factor(gram, 0.01)) for _ in range(2))
    return total


with tempfile.TemporaryDirectory() as name:
    path = write_layer(Path(name) / "model")
    pool = torch.randint(0, 1024, (options.sequences, options.tokens))
    settings = PruneSettings.model_validate(
        {
            "method": {"type": options.method},
            "pattern": options.pattern,
            "batch_sequences": options.batch_sequences,
            "layers": r"\.0$",
        }
    )
    measured = []
    for turn in range(options.repeats + 1):  # the first compiles
        skeleton = build_skeleton(ModelSettings(path=path), device)
        stage = Stage(str(Path(name) / f"run-{turn}"))
        events = list(prune_layers(skeleton, pool, settings, stage))
        records = [event.record for event in events if isinstance(event, UnitDone)]
        (record,) = [record for record in records if record.facts.get("layer") == 0]
        measured.append(record.facts["seconds"])
    linears = skeleton.linears(0)

tokens = options.sequences * options.tokens
need = need_of(settings)
widths = [options.hidden] * 3 + [options.intermediate]  # q,k,v | o | gate,up | down
forward = 2 * tokens * sum(linear.weight.numel() for linear in linears.values())
forward += 2 * tokens * options.tokens * options.hidden  # causal attention: half of QK^T and of PV
gram = sum(tokens * width**2 for width in widths) if "gram" in need else 0
rate = product_rate()
factor = factorisation_seconds(widths) if "gram" in need else 0.0
floor = (forward + gram) / rate + factor
parts = {kind: statistics.median(m[kind] for m in measured[1:]) for kind in measured[0]}
work = sum(seconds for kind, seconds in parts.items() if kind not in ("load", "write"))
where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
shape = f"{options.hidden} x {options.intermediate}, {options.sequences} x {options.tokens} tokens"
floors = f"forward {forward / rate:.2f}, Gram {gram / rate:.2f}, factorisation {factor:.2f}"
print(f"{options.method}, one layer of {shape}, {where}")
print(f"  bfloat16 products   {rate / 1e12:8.2f} TFLOP/s")
print(f"  floor               {floor:8.2f} s   {floors}")
print(
    f"  measured            {work:8.2f} s   {', '.join(f'{k} {v:.2f}' for k, v in parts.items())}"
)
print(f"  measured / floor    {work / floor:8.2f}")
print(f"  {LAYERS_OF_70B} layers           {LAYERS_OF_70B * work:8.0f} s on one device")
