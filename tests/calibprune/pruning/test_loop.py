"""Pruning layer by layer: linears left dense, facts in the done records, memory."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings, Wanda
from calibprune.errors import UserError
from calibprune.events import UnitDone
from calibprune.model import build_skeleton
from calibprune.pruning import layer as layer_module
from calibprune.pruning import statistics
from calibprune.pruning.export import ALLOCATION
from calibprune.pruning.layer import layer_unit
from calibprune.pruning.loop import prune_layers
from calibprune.pruning.memory import worker_memory
from calibprune.pruning.methods import METHODS
from calibprune.pruning.positions import Counted, sequences_of
from calibprune.stage import Stage
from tests.tiny import write_tiny_llama

TOKENS = torch.randint(0, 258, (6, 40), generator=torch.Generator().manual_seed(1))


def settings(**changes) -> PruneSettings:
    return PruneSettings.model_validate(
        {"method": {"type": "wanda"}, "batch_sequences": 2} | changes
    )


def prune(
    model, folder, *, positions: torch.Tensor | None = None, **changes
) -> tuple[Stage, dict[str, torch.Tensor]]:
    stage = Stage(str(folder))
    skeleton = build_skeleton(ModelSettings(path=str(model)))
    list(prune_layers(skeleton, TOKENS, settings(**changes), stage, positions=positions))
    tensors: dict[str, torch.Tensor] = {}
    for record in stage.done().values():
        if record.unit != ALLOCATION:
            tensors |= load_file(folder / str(record.file))
    return stage, tensors


def test_only_the_chosen_layers_and_linears_are_pruned(tiny_llama, tmp_path):
    stage, after = prune(
        tiny_llama, tmp_path, layers=r"layers\.[12]$", keep=[r"down_proj$", r"\.1\..*k_proj"]
    )
    before = load_file(tiny_llama / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        linear = "_proj.weight" in name
        kept = "down_proj" in name or name.endswith("layers.1.self_attn.k_proj.weight")
        if linear and not kept and not name.startswith("model.layers.0."):
            assert ((tensor == 0).sum(1) == tensor.shape[1] // 2).all(), name
        else:
            assert torch.equal(tensor, before[name]), name
    facts = stage.done()
    assert facts[layer_unit(0)].facts["linears"] == {}
    assert facts[layer_unit(1)].facts["kept_dense"] == ["mlp.down_proj", "self_attn.k_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "blocks"}, "prune.layers 'blocks' matches none of model.layers.0 ... model.layers.2"),
        ({"keep": ["down_prj"]}, "prune.keep: 'down_prj' matches no linear, such as model.layers.0.self_attn.q_proj"),
        ({"keep": ["_proj"]}, "leave no linear to prune"),
    ],
)  # fmt: skip
def test_expressions_that_match_nothing_or_everything(tiny_llama, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prune(tiny_llama, tmp_path, **changes)


def damaged(tiny_llama, folder, name, value):
    """A copy of the model with one weight changed."""
    model = shutil.copytree(tiny_llama, folder)
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(tiny_llama, tmp_path, name, value):
    model = damaged(tiny_llama, tmp_path / "damaged", name, value)
    with pytest.raises(UserError, match=rf"{model}: the weights of {name} are not finite") as error:
        prune(model, tmp_path / "prune")
    assert "\n" not in str(error.value)


def test_alphapruning_names_weights_that_are_not_finite(tiny_llama, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    model = damaged(tiny_llama, tmp_path / "damaged", name, math.nan)
    with pytest.raises(UserError, match=f"the weights of {name} are not finite"):
        prune(model, tmp_path / "prune", allocation="alphapruning")


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_inputs_that_overflow_are_named_by_layer_and_group(tiny_llama, tmp_path, allocation):
    name = "model.layers.1.post_attention_layernorm.weight"
    model = damaged(tiny_llama, tmp_path / "damaged", name, 1e30)
    where = (
        r"layer 1, group mlp.gate_proj, mlp.up_proj: the inputs of micro-batch \d are not finite"
    )
    with pytest.raises(ValueError, match=f"{where}.*model.dtype"):
        prune(model, tmp_path / "prune", allocation=allocation)


def test_pruned_weights_that_overflow_are_named(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(
        METHODS, Wanda, replace(METHODS[Wanda], prune=lambda weights, *_: [w / 0 for w in weights])
    )
    with pytest.raises(ValueError, match=r"pruned weights of self_attn\.q_proj are not finite in"):
        prune(tiny_llama, tmp_path)


def test_an_expression_that_never_ends_is_named(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("calibprune.untrusted.SECONDS", 1.0)
    with pytest.raises(UserError, match=r"prune\.keep: the regular expression .*no end within"):
        prune(tiny_llama, tmp_path, keep=[r"^([a-z]|[a-z.]|.)+-$"])


def test_an_expression_that_is_none():
    with pytest.raises(ValueError, match="not a regular expression"):
        settings(keep=["("])


def test_a_done_record_says_where_the_time_and_the_bytes_went(tiny_llama, tmp_path):
    stage, _ = prune(tiny_llama, tmp_path)
    layer = stage.done()[layer_unit(1)].facts
    kinds = {"load", "sweep", "statistics", "reduce", "solve", "measure", "gather", "write"}
    assert layer["seconds"].keys() == kinds
    assert layer["bytes_read"] == sum(layer["tensors"].values()) < layer["bytes_written"]
    assert layer["peak_memory_bytes"] > 0
    for linear in layer["linears"].values():
        assert linear["zeros"] == linear["parameters"] // 2
        assert 0.05 < linear["relative_error"] < 0.9


def test_errors_recorded_are_those_of_the_linears_outputs(tiny_llama, tmp_path, monkeypatch):
    """Measures on as many tokens as the pool has."""
    from calibprune.pruning import layer

    monkeypatch.setattr(layer, "ERROR_TOKENS", TOKENS.numel())
    inputs = []
    prune_group = layer.LayerInWork.prune

    def watch(self, stop):
        if (stop.layer, stop.linears) == (0, ("mlp.down_proj",)):
            inputs.extend(x.clone() for x in stop.inputs)
        prune_group(self, stop)

    monkeypatch.setattr(layer.LayerInWork, "prune", watch)
    stage, after = prune(tiny_llama, tmp_path, batch_sequences=1)
    name = "model.layers.0.mlp.down_proj.weight"
    dense, pruned = load_file(tiny_llama / "model.safetensors")[name].double(), after[name].double()
    x = torch.cat(inputs).flatten(0, 1).double()
    expected = ((x @ (dense - pruned).T).norm() / (x @ dense.T).norm()).item()
    recorded = stage.done()[layer_unit(0)].facts["linears"]["mlp.down_proj"]["relative_error"]
    assert recorded == pytest.approx(expected, rel=1e-4)


def test_refined_linears_have_both_errors_recorded(tiny_llama, tmp_path):
    """The first is the error that the method alone would have recorded."""
    start, _ = prune(tiny_llama, tmp_path / "start", method="wanda")
    stage, _ = prune(tiny_llama, tmp_path / "refined", method="wanda", refine="swaps")
    first = [s.record(layer_unit(0)).facts["linears"] for s in (start, stage)]
    for path in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    ):  # whose inputs are equal
        before, after = (linears[path] for linears in first)
        assert after["unrefined_error"] == before["relative_error"] > after["relative_error"]
        assert "unrefined_error" not in before


def some_positions() -> torch.Tensor:
    """Counts what follows prefixes of different lengths, and nothing of the second micro-batch of two sequences."""
    starts = torch.tensor([3, 39, 40, 40, 17, 0])
    return torch.arange(TOKENS.shape[1]) >= starts[:, None]


def test_statistics_are_of_the_positions_that_count(tiny_llama, tmp_path):
    """Compares with Wanda computed directly for the first layer's first linears, whose inputs are still dense."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    seen = []
    attention = plain.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain(TOKENS)
    expected = {}
    for counted in (some_positions(), torch.ones_like(TOKENS, dtype=torch.bool)):
        norms = seen[0].double()[counted].norm(dim=0)
        weight = attention.q_proj.weight.detach()
        order = (weight.double().abs() * norms).argsort(1)[:, : weight.shape[1] // 2]
        expected[counted.all().item()] = weight.scatter(1, order, 0)
    assert not torch.equal(expected[True], expected[False]), "the test could not tell"
    stage, after = prune(tiny_llama, tmp_path, positions=some_positions())
    assert torch.equal(after["model.layers.0.self_attn.q_proj.weight"], expected[False])
    assert all(layer.facts["linears"] for layer in map(stage.record, map(layer_unit, range(3))))


def test_errors_are_measured_at_the_positions_that_count(tiny_llama, tmp_path, monkeypatch):
    from calibprune.pruning import layer

    monkeypatch.setattr(layer, "ERROR_TOKENS", 10 * TOKENS.numel())  # all that count
    counted, inputs = some_positions(), []
    prune_group = layer.LayerInWork.prune

    def watch(self, stop):
        if (stop.layer, stop.linears) == (0, ("mlp.down_proj",)):
            inputs.extend(x.clone() for x in stop.inputs)
        prune_group(self, stop)

    monkeypatch.setattr(layer.LayerInWork, "prune", watch)
    stage, after = prune(tiny_llama, tmp_path, positions=counted)
    name = "model.layers.0.mlp.down_proj.weight"
    dense, pruned = load_file(tiny_llama / "model.safetensors")[name].double(), after[name].double()
    x = torch.cat(inputs).double()[counted]
    assert len(x) == 37 + 1 + 23 + 40
    expected = ((x @ (dense - pruned).T).norm() / (x @ dense.T).norm()).item()
    recorded = stage.done()[layer_unit(0)].facts["linears"]["mlp.down_proj"]["relative_error"]
    assert recorded == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "way",
    [
        {"method": "sparsegpt"},
        {"method": {"type": "dsnot", "faithful": True}, "allocation": {"type": "owl", "m": 2}},
    ],
)
def test_counting_every_position_changes_nothing(tiny_llama, tmp_path, way):
    _, plain = prune(tiny_llama, tmp_path / "plain", **way)
    _, every = prune(
        tiny_llama, tmp_path / "every", positions=torch.ones(TOKENS.shape, dtype=torch.bool), **way
    )
    _, some = prune(tiny_llama, tmp_path / "some", positions=some_positions(), **way)
    assert all(torch.equal(every[name], tensor) for name, tensor in plain.items())
    assert not all(torch.equal(some[name], tensor) for name, tensor in plain.items())


def test_positions_that_fit_no_pool(tiny_llama, tmp_path):
    with pytest.raises(UserError, match=r"no position .* set curate.positions to all"):
        prune(tiny_llama, tmp_path, positions=torch.zeros(TOKENS.shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape \(6, 39\), for a pool of \(6, 40\)"):
        prune(tiny_llama, tmp_path, positions=some_positions()[:, 1:])


def test_positions_of_inputs_that_are_one_row_a_token():
    counted = some_positions()[:4].split(2)
    inputs = [torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    flat = Counted([batch.flatten(0, 1) for batch in inputs], counted)
    whole = Counted(inputs, counted)
    expected = [batch[which] for batch, which in zip(inputs, counted, strict=True)]
    for rows in (flat, whole):
        assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
        assert rows.shapes == [(38, 8), (0, 8)]
    assert sequences_of(whole) == 2 and sequences_of(flat) == 1
    with pytest.raises(ValueError, match="inputs of 79 rows for 80 positions"):
        Counted([inputs[0].flatten(0, 1)[1:]], counted[:1])[0]


MEASURED = """
import json, sys, torch, transformers
from calibprune.calibration.pool import read_pool
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.model import build_skeleton
from calibprune.pruning.loop import prune_layers
from calibprune.process import host_memory
from calibprune.stage import Record, Stage
model, pool, folder, settings = sys.argv[1:]
torch.set_num_threads(1)
skeleton = build_skeleton(ModelSettings(path=model))
before = host_memory()
list(prune_layers(skeleton, read_pool(pool).token_ids, PruneSettings.model_validate_json(settings), Stage(folder)))
print(json.dumps([before, host_memory("VmHWM")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_memory_is_predicted(tmp_path, method):
    path = write_tiny_llama(
        tmp_path / "model", layers=3, hidden=256, intermediate=1408, dtype=torch.bfloat16
    )
    (tmp_path / "pool").mkdir()
    tokens = torch.randint(0, 258, (96, 512)).tolist()
    table = pa.table({"token_ids": pa.array(tokens, pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "pool" / "pool.parquet")
    wanted = settings(method={"type": method}, batch_sequences=8)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "pool"), str(tmp_path / "out"),
         wanted.model_dump_json()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak = json.loads(ran.stdout.splitlines()[-1])
    skeleton = build_skeleton(ModelSettings(path=str(path)))
    predicted = worker_memory(skeleton, wanted, 96, 512, 1, before)
    assert peak - before > 150e6, ("too little to tell", before, peak)
    assert abs(predicted.bytes / peak - 1) < 0.25, (predicted, before, peak)


GROWTH = """
import sys, tempfile, torch
from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.events import LayerEntered
from calibprune.model import build_skeleton
from calibprune.process import host_memory
from calibprune.pruning.loop import prune_layers
from calibprune.stage import Stage
skeleton, after = build_skeleton(ModelSettings(path=sys.argv[1])), {}
settings = PruneSettings.model_validate({"method": {"type": "wanda"}})
for event in prune_layers(skeleton, torch.zeros(4, 32, dtype=torch.int64), settings, Stage(sys.argv[2])):
    if isinstance(event, LayerEntered): after[event.layer] = host_memory()
print(max(after[layer] for layer in range(17, 25)) - max(after[layer] for layer in range(1, 9)))
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    path = write_tiny_llama(
        tmp_path / "model", layers=24, hidden=384, intermediate=1344, heads=6, kv_heads=6, dtype=torch.bfloat16
    )  # fmt: skip
    layer = 2 * (4 * 384**2 + 3 * 384 * 1344)
    ran = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert int(ran.stdout.splitlines()[-1]) < 6 * layer, "of 16 layers swept in between"


@pytest.mark.parametrize("begun", [True, False])
def test_a_resumed_run_multiplies_as_it_began(tiny_llama, tmp_path, monkeypatch, begun):
    """Whatever its processors could do: last bits depend on it."""
    way = {"method": "sparsegpt", "layers": r"layers\.[01]$"}
    monkeypatch.setattr(layer_module, "have_bfloat16_products", lambda: begun)
    monkeypatch.setattr(statistics, "multiply_bfloat16", in_float32)
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = {k: v.bfloat16() for k, v in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    stage, _ = prune(model, tmp_path / "out", **way)
    assert stage.record(layer_unit(0)).facts["bfloat16_products"] == begun
    Path(stage.url, "_done", f"{layer_unit(1)}.json").unlink()
    monkeypatch.setattr(layer_module, "have_bfloat16_products", lambda: not begun)
    if begun:
        with pytest.raises(UserError, match="bfloat16 instructions"):
            prune(model, tmp_path / "out", **way)
    else:
        prune(model, tmp_path / "out", **way)
        assert not stage.record(layer_unit(1)).facts["bfloat16_products"]


def test_damping_grows_until_the_gram_has_a_factor(tiny_llama, tmp_path, caplog):
    """Of three positions, for inputs of 64 numbers and more."""
    caplog.set_level(logging.INFO)
    few = torch.zeros(TOKENS.shape, dtype=torch.bool)
    few[0, 5:8] = True
    way = {"type": "sparsegpt", "damping": 1e-11}
    stage, _ = prune(
        tiny_llama, tmp_path, positions=few, method=way, layers=r"layers\.0$", keep=["q_proj"]
    )
    linears = stage.record(layer_unit(0)).facts["linears"]
    raised = {path: facts["damping"] for path, facts in linears.items() if "damping" in facts}
    assert raised
    for path, damping in raised.items():
        assert damping > 5e-11
        said = rf"layer 0, group .*{path}.* not positive definite with damping 1e-11; pruned with {damping:g}"
        assert re.search(said, caplog.text)


def in_float32(left, right, out):
    return torch.mm(left.float(), right.float(), out=out)


@pytest.mark.parametrize("allocation", ["owl", "alphapruning"])
def test_what_is_measured_is_committed_once_and_taken_up(
    tiny_llama, tmp_path, monkeypatch, allocation
):
    way = {"allocation": {"type": allocation}, "sparsity": 0.6}
    stage, whole = prune(tiny_llama, tmp_path / "whole", **way)
    facts = stage.record(ALLOCATION).facts
    assert facts["sparsity"] == pytest.approx(0.6, abs=5e-3)
    assert len(facts["layers"]) == 3 and max(facts["layers"]) - min(facts["layers"]) > 0.05
    for index, asked in enumerate(facts["layers"]):
        linears = stage.done()[layer_unit(index)].facts["linears"].values()
        removed = sum(linear["zeros"] for linear in linears)
        assert removed / sum(linear["parameters"] for linear in linears) == pytest.approx(asked)

    halfway = Stage(str(tmp_path / "halfway"))
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    events = prune_layers(skeleton, TOKENS, settings(**way), halfway)
    steps = []
    for event in events:
        if isinstance(event, UnitDone):
            break
        steps.append(event.position)
    events.close()
    assert halfway.done_units() == {ALLOCATION} and steps == [(0, 0), (0, 1), (0, 2)]

    def again(*_):
        raise AssertionError("measured a second time")

    monkeypatch.setattr("calibprune.pruning.allocation.outlier_ratios", again)
    monkeypatch.setattr("calibprune.pruning.allocation.tail_exponents", again)
    _, resumed = prune(tiny_llama, tmp_path / "halfway", **way)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
