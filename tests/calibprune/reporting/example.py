"""A complete report with invented values, of as many layers as a test wants."""

import math
from typing import Any

LINEARS = {
    "self_attn.q_proj": 0.08,
    "self_attn.k_proj": 0.07,
    "self_attn.v_proj": 0.16,
    "self_attn.o_proj": 0.22,
    "mlp.gate_proj": 0.14,
    "mlp.up_proj": 0.17,
    "mlp.down_proj": 0.2,
}


def example_report(layers: int = 3) -> dict[str, Any]:
    edges = [2.0 * 1.25**step for step in range(21)]
    counts = [round(90 * math.exp(-(((step - 8) / 4) ** 2))) for step in range(20)]
    return {
        "calibprune": "0.1.0",
        "created_at": "2026-11-22T16:00:00Z",
        "config": {
            "model": {"path": "org/tiny", "trust_remote_code": False},
            "curate": {"filters": [{"type": "perplexity", "drop_worst": 0.2}]},
            "prune": {"pattern": "2:4", "sparsity": None},
        },
        "versions": {"torch": "2.13.0"},
        "model": {
            "path": "/models/tiny-llama",
            "architecture": "LlamaForCausalLM",
            "parameters": 134515008,
            "prunable_parameters": 106168320,
            "layers": layers,
            "dtype": "bfloat16",
        },
        "sparsity": 0.49987,
        "stages": {
            "prune": {"seconds": 75.4},
            "generate": {"seconds": 512.3},
            "curate": {"seconds": 4.1},
        },
        "generate": {
            "samples": 640,
            "tokens": 123456,
            "tokens_per_second": 2345.6,
            "finish_reasons": {"stop": 600, "length": 40},
        },
        "curate": {
            "samples": 640,
            "kept": 502,
            "dropped": {"perplexity": 128, "length": 10},
            "perplexity": {"edges": edges, "counts": counts, "cut": 24.6, "median": 12.31},
            "sequences": 128,
            "sequence_tokens": 2048,
            "tokens": 262144,
        },
        "samples": [
            {"row": 7, "perplexity": 8.314, "tokens": 41, "prefix": "Once", "text": " upon"},
            {"row": 9, "perplexity": 3.2, "tokens": 1042, "prefix": "def", "text": " main():"},
        ],
        "prune": {
            "method": "wanda",
            "pattern": "unstructured",
            "layers": [_layer(layer) for layer in range(layers)],
        },
        "perplexity": {
            "python-docs": {
                "dense": 12.3456, "pruned": 15.1042, "sequence_tokens": 512, "sequences": 32
            },
            "wikitext": {
                "dense": 17.81, "pruned": 40.07, "sequence_tokens": 2048, "sequences": 141
            },
        },
    }  # fmt: skip


def _layer(layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "seconds": {"read": 0.05, "sweep": 1.25, "statistics": 0.5, "solve": 2.0, "write": 0.1},
        "bytes_read": 2**20,
        "bytes_written": 2**20,
        "peak_memory_bytes": 3 * 2**30 + layer,
        "linears": {
            name: {
                "sparsity": 0.5,
                "relative_error": error * (1 + layer / 10),
                "parameters": 300 if name.startswith("mlp") else 100,
            }
            for name, error in LINEARS.items()
        },
    }
