"""The paused forward against the model's own forward."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.gang import ALONE
from calibprune.layer_stream import LayerReader
from calibprune.model import build_skeleton
from calibprune.sweep import LayerStop, Sweep
from tests.tiny import write_tiny_llama

TOKENS = torch.randint(0, 258, (6, 48), generator=torch.Generator().manual_seed(1))


def streamed(skeleton, *, pause_at_groups=True):
    """Sweeps without pruning; returns (final hidden states, stops, maximum number of layers in memory)."""
    base = skeleton.model.base_model
    sweep = Sweep(
        lambda ids: base(input_ids=ids, use_cache=False).last_hidden_state,
        skeleton.layers,
        TOKENS.split(2),
        outer_modules=skeleton.outer_modules,
        enter_outer=LayerReader(skeleton, ALONE, stop=0).place_outer,
        leave_outer=lambda name: skeleton.evict(skeleton.outer_modules[name]),
    )
    stops, most = [], 0
    with torch.no_grad():
        for stop in sweep:
            if isinstance(stop, LayerStop):
                stop.pause_at_groups = pause_at_groups
                if stop.layer:
                    skeleton.evict(skeleton.layers[stop.layer - 1])
                tensors = skeleton.checkpoint.read(skeleton.layer_tensors(stop.layer))
                prefix = skeleton.layer_prefix(stop.layer)
                skeleton.place(skeleton.layers[stop.layer], prefix, tensors)
                held = [any(not p.is_meta for p in layer.parameters()) for layer in skeleton.layers]
                most = max(most, sum(held))
                stops.append(stop.layer)
            else:
                assert [x.shape[:2] for x in stop.inputs] == [(2, 48)] * 3
                stops.append((stop.layer, stop.linears))
    return torch.cat(sweep.results), stops, most


@torch.no_grad()
def plain(path, dtype):
    """Runs the model's own forward over the same micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).base_model
    return torch.cat([model(ids, use_cache=False).last_hidden_state for ids in TOKENS.split(2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_final_hidden_states_are_the_plain_models_bit_for_bit(tmp_path, dtype):
    path = write_tiny_llama(tmp_path / "model", dtype=dtype, tied=dtype == torch.bfloat16)
    hidden, _, most = streamed(build_skeleton(ModelSettings(path=str(path))))
    assert torch.equal(hidden, plain(path, dtype))
    assert most == 1, "more than one layer's weights were held at once"


def test_stops_come_layer_by_layer_with_the_groups_that_share_an_input(tiny_llama):
    _, stops, _ = streamed(build_skeleton(ModelSettings(path=str(tiny_llama))))
    groups = [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert stops == [s for i in range(3) for s in (i, *((i, group) for group in groups))]


def test_layers_are_run_through_without_pausing_when_asked(tiny_llama):
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    assert streamed(skeleton, pause_at_groups=False)[1] == [0, 1, 2]


def test_every_checkpoint_byte_is_read_once(tiny_llama):
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    head = skeleton.checkpoint.locations["lm_head.weight"].bytes
    streamed(skeleton)  # the last hidden state does not need the head
    size = (tiny_llama / "model.safetensors").stat().st_size
    assert skeleton.checkpoint.bytes_read == size - head


def test_an_error_of_the_model_comes_through_and_leaves_no_hook_behind(tiny_llama):
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    with pytest.raises(ZeroDivisionError):
        list(Sweep(lambda ids: 1 / 0, skeleton.layers, [TOKENS]))
    assert not any(layer._forward_pre_hooks for layer in skeleton.layers)


def test_leaving_early_abandons_the_forwards(tiny_llama):
    skeleton = build_skeleton(ModelSettings(path=str(tiny_llama)))
    unwound = []

    def forward(ids):
        try:
            return skeleton.model(input_ids=ids, use_cache=False)
        finally:
            unwound.append(True)

    sweep = Sweep(
        forward,
        skeleton.layers,
        TOKENS.split(2),
        outer_modules=skeleton.outer_modules,
        enter_outer=LayerReader(skeleton, ALONE, stop=0).place_outer,
    )
    stops = iter(sweep)
    assert isinstance(next(stops), LayerStop)
    stops.close()
    assert len(unwound) == 3
    assert not any(layer._forward_pre_hooks for layer in skeleton.layers)
