"""Paused forwards whose tensors are moved away meanwhile compute the same."""

import sys
import weakref

import pytest
import torch

from calibprune.config.model import ModelSettings
from calibprune.gang import ALONE
from calibprune.layer_stream import LayerReader
from calibprune.model import build_skeleton
from calibprune.offload import Fetched, Parking, Staging
from calibprune.sweep import GroupStop, LayerStop, Sweep
from tests.tiny import write_tiny_llama

TOKENS = torch.randint(0, 258, (6, 64), generator=torch.Generator().manual_seed(1))
HIDDEN, INTERMEDIATE, LAYERS = 64, 160, 3


class Elsewhere:
    """Stands for host memory: makes copies, and records which storages were freed."""

    def __init__(self) -> None:
        self.left: list[weakref.ref] = []
        self.bytes = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.left.append(weakref.ref(tensor.untyped_storage()))
        self.bytes += tensor.nbytes
        return tensor.clone()


class Watched(Parking):
    """Counts the bytes that are parked, whether they had to be copied or not."""

    def __init__(self, elsewhere: Elsewhere) -> None:
        super().__init__(torch.device("cpu"), elsewhere, least_bytes=4096)
        self.parked_bytes = 0

    def park(self, frame):
        parked = super().park(frame)
        self.parked_bytes += sum(tensor.nbytes for tensor in parked)
        return parked


def sweep(skeleton, parking):
    base = skeleton.model.base_model
    return Sweep(
        lambda ids: base(input_ids=ids, use_cache=False).last_hidden_state,
        skeleton.layers,
        TOKENS.split(2),
        outer_modules=skeleton.outer_modules,
        enter_outer=LayerReader(skeleton, ALONE, stop=0).place_outer,
        parking=parking,
    )


@torch.no_grad()
def run(path, parking, at_stop=lambda stop: None):
    skeleton = build_skeleton(ModelSettings(path=path))
    swept = sweep(skeleton, parking)
    with LayerReader(skeleton, ALONE) as reader:
        for stop in swept:
            if isinstance(stop, LayerStop):
                skeleton.place_layer(stop.layer, reader.take(stop.layer).tensors)
            at_stop(stop)
    return torch.cat(swept.results)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(write_tiny_llama(folder, layers=LAYERS, hidden=HIDDEN, intermediate=INTERMEDIATE))


def test_the_forwards_compute_the_same(path):
    elsewhere = Elsewhere()
    parked = run(path, Parking(torch.device("cpu"), elsewhere, least_bytes=4096))
    assert torch.equal(parked, run(path, None))
    stops_of_layer = 5  # entered, q k v, o, gate up, down
    assert len(elsewhere.left) >= 3 * (LAYERS * stops_of_layer - 1)


def test_what_is_widest_leaves_at_the_widest_stop(path):
    elsewhere, held, copied = Elsewhere(), [], []
    parking = Watched(elsewhere)

    def at_stop(stop):
        if isinstance(stop, GroupStop) and stop.linears == ("mlp.down_proj",):
            held.append(parking.parked_bytes)
            copied.append(elsewhere.bytes)
        parking.parked_bytes = elsewhere.bytes = 0

    run(path, parking, at_stop)
    tokens, itemsize = TOKENS.numel(), 4
    # inputs of the linear and, as wide as the hidden states, of the MLP, the residual, the layer and the model
    assert held[1] >= tokens * (INTERMEDIATE + 4 * HIDDEN) * itemsize
    # only what enters the linear is new since the stop before, at the same MLP
    assert copied[1] <= tokens * INTERMEDIATE * itemsize


def test_a_tensor_that_was_changed_is_copied_again():
    elsewhere = Elsewhere()
    parking = Parking(torch.device("cpu"), elsewhere, least_bytes=1024)
    same, changed = torch.ones(64, 64), torch.ones(64, 64)

    def frame(same, changed):
        return sys._getframe()

    for _ in range(3):
        parking.fetch(parking.park(frame(same, changed)))
        changed[0].mul_(2)
    parking.park(frame(same, changed))
    assert elsewhere.bytes == (1 + 4) * same.nbytes
    assert changed[0, 0] == 8 and changed[1, 0] == 1 and same.sum() == 64 * 64


def test_a_staging_buffer_is_there_once():
    staging = Staging(pin=False)
    first = staging.take(100)
    assert staging.take(60).data_ptr() == first.data_ptr()
    assert len(staging.take(200)) == 200


@torch.no_grad()
def test_layers_that_pass_through_one_buffer_are_the_same(path):
    """As on a GPU: a layer has left the buffer before the next one is read into it."""
    skeleton = build_skeleton(ModelSettings(path=path))
    with (
        LayerReader(skeleton, ALONE) as plain,
        LayerReader(skeleton, ALONE, staging=Staging(pin=False)) as staged,
    ):
        taken = [(plain.take(i).tensors, staged.take(i).tensors) for i in range(LAYERS)]
    for one, other in taken:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_small_tensors_parameters_and_whole_numbers_stay():
    def frame_of(a, b, c, d):
        import sys

        return sys._getframe()

    big, small = torch.ones(64, 64), torch.ones(4)
    whole, parameter = torch.ones(4096, dtype=torch.int64), torch.nn.Parameter(torch.ones(64, 64))
    parking = Parking(torch.device("cpu"), lambda tensor: tensor.clone(), least_bytes=1024)
    parked = parking.park(frame_of(big, small, whole, parameter))
    assert any(tensor is big for tensor in parked)
    assert not any(tensor is other for tensor in parked for other in (small, whole, parameter))


def test_fetched_brings_one_at_a_time():
    tensors = [torch.ones(2), torch.zeros(3)]
    fetched = Fetched(tensors, torch.device("cpu"))
    assert len(fetched) == 2 and fetched[1].shape == (3,)
    assert [tensor.shape[0] for tensor in fetched] == [2, 3]
