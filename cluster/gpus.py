"""Finds what is wrong with the GPUs of a cluster before work starts, and which kind they are."""

from collections.abc import Iterator
from typing import Any

from calibprune.errors import UserError
from cluster.survey import Survey, Surveyed, names_of

DRIVERS = {12: 525, 13: 580}
"""Oldest driver for each major version of CUDA."""


def check_gpus(survey: Survey) -> None:
    """Raises UserError for GPUs that cannot be used, and for nodes on which no kernel can be compiled."""
    if found := [*broken_gpus(survey), *uncompiled(survey)]:
        raise UserError("; ".join(found))


def broken_gpus(survey: Survey) -> Iterator[str]:
    """Describes GPUs that CUDA cannot use, one line for every reason with its nodes."""
    reasons: dict[str, list[str]] = {}
    for one in _with_gpus(survey):
        if reason := _unusable(one.facts.get("cuda") or {}):
            reasons.setdefault(reason, []).append(one.name)
    for reason, nodes in reasons.items():
        yield f"the GPUs of {names_of(nodes)} cannot be used: {reason}"


def _unusable(cuda: dict[str, Any]) -> str | None:
    built, driver = cuda.get("built_for"), cuda.get("driver")
    if built is None and "built_for" in cuda:
        return "PyTorch there is a build for CPUs"
    if built and driver and driver // 1000 < int(built.split(".")[0]):
        needed = DRIVERS.get(int(built.split(".")[0]))
        newer = f"install driver {needed} or later" if needed else "install a newer driver"
        return (
            f"the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, PyTorch there for CUDA {built}: "
            f"{newer}, or a PyTorch for that CUDA"
        )
    if error := cuda.get("error"):
        return f"CUDA does not start, {error}: restart that node or leave it out"
    return None


def uncompiled(survey: Survey) -> Iterator[str]:
    """Names nodes with GPUs on which Triton cannot compile its kernels."""
    lacking: dict[str, list[str]] = {}
    for one in _with_gpus(survey):
        if one.facts.get("cuda") and (what := one.facts.get("compiler_lacks")):
            lacking.setdefault(what, []).append(one.name)
    for what, nodes in lacking.items():
        yield (
            f"{names_of(nodes)} cannot compile GPU kernels, {what}: install gcc, g++ and Python's headers (python3-dev)"
        )


def kind(survey: Survey) -> dict[str, Any] | None:
    """Returns what the bits of a result on GPUs depend on: their name, their number of multiprocessors, and the
    versions of CUDA and Triton. None where the nodes do not report it.

    Raises UserError where the GPUs of the cluster differ.
    """
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for one in _with_gpus(survey):
        cuda = one.facts.get("cuda") or {}
        for device in cuda.get("devices", ())[: int(one.node.total["GPU"])]:
            here = (device["name"], device["multiprocessors"], cuda["built_for"], cuda["triton"])
            names = kinds.setdefault(here, [])
            if one.name not in names:
                names.append(one.name)
    if len(kinds) > 1:
        each = ", ".join(
            f"{_in_words(*here)} on {names_of(names)}" for here, names in kinds.items()
        )
        raise UserError(
            f"the cluster's GPUs differ, and with them the last bits of a result: {each}: take nodes of one kind"
        )
    keys = ("gpu", "multiprocessors", "cuda", "triton")
    return dict(zip(keys, next(iter(kinds)), strict=True)) if kinds else None


def _in_words(name: str, multiprocessors: int, cuda: str | None, triton: str | None) -> str:
    return f"{name} ({multiprocessors} multiprocessors, CUDA {cuda}, Triton {triton})"


def taken(one: Surveyed, needed_bytes: int) -> str | None:
    """Describes the GPUs of a node whose memory other processes hold, where Ray takes more of them to be free than have
    `needed_bytes` left; None where there are enough."""
    gpus = one.facts["gpus"] or ()
    left = [gpu["free_bytes"] for gpu in gpus if gpu["bytes"] >= needed_bytes]
    with_room = sum(free >= needed_bytes for free in left)
    short = min(int(one.node.free.get("GPU", 0)), len(left)) - with_room
    if short <= 0:
        return None
    least = min(left) / 2**30
    return f"others hold the memory of {short} GPU{'s' * (short > 1)} of {one.name}, {least:.1f} GiB are free"


def _with_gpus(survey: Survey) -> Iterator[Surveyed]:
    return (one for one in survey.nodes if one.node.total.get("GPU"))
