"""The processor for the model runner that needs a GPU, step by step; the other one runs in the tests of the engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from calibprune.calibration.engine import SCHEDULE_START, SCHEDULE_TOKENS
from calibprune.calibration.temperature import SlotSchedule, scale


def sampling(start, tokens, final) -> SamplingParams:
    extra = {SCHEDULE_START: start, SCHEDULE_TOKENS: tokens}
    return SamplingParams(temperature=final, extra_args=extra)


class Batch:
    """Slots of requests as the model runner keeps them."""

    def __init__(self, slots: int) -> None:
        self.prompts = np.zeros(slots, np.int32)
        unused = dict.fromkeys(("all_token_ids", "prefill_len", "total_len"))
        state = LogitsProcRequestState(
            device=torch.device("cpu"), max_num_reqs=slots, vocab_size=6,
            prompt_len=SimpleNamespace(np=self.prompts), **unused,
        )  # fmt: skip
        self.processor = SlotSchedule(None, state)  # type: ignore[arg-type]

    def add(self, slot: int, prompt: int, params: SamplingParams) -> bool:
        self.prompts[slot] = prompt
        return self.processor.add_request(slot, params)

    def scales(self, rows: list[tuple[int, int]]) -> list[float]:
        """What the logits of (slot, tokens so far) are multiplied by."""
        slots = np.array([slot for slot, _ in rows])
        index = torch.from_numpy(slots)
        context = LogitsContext(
            expanded_idx_mapping=index, idx_mapping=index, idx_mapping_np=slots,
            expanded_local_pos=torch.zeros(len(rows)), input_ids=torch.zeros(len(rows)),
            pos=torch.tensor([length - 1 for _, length in rows]),
            seq_lens_upper_bound_np=np.array([length for _, length in rows]),
        )  # fmt: skip
        logits = torch.arange(1.0, 7.0).repeat(len(rows), 1)
        after = self.processor.apply(logits.clone(), context)
        ratio = after / logits
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
        return ratio[:, 0].tolist()


def test_logits_end_up_divided_by_the_scheduled_temperature():
    for generated, temperature in ((-3, 2.0), (0, 2.0), (1, 1.7), (4, 0.8), (5, 0.5), (90, 0.5)):
        assert 0.5 / scale(2.0, 0.5, 5, generated) == pytest.approx(temperature)


def test_every_request_has_its_own_schedule_in_whatever_row_it_is():
    batch = Batch(4)
    assert batch.add(3, 10, sampling(2.0, 4, 1.0))
    assert not batch.add(0, 7, SamplingParams(temperature=0.5))
    assert batch.add(1, 2, sampling(0.1, 2, 0.4))
    assert batch.scales([(3, 10), (0, 7), (1, 2)]) == pytest.approx([1 / 2, 1, 4])
    assert batch.scales([(1, 3), (3, 11), (0, 8)]) == pytest.approx([1.6, 1 / 1.75, 1])
    assert batch.scales([(0, 9), (1, 4), (3, 12)]) == pytest.approx([1, 1, 1 / 1.5])
    assert batch.scales([(3, 13)]) == pytest.approx([0.8])
    assert batch.scales([(3, 14), (1, 5)]) == [1, 1]


def test_a_slot_forgets_the_request_before_and_a_resumed_one_goes_on():
    batch = Batch(2)
    batch.add(0, 5, sampling(2.0, 4, 1.0))
    assert batch.scales([(0, 6)]) == pytest.approx([1 / 1.75])
    assert not batch.add(0, 5, SamplingParams(temperature=0.5))
    assert batch.scales([(0, 5)]) == [1]
    batch.add(
        1, 5, sampling(2.0, 4, 1.0)
    )  # preempted after a token, taken up again in another slot
    assert batch.scales([(1, 7)]) == pytest.approx([1 / 1.5])
