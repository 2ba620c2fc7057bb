"""The model, and the cluster that works on it."""

from typing import Literal

from pydantic import field_validator

from calibprune.config.base import NonNegativeInt, PositiveInt, Section, Url


class ModelSettings(Section):
    """The causal language model."""

    path: Url
    """A local folder, an fsspec URL (s3://, gs://, hf://) or a hub id `org/name`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the forwards; `auto` is the checkpoint's own. The pruned checkpoint keeps the input's dtype."""
    trust_remote_code: bool = False
    rope_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """DCLM only: dtype to which the rotary frequencies are rounded, where it is not the one of the model's config.json,
    or bfloat16 as in training; float32 does not round them."""


class ClusterSettings(Section):
    """Resources to request from Ray.

    Without an address a run uses RAY_ADDRESS if it is set, else a Ray of this user or of root that runs on this
    machine, else it starts its own."""

    address: Url | None = None
    workers: PositiveInt | None = None
    """Number of workers, whose CPUs also limit curate's tasks; None: one, and curate's tasks take all free CPUs."""
    gpus_per_worker: NonNegativeInt | None = None
    """GPUs of a worker; None: one if the cluster has GPUs, or vLLM is the build for them, else none."""
    cpus_per_worker: PositiveInt | None = None
    """CPUs of a worker, and of an engine for each of its GPUs; None: 1 beside a GPU, and without GPUs an equal share of
    the largest node's CPUs."""
    start_timeout_seconds: PositiveInt = 600
    verbose: bool = False
    """Whether the driver's output shows the workers' own logs."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _one_at_most(cls, gpus: int | None) -> int | None:
        if gpus is not None and gpus > 1:
            raise ValueError("a worker uses one GPU, or none with 0: for more GPUs raise workers")
        return gpus

    @property
    def worker_count(self) -> int:
        return self.workers or 1
