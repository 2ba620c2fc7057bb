"""Makes a complete report with invented values and any number of layers."""

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
    cut = [count * (edge < 24) for count, edge in zip(counts, edges, strict=False)]
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
            "generate": {"seconds": 512.3, "drivers": 1, "losses": []},
            "curate": {"seconds": 4.1, "drivers": 1, "losses": []},
            "prune": {"seconds": 75.4, "drivers": 1, "losses": []},
        },
        "generate": {
            "samples": 640,
            "tokens": 123456,
            "tokens_per_second": 2345.6,
            "finish_reasons": {"stop": 600, "length": 40},
            "set_aside": [],
        },
        "curate": {
            "samples": 640,
            "kept": 502,
            "used": 480,
            "dropped": {"perplexity": 138},
            "sequences": 128,
            "sequence_tokens": 2048,
            "tokens": 262144,
            "sources": {"self-generated": _source(640, 401_200, 502, 480, 262_144, 128)},
            "steps": [
                {
                    "filter": None,
                    "kept": 640,
                    "dropped": 0,
                    "perplexity": {"edges": edges, "counts": counts, "median": 12.31},
                },
                {
                    "filter": "perplexity",
                    "kept": 502,
                    "dropped": 138,
                    "perplexity": {"edges": edges, "counts": cut, "median": 10.07},
                },
            ],
            "perplexity": {"edges": edges, "counts": counts, "cut": 24.6, "median": 12.31},
            "lengths": {
                "edges": [128 * step for step in range(17)],
                "before": [31, 12, 14, 20, 22, 25, 30, 33, 41, 40, 44, 38, 29, 20, 19, 250],
                "after": [0, 9, 12, 17, 20, 21, 27, 30, 36, 35, 40, 31, 25, 18, 16, 201],
            },
            "repetition": {
                "edges": [step / 20 for step in range(21)],
                "before": [90, 130, 120, 80, 60, 40, 25, 14, 9, 6, 4, 3, 2, 2, 3, 1, 2, 4, 8, 11],
                "after": [85, 121, 110, 77, 55, 33, 20, 10, 7, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            },
            "repeats": {
                "edges": [50 * step for step in range(9)],
                "before": [402, 110, 61, 20, 4, 2, 0, 41],
                "after": [380, 102, 44, 9, 1, 0, 0, 0],
            },
            "duplicates": {"exact": 3, "near": None},
        },
        "samples": [
            {"row": 7, "perplexity": 8.314, "tokens": 41, "prefix": "Once", "text": " upon"},
            {"row": 9, "perplexity": 3.2, "tokens": 1042, "prefix": "def", "text": " main():"},
        ],
        "prune": {
            "method": "wanda",
            "parameters": 106168320,
            "pattern": "unstructured",
            "allocation": "uniform",
            "refine": None,
            "workers": 2,
            "bytes_read": layers * 2**20,
            "bytes_written": layers * 2**20,
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


def curated_report(layers: int = 3) -> dict[str, Any]:
    """The same with sources, filters and an analysis of them."""
    report = example_report(layers)
    edges = report["curate"]["perplexity"]["edges"]
    counts = [report["curate"]["perplexity"]["counts"]]
    counts.append([max(0, count - (place < 5) * 7) for place, count in enumerate(counts[0])])
    counts.append([count - count // 9 for count in counts[1]])
    counts.append([count * (edge < 24) for count, edge in zip(counts[2], edges, strict=False)])
    filters = [None, "length", "duplicates", "perplexity"]
    totals = [sum(values) for values in counts]
    report["curate"] |= {
        "samples": totals[0],
        "kept": totals[-1],
        "used": totals[-1] - 40,
        "dropped": {
            name: totals[place - 1] - totals[place] for place, name in enumerate(filters) if name
        },
        "sources": {
            "self-generated": _source(480, 401_200, 350, 300, 210_000, 103),
            "slimpajama-validation": _source(160, 88_000, 120, 110, 52_144, 25),
        },
        "steps": [
            {
                "filter": name,
                "kept": totals[place],
                "dropped": totals[place - 1] - totals[place] if place else 0,
                "perplexity": {"edges": edges, "counts": counts[place], "median": 12.3},
            }
            for place, name in enumerate(filters)
        ],
        "duplicates": {"exact": 12, "near": 31},
        "analysis": _analysis(),
    }
    report["stages"]["generate"] |= {
        "drivers": 2,
        "losses": ["engine 3 died on node 10.0.0.7: out of memory", "node 10.0.0.9 was lost"],
    }
    report["generate"]["set_aside"] = [
        {"reason": "engine died three times", "rows": [1000, 1500]},
        {"reason": "no answer within 90 s", "rows": [2500, 3000]},
    ]
    return report


def _source(*values: int) -> dict[str, int]:
    names = ("samples", "tokens", "kept", "used", "used_tokens", "sequences")
    return dict(zip(names, values, strict=True))


def _analysis() -> dict[str, Any]:
    sources = {"self-generated": 0.0, "slimpajama-validation": 0.6}
    references = {"c4": 0.1, "wikipedia-en": 0.45, "dclm-baseline": 0.2}
    edges = [-2.0 + step / 10 for step in range(25)]

    def scores(shift: float) -> dict[str, Any]:
        counts = [round(9 * math.exp(-((edge + 0.9 + shift) ** 2) / 0.08)) for edge in edges[1:]]
        return {
            "documents": sum(counts),
            "mean": -0.85 - shift,
            "median": -0.84 - shift,
            "values": {"edges": edges, "counts": counts},
        }

    return {
        "ngram": 3,
        "vocabulary": {
            kind: {
                name: {
                    "documents": 500,
                    "tokens": 80_000 + 1000 * place,
                    "distinct_tokens": 9_300,
                    "ngrams": 79_000,
                    "distinct_ngrams": 61_300 + 900 * place,
                }
                for place, name in enumerate(names)
            }
            for kind, names in (("sources", sources), ("references", references))
        },
        "similarity_tokens": 80_000,
        "similarity": {
            source: {
                reference: {
                    "jaccard": 0.08 - 0.07 * abs(ours - theirs),
                    "unigram_js": 0.02 + 0.2 * abs(ours - theirs),
                    "coverage": 0.4 - 0.3 * abs(ours - theirs),
                }
                for reference, theirs in references.items()
            }
            for source, ours in sources.items()
        },
        "min_k": {
            "share": 0.5,
            "sources": {name: scores(at / 3) for name, at in sources.items()},
            "references": {name: scores(at / 3) for name, at in references.items()},
        },
    }


def _layer(layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "worker": layer % 2,
        "workers": 2,
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
        "kept_dense": [],
    }
