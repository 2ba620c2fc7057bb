"""DCLM in vLLM: its transformers backend, which also reads tensors under OpenLM's names.

The class keeps the backend's name, by which vLLM recognises that this is the backend.
"""

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models import transformers

from calibprune.models.openlm import split_tensor


class TransformersForCausalLM(transformers.TransformersForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(part for one in weights for part in split_tensor(*one))
