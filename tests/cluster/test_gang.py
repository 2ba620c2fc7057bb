"""Gangs of real actors on several Ray nodes: the same bytes for any number of workers and after any loss."""

import re
import shutil
import signal
import threading
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file, save_file

from calibprune.config.model import ModelSettings
from calibprune.config.prune import PruneSettings
from calibprune.errors import UserError
from calibprune.evaluation.perplexity import sweep_perplexity
from calibprune.events import LayerEntered, Lost, Tick, UnitDone, emit, listening, result_of
from calibprune.failpoint import OUT_OF_MEMORY
from calibprune.model import build_skeleton
from calibprune.process import node
from calibprune.pruning.export import ALLOCATION, REST
from calibprune.pruning.layer import layer_unit
from calibprune.stage import Stage
from cluster.actors import Actors
from cluster.gang_driver import Relief, WorkerGroup, WorkFailed, _LayerPace, _Pulse, rebuild
from cluster.layer_worker import Progress
from cluster.places import Bundle, NoRoom
from tests.cluster.gangs import BUNDLE, GENERATED, LAYERS, MORE_WAYS, SETTINGS, WAYS, shards
from tests.cluster.leftovers import assert_nothing_left, leftovers
from tests.cluster.nodes import cluster_of

pytestmark = pytest.mark.timeout(600)


class Idle:
    """Does nothing but hold its resources."""


class Stepping:
    """Makes a step whenever it is told to."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    @ray.method(concurrency_group="health")
    def progress(self) -> int:
        return self.steps


WINDOWS = {
    name: torch.randint(0, 258, (count, 40), generator=torch.Generator().manual_seed(count))
    for name, count in {"one": 5, "two": 3}.items()
}


@pytest.fixture(scope="module")
def nodes(failpoints):
    with cluster_of(2, 1, 1) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_left(nodes):
    """Checks that a test leaves nothing of its gangs."""
    yield
    assert_nothing_left()


@pytest.fixture(scope="module")
def perplexities(models):
    """Measures the perplexities in one process without a gang."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        skeleton = build_skeleton(ModelSettings(path=models["bfloat16"]))
        found = result_of(sweep_perplexity(skeleton, WINDOWS, 1))
    finally:
        torch.set_num_threads(threads)
    return {name: asdict(of) for name, of in found.items()}


@pytest.mark.parametrize(
    ("size", "on_nodes"),
    [
        pytest.param(1, {1}, marks=pytest.mark.slow),
        pytest.param(2, {1, 2}, marks=pytest.mark.slow),
        pytest.param(3, {2, 3}, marks=pytest.mark.slow),
        (4, {3}),
    ],
)
def test_any_number_of_workers_on_any_number_of_nodes_writes_the_same_bytes(
    nodes, models, pool, alone, perplexities, tmp_path, size, on_nodes
):
    with WorkerGroup(size, BUNDLE, SETTINGS) as group:
        assert len(set(group.nodes)) in on_nodes
        for dtype, path in models.items():
            checkpoint = build_skeleton(ModelSettings(path=path)).checkpoint
            for number, way in enumerate(WAYS + MORE_WAYS * (size != 2 and dtype == "bfloat16")):
                stage = Stage(str(tmp_path / f"{dtype}-{number}"))
                arguments = (
                    ModelSettings(path=path),
                    PruneSettings.model_validate(way),
                    pool,
                    stage.url,
                )
                events = list(group.events("prune", arguments, None))
                assert shards(stage) == alone(dtype, way), (dtype, way)
                done = [event for event in events if isinstance(event, UnitDone)]
                records = {event.record.unit: event.record for event in done}
                assert len(done) == len(records)
                measured = {ALLOCATION} if "allocation" in way else set()
                assert records.keys() == {REST, *measured, *map(layer_unit, range(LAYERS))}
                for index in range(LAYERS):
                    layer = records[layer_unit(index)].facts
                    assert (layer["worker"], layer["workers"]) == (index % size, size)
                read = {unit: record.facts["bytes_read"] for unit, record in records.items()}
                first_look = read.pop(ALLOCATION, checkpoint.bytes)
                for once in (first_look, sum(read.values())):
                    assert 0.85 * checkpoint.bytes <= once <= 1.05 * checkpoint.bytes
        evaluated, model = Stage(str(tmp_path / "evaluate")), ModelSettings(path=models["bfloat16"])
        arguments = (model, WINDOWS, 1, None, evaluated.url, "dense")
        found = [e for e in group.events("evaluate", arguments, None) if isinstance(e, UnitDone)]
        assert [event.record.facts["perplexity"] for event in found] == [perplexities]


@pytest.mark.slow
def test_any_number_of_workers_counts_the_same_positions(
    nodes, models, marked_pool, alone, tmp_path
):
    model = ModelSettings(path=models["bfloat16"])
    with WorkerGroup(3, BUNDLE, SETTINGS) as group:
        for number, way in enumerate([WAYS[2], MORE_WAYS[1]]):
            stage = Stage(str(tmp_path / str(number)))
            arguments = (model, PruneSettings.model_validate(way), marked_pool, stage.url)
            for _ in group.events("prune", arguments, None):
                pass
            assert shards(stage) == alone("bfloat16", way, GENERATED) != alone("bfloat16", way)


def test_workers_killed_in_a_collective_while_writing_and_before_the_done_record(
    nodes, failpoints, alone, run
):
    (failpoints / "reduce-0-1").touch()
    (failpoints / "writing-model-layer-00001").touch()
    (failpoints / "between-data-and-done-layer-00003").touch()
    run()
    assert not list(failpoints.iterdir())
    assert shards(run.stage) == alone("float32", run.way)
    assert len(run.losses) == 3
    assert "worker 1 with layer-00000 on" in run.losses[0] and "at layer 0" in run.losses[0]
    assert [loss.kind for loss in run.heard.losses] == ["worker"] * 3
    assert run.heard.losses[0].units == (layer_unit(0),)
    assert run.heard.losses[0].node == node()


@pytest.mark.slow
def test_what_the_records_say_is_served_as_prometheus_metrics(nodes, run):
    run()
    wanted = {
        f'calibprune_sparsity{{layer="{layer}",linear="{linear}"}}'
        for layer in range(LAYERS)
        for linear in ("self_attn.q_proj", "mlp.down_proj")
    }
    deadline = time.monotonic() + 60
    while True:
        text = "".join(
            urllib.request.urlopen(
                f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10
            ).read().decode()
            for node in ray.nodes()
            if node["Alive"]
        )  # fmt: skip
        series = {name for name in wanted if _series(text, name)}
        if series == wanted or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert series == wanted
    assert "calibprune_layer_seconds{" in text.replace("ray_calibprune", "calibprune")


def _series(text: str, name: str) -> bool:
    """Returns whether a line has this metric with at least these labels and a value of about 0.5."""
    metric, labels = name.removesuffix("}").split("{")
    for line in text.splitlines():
        if line.startswith(f"ray_{metric}{{") and all(label in line for label in labels.split(",")):
            return abs(float(line.rsplit(" ", 1)[-1]) - 0.5) < 0.01
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        "enter-2-0",
        "broadcast-2-0",
        "broadcast-2-1",
        "reduce-2-0",
        "solve-2-1",
        "writing-model-layer-00002",
    ],
)
def test_a_worker_killed_anywhere(nodes, failpoints, alone, run, where):
    (failpoints / where).touch()
    run()
    assert not list(failpoints.iterdir())
    assert len(run.losses) == 1
    assert shards(run.stage) == alone("float32", run.way)


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_and_replaced(nodes, failpoints, alone, run):
    (failpoints / "solve-3-1").write_text(str(int(signal.SIGSTOP)))
    run(layer_timeout_seconds=20)
    assert shards(run.stage) == alone("float32", run.way)
    (loss,) = run.losses
    assert "worker 1" in loss and "at layer 3: does not answer" in loss


@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_run_with_its_name_and_place(
    nodes, failpoints, run, monkeypatch
):
    (failpoints / "solve-2-1").touch()
    with pytest.raises(WorkFailed, match=r"3 losses in a row: worker 1 on .* at layer 2"):
        for event in run.events():
            if isinstance(event, Lost):
                (failpoints / "solve-2-1").touch()
    (failpoints / "solve-2-1").unlink(missing_ok=True)


def test_a_new_gang_says_what_it_waits_for_and_in_the_end_what_there_was(nodes, monkeypatch, heard):
    monkeypatch.setattr("cluster.places.FIRST_LINE_SECONDS", 0.5)
    soon = SETTINGS.model_copy(update={"start_timeout_seconds": 6})
    with pytest.raises(
        WorkFailed, match=r"2 x \(1 CPU, 1 GPU\) did not .* within 6 s; .* has 4 CPU"
    ):
        rebuild(2, Bundle(1, 1), soon)
    assert "waiting for 2 x (1 CPU, 1 GPU): 0 free, 0 busy" in heard.text
    with Actors(Idle, 4, BUNDLE, [], timeout_seconds=240):
        asked = len(placement_group_table())
        with pytest.raises(WorkFailed, match=r"within 6 s; .* free now 0 CPU, busy 4 CPU \("):
            rebuild(2, BUNDLE, soon)
        assert len(placement_group_table()) == asked + 1
    assert re.search(r"waiting for 2 x \(1 CPU\): 0 free, 4 busy.* of 6 s", heard.text)


@pytest.mark.slow
def test_snapshots_spare_the_sweep_through_finished_layers(nodes, failpoints, alone, run):
    settings = PruneSettings.model_validate(run.way | {"snapshot_layers": 2})
    run.arguments = (run.arguments[0], settings, *run.arguments[2:])
    (failpoints / "solve-4-0").touch()
    run()
    assert shards(run.stage) == alone("float32", run.way)
    assert len(run.losses) == 1
    kept = {path.name for path in Path(run.stage.url, "snapshots").iterdir()}
    assert kept == {"00002", "00004"}


def test_more_workers_than_the_cluster_has_room_for(nodes):
    for count, bundle, reason in (
        (5, BUNDLE, r"5 x \(1 CPU\) were asked for, the cluster has 4 CPU in all, room for 4"),
        (3, Bundle(2, 0), r"3 x \(2 CPU\) .* the cluster has 4 CPU in all, room for 1 of them"),
    ):
        with pytest.raises(NoRoom, match=reason):
            Actors(Idle, count, bundle, [], timeout_seconds=2)


@pytest.mark.slow
def test_places_that_others_hold_are_told_waited_for_and_given_up(nodes, monkeypatch, heard):
    monkeypatch.setattr("cluster.places.FIRST_LINE_SECONDS", 0.5)
    other = ray.remote(num_cpus=2)(Idle).remote()
    ray.get(other.__ray_ready__.remote())
    with pytest.raises(
        NoRoom,
        match=r"4 x \(1 CPU\) did not become free within 6 s; the cluster has 4 CPU, free now 2 CPU, "
        r"busy 2 CPU \(2 CPU on [\d.]+ \(\w{8}\)\): other work holds them",
    ):
        Actors(Idle, 4, BUNDLE, [], timeout_seconds=6)
    said = r"waiting for 4 x \(1 CPU\): 2 free, 2 busy \(.*\), [0-6] of 6 s"
    assert re.search(said, heard.text)
    assert "placement groups" not in leftovers()
    release = threading.Timer(1.0, ray.kill, [other])
    release.start()
    with Actors(Idle, 4, BUNDLE, [], timeout_seconds=240) as actors:
        assert len(actors.handles) == 4


def test_an_interrupted_gang_leaves_nothing(nodes, run):
    events = run.events()
    with pytest.raises(KeyboardInterrupt):
        for event in events:
            if isinstance(event, UnitDone):
                assert leftovers()["placement groups"]
                events.throw(KeyboardInterrupt)


@pytest.mark.parametrize(
    ("tensor", "factor", "error", "message"),
    [
        ("mlp.up_proj", float("inf"), UserError, r"^/.*the weights of model\.layers\.1\.mlp\.up_proj\.weight are not"),
        ("post_attention_layernorm", 1e30, WorkFailed,
         r"worker \d on .* layer 1, group mlp.gate_proj, mlp.up_proj: the inputs of micro-batch"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_solved_are_named_and_not_tried_again(
    nodes, run, tmp_path, models, tensor, factor, error, message
):
    broken = Path(shutil.copytree(models["float32"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors[f"model.layers.1.{tensor}.weight"] *= factor
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    run.arguments = (ModelSettings(path=str(broken)), *run.arguments[1:])
    with pytest.raises(error, match=message):
        run()
    assert run.heard.losses == []


def test_a_gpu_without_memory_is_spared_once_and_then_ends_the_run_with_advice(
    nodes, failpoints, alone, run
):
    model, settings, *rest = run.arguments
    offloading = (model, settings.model_copy(update={"offload": True}), *rest)
    relief = Relief("take larger GPUs", offloading, "once more, offloading")
    (failpoints / "solve-1-1").write_text(OUT_OF_MEMORY)
    message = r"worker 0 on .* at layer 3: CUDA out of memory.*: take larger GPUs$"
    with pytest.raises(UserError, match=message):
        for event in run.events(relief=relief):
            if isinstance(event, Lost) and len(run.losses) == 1:
                (failpoints / "solve-3-0").write_text(OUT_OF_MEMORY)
    assert [loss.kind for loss in run.heard.losses] == ["memory", "memory"]
    assert run.heard.text.count("once more, offloading") == 1
    assert shards(run.stage).items() <= alone("float32", run.way).items()


def test_a_slow_layer_is_no_hang_as_long_as_steps_are_made():
    pace = _LayerPace(None, 600.0)
    entered, begun = LayerEntered(0, 80), pace.heard_at
    pace.enter(entered, begun)
    assert not pace.overdue(begun + 599) and pace.overdue(begun + 601)
    pace.heard_at = begun + 590
    assert not pace.overdue(begun + 1189) and pace.overdue(begun + 1191)
    given = _LayerPace(20.0, 600.0)  # a limit of the user's own is one for the whole layer
    given.enter(entered, begun)
    given.heard_at = begun + 19
    assert given.overdue(begun + 21)


def test_steps_that_no_event_tells_of_are_asked_for(nodes, monkeypatch):
    monkeypatch.setattr("cluster.gang_driver.PULSE_SECONDS", 0.0)
    actor = ray.remote(num_cpus=0, concurrency_groups={"health": 1})(Stepping).remote()

    def beats(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if pulse.beats(time.monotonic()):
                return True
            time.sleep(0.01)
        return False

    pulse = _Pulse([actor])
    ray.get(actor.step.remote())
    assert beats(60) and not beats(0.5)
    ray.get(actor.step.remote())
    assert beats(60)
    ray.kill(actor)
    assert not beats(0.5)


def test_what_is_emitted_inside_a_long_call_is_a_step():
    progress = Progress()
    with listening(progress):
        emit(Tick())
    assert progress.steps == 1
