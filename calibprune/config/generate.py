"""generate: what samples start from, how they are sampled, and the units of work."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from calibprune.config.base import NonNegativeInt, PositiveInt, Section, TextSource, named


class BosPrefixes(Section):
    """Starts every sample from the model's start-of-text token alone."""

    type: Literal["bos"]


class VocabularyPrefixes(Section):
    """Starts every sample from a few tokens that are drawn for it."""

    type: Literal["vocabulary"]
    draw: Literal["model", "uniform"] = "model"
    """Distribution of the tokens: `model`: the model's own after the start-of-text token, at temperature 1 and not
    truncated; `uniform`: every ordinary token of the vocabulary with equal probability."""
    tokens: PositiveInt = 1
    bos: bool = True
    """Whether a start-of-text token, which is not counted, goes in front; `draw: model` needs it."""

    @model_validator(mode="after")
    def _model_starts_somewhere(self) -> Self:
        if self.draw == "model" and not self.bos:
            raise ValueError("draw: model needs bos: true, there is nothing to draw after")
        return self


class DatasetPrefixes(TextSource):
    """Starts every sample from the first tokens of one document of a text source."""

    type: Literal["dataset"]
    tokens: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """Number of tokens of the document itself, without a start-of-text token in front; [a, b]: a number from a to b,
    both included, is drawn for every sample."""
    bos: bool = True

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if isinstance(self.tokens, tuple) and self.tokens[0] > self.tokens[1]:
            raise ValueError(f"tokens is [least, most], not {list(self.tokens)}")
        return self


class PromptPrefixes(TextSource):
    """Lets every sample answer one prompt in the model's chat template: task prompts, reasoning traces."""

    type: Literal["prompts"]
    column: str = "prompt"
    """Name of the column with a text, or with a list of chat messages that have `role` and `content`."""
    system: str | None = None
    """A system message in front of every prompt that is a text."""
    max_prompt_tokens: PositiveInt = 1024
    """Maximum tokens of a prompt, template included; longer prompts are skipped."""


Prefixes = Annotated[
    BosPrefixes | VocabularyPrefixes | DatasetPrefixes | PromptPrefixes,
    Field(discriminator="type"),
    BeforeValidator(named),
]


class TemperatureSchedule(Section):
    """Moves the temperature of the first tokens in equal steps from `start` to `generate.temperature`."""

    start: Annotated[float, Field(gt=0, le=2)]
    """Temperature of the first token; vLLM allows at most 2."""
    tokens: PositiveInt
    """The token at which `generate.temperature` is reached."""


class GenerateSettings(Section):
    prefixes: Prefixes = BosPrefixes(type="bos")
    samples: PositiveInt = 5000
    samples_per_prefix: PositiveInt = 1
    """Number of samples that start from the same prefix, each with its own seed; `samples` counts all of them."""
    max_tokens: PositiveInt = 2048
    """Maximum number of new tokens of a sample, which may end earlier with the end-of-text token."""
    min_tokens: NonNegativeInt = 0
    stop_at_eos: bool = True
    """Whether the end-of-text token ends a sample; otherwise every sample has max_tokens."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Temperature of sampling; with 0 always the likeliest token; vLLM allows at most 2."""
    temperature_schedule: TemperatureSchedule | None = None
    """A temperature for the first tokens; None: the same as for all others."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: PositiveInt | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest probability of a token that may be drawn, as a share of the likeliest token's."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: NonNegativeInt = 0
    shard_rows: PositiveInt = 500
    """Number of samples in one unit of work, which is what a crash can cost."""
    engines: PositiveInt | None = None
    """Number of vLLM engines; None: as many as the workers of the cluster section have room for."""
    tensor_parallel: PositiveInt = 1
    """Number of GPUs, all of one node, among which each of the model's matrices is split."""
    pipeline_parallel: PositiveInt = 1
    """Number of parts, each on tensor_parallel GPUs, among which an engine's layers are split. With more GPUs than a
    node has, the parts are on several nodes."""
    batch_invariant: bool = False
    """Whether engines on GPUs use kernels whose result for a sample does not depend on the samples beside it, so that
    samples are reproducible to the bit; it takes more time. Ignored on CPUs."""
    max_concurrent: PositiveInt | None = None
    """Maximum number of samples that one engine generates at the same time. None: as many as the GPUs have memory for,
    on CPUs 256."""
    shards_in_flight: PositiveInt = 2
    """Number of shards that one engine works on at a time, so that a shard's last samples do not leave it idle."""
    attempts: PositiveInt = 3
    """Number of failures after which a shard is set aside."""
    max_bad_shards: NonNegativeInt = 0
    """Maximum number of shards that may be left out after `attempts` failures; with more the stage fails at its end."""
    shard_timeout_seconds: PositiveInt | None = None
    """Longest time that a shard may take. None: ten times the longest so far; for the first shards, and for those with
    more tokens than any finished one, an hour, or the time for 100 tokens a second if that is longer."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    cpu_kvcache_gib: PositiveInt = 2
    enforce_eager: bool | None = None
    """Whether engines run uncompiled. None: compiled on GPUs, eager on CPUs, where compiling rarely pays off."""

    @model_validator(mode="after")
    def _schedule_ends_above_zero(self) -> Self:
        if self.temperature_schedule is not None and self.temperature == 0:
            raise ValueError("a temperature_schedule cannot end at temperature 0: take 0.01")
        return self
