"""Streamed perplexity against the plain model's."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from calibprune.config.model import ModelSettings
from calibprune.errors import UserError
from calibprune.evaluation.perplexity import cut_windows, sweep_perplexity
from calibprune.events import result_of
from calibprune.model import build_skeleton
from calibprune.pruning.memory import evaluation_memory
from tests.tiny import write_tiny_llama


@pytest.mark.parametrize("batch_sequences", [1, 2, 8])
def test_every_texts_perplexity_is_the_plain_models(tmp_path, batch_sequences, heard):
    path = str(write_tiny_llama(tmp_path / "m", tied=True))
    generator = torch.Generator().manual_seed(0)
    windows = {
        "one": torch.randint(0, 258, (5, 40), generator=generator),
        "two": torch.randint(0, 258, (3, 40), generator=generator),
    }
    skeleton = build_skeleton(ModelSettings(path=path))
    result = result_of(sweep_perplexity(skeleton, windows, batch_sequences, work="dense"))
    assert [str(event) for event in heard.events] == [f"dense: layer {i} of 3" for i in range(4)]
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, ids in windows.items():
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].double()
        expected = math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
        assert result[name].perplexity == pytest.approx(expected, rel=1e-5)
        assert result[name].predicted_tokens == len(ids) * 39


def test_windows_follow_one_another_without_overlap():
    windows = cut_windows(list(range(11)), 3, None, "text")
    assert windows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows(list(range(11)), 3, 2, "text").shape == (2, 3)


@pytest.mark.parametrize(("tokens", "sequences"), [(2, None), (0, None), (8, 3)])
def test_too_little_text_is_told(tokens, sequences):
    with pytest.raises(UserError, match=f"held-out text mine has {tokens} tokens"):
        cut_windows(list(range(tokens)), 3, sequences, "mine")


def test_on_a_gpu_most_is_what_paused_forwards_hold_or_the_logits(tmp_path):
    path = str(write_tiny_llama(tmp_path / "m"))
    skeleton = build_skeleton(ModelSettings(path=path))
    hidden, vocabulary = 64, skeleton.model.config.vocab_size
    one = evaluation_memory(skeleton, [(1, 40)] * 100, 1)
    assert one.paused == 100 * 40 * 2 * hidden * 4
    assert evaluation_memory(skeleton, [(1, 40)] * 100, 3).paused == 34 * 40 * 2 * hidden * 4
    assert one.forward >= 40 * vocabulary * 4
    wider = evaluation_memory(skeleton, [(8, 40)] * 100, 1)
    assert wider.forward > 320 * vocabulary * 4 and wider.bytes > wider.paused + wider.forward
    assert one.largest == "paused"
