"""A temperature that changes over a sample's first tokens, as vLLM's logits processors.

vLLM divides the logits by the request's temperature, the final one, itself. So that they end up divided by T(t),
they are multiplied by final / T(t) before that, where penalties, which only scale, do not matter.
vLLM imports this module in the engine's process, by the name of the class that fits its model runner.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig

from calibprune.calibration.engine import SCHEDULE_START, SCHEDULE_TOKENS


def scale(start: float, final: float, tokens: int, generated: int) -> float:
    """final / T for the token after `generated` ones: T goes in equal steps from start to final at `tokens`."""
    return final / (start + (final - start) * min(max(generated, 0) / tokens, 1.0))


class BatchSchedule(LogitsProcessor):
    """For the model runner that keeps a row of the batch for every request (the only one on CPUs)."""

    def __init__(
        self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool
    ) -> None:
        self._device = device
        self._requests: dict[int, tuple[SamplingParams, Sequence[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False  # it is, but those that say so come after min-p, which is to see the scaled logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, _scheduled)
        for row, (sampling, output) in list(self._requests.items()):
            if len(output) >= sampling.extra_args[SCHEDULE_TOKENS]:  # type: ignore[index]
                del self._requests[row]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self._requests:
            scales = [_scale(params, len(output)) for params, output in self._requests.values()]
            rows = torch.tensor(list(self._requests), device=self._device)
            logits[rows] *= torch.tensor(scales, dtype=logits.dtype, device=self._device)[:, None]
        return logits


def _scheduled(
    sampling: SamplingParams, prompt: list[int] | None, output: list[int]
) -> tuple[SamplingParams, Sequence[int]] | None:
    return (sampling, output) if SCHEDULE_TOKENS in (sampling.extra_args or {}) else None


def _scale(sampling: SamplingParams, generated: int) -> float:
    extra = sampling.extra_args or {}
    start, tokens = extra[SCHEDULE_START], extra[SCHEDULE_TOKENS]
    return scale(start, sampling.temperature, tokens, generated)


class SlotSchedule(SlotLogitsProcessor):
    """For the second model runner (the default on GPUs), which keeps a slot for every request."""

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        self._prompt_tokens = req_states.prompt_len.np
        self._requests: dict[int, SamplingParams] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._requests.pop(req_idx, None)
        if SCHEDULE_TOKENS in (sampling_params.extra_args or {}):
            self._requests[req_idx] = sampling_params
        return req_idx in self._requests

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        if not self._requests:
            return logits
        slots = ctx.idx_mapping_np  # a row each, for nothing is speculated
        scales = np.ones(len(slots), np.float32)
        for row, slot in enumerate(slots.tolist()):
            if slot in self._requests:
                generated = int(ctx.seq_lens_upper_bound_np[row] - self._prompt_tokens[slot])
                sampling = self._requests[slot]
                scales[row] = _scale(sampling, generated)
                if generated >= sampling.extra_args[SCHEDULE_TOKENS]:  # type: ignore[index]
                    del self._requests[slot]
        if (scales != 1).any():
            logits *= torch.from_numpy(scales).to(logits.device, logits.dtype)[:, None]
        return logits
