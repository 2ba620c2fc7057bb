"""A survey of the live nodes of a cluster: a small task on each reports what it has and reaches."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util import client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calibprune import storage
from calibprune.errors import StoreUnavailable, UserError
from calibprune.redact import one_line
from cluster import probe
from cluster.places import Node, nodes

SURVEY_SECONDS = 60.0
"""Longest wait for all answers: processes start slowly on a busy machine, and each step may wait 10 s for a store."""
MAX_NAMED = 4
"""Maximum number of nodes that one message names."""
DRIVER = "this machine"
"""Name of the driver's machine in messages."""


@dataclass(frozen=True)
class Surveyed:
    """A node that answered."""

    node: Node
    facts: dict[str, Any]
    """Facts that `cluster.probe.machine_facts` returned there."""

    @property
    def name(self) -> str:
        return f"{self.facts['host']} {self.node.name}"


@dataclass(frozen=True)
class Survey:
    nodes: tuple[Surveyed, ...]
    silent: tuple[tuple[Node, str], ...]
    """Nodes that gave no answer, each with the reason."""
    driver: dict[str, Any]

    @property
    def has_gpus(self) -> bool:
        return any(one.node.total.get("GPU") for one in self.nodes)

    def hosts_workers(self, one: Surveyed) -> bool:
        """Returns whether engines and workers may run on a node: where any node has GPUs, only those that have."""
        return bool(one.node.total.get("GPU" if self.has_gpus else "CPU"))


def take_survey(
    output: str | None = None,
    model: Sequence[str] = (),
    timeout_seconds: float = SURVEY_SECONDS,
) -> Survey:
    """Asks every live node what it has, and whether it reaches the run's folder and the model's files.

    `output` is the URL of the run's folder, `model` the URLs of the config and of the first weights. The tasks hold no
    CPU and no GPU, and run where calibprune is not installed. Nodes that do not answer in time are listed as silent.
    """
    cloudpickle.register_pickle_by_value(probe)
    facts_task = ray.remote(num_cpus=0, max_retries=0)(probe.machine_facts)
    inside = not client.ray.is_connected()  # a client outside the cluster does not know its folders
    temp = ray.get_runtime_context().get_temp_dir() if inside else "/tmp"
    cluster = nodes()
    with _shared_file(output) as seen:
        wanted = {"output": output, "seen": seen, "model": tuple(model)}
        asked = {
            facts_task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
            .remote(temp, wanted): node
            for node in cluster
        }  # fmt: skip
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_seconds)
    answered: list[Surveyed] = []
    silent = [(asked[task], f"no answer within {timeout_seconds:g} s") for task in late]
    for task in late:
        ray.cancel(task, force=True)
    for task in ready:
        try:
            answered.append(Surveyed(asked[task], ray.get(task)))
        except RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            silent.append((asked[task], one_line(lines[-1], 200)))
    answered.sort(key=lambda one: one.name)
    return Survey(tuple(answered), tuple(silent), probe.machine_facts(temp, {}))


@contextmanager
def _shared_file(output: str | None) -> Iterator[tuple[str, str] | None]:
    """Writes a file that every node should see in the run's folder; yields (URL, content)."""
    if output is None:
        yield None
        return
    content = secrets.token_hex(8)
    url = storage.probe_url(output, content)
    storage.write(url, content.encode())
    try:
        yield url, content
    finally:
        storage.remove(url)


def check_survey(survey: Survey) -> None:
    """Raises UserError where versions differ, or a node does not reach the run's folder or the model; StoreUnavailable
    where all that is wrong is transient trouble of a store."""
    if found := problems(survey):
        raise (StoreUnavailable if only_transient(survey) else UserError)("; ".join(found))


def problems(survey: Survey) -> list[str]:
    """Lists the versions that differ, then what nodes do not reach, one line each."""
    return [skew for skew in (version_skew(survey),) if skew] + unreachable(survey)


def only_transient(survey: Survey) -> bool:
    """Returns whether nothing is wrong beyond transient trouble of a store."""
    return version_skew(survey) is None and all(
        one.facts[f"{what}_transient"]
        for one in survey.nodes
        for what in ("output", "model")
        if one.facts[f"{what}_error"]
    )


def version_skew(survey: Survey) -> str | None:
    """Describes which versions differ between the machines, and where, in one line; None where all agree."""
    different = []
    for what, groups in _versions(survey).items():
        if len(groups) > 1:  # the most common version first
            ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
            places = " and ".join(f"{version} on {names_of(names)}" for version, names in ordered)
            different.append(f"{what} is {places}")
    if not different:
        return None
    return f"versions differ: {', '.join(different)}: install the same on every machine, such as from one image"


def _versions(survey: Survey) -> dict[str, dict[str, list[str]]]:
    """Returns the names of machines by version, by package.

    A machine without a GPU hosts no workers where others have GPUs: it needs no vLLM, and its torch may be the build
    for CPUs.
    """
    found: dict[str, dict[str, list[str]]] = {}

    def add(name: str, facts: dict[str, Any], hosts_workers: bool) -> None:
        installed = dict(facts["versions"])
        installed["Python"] = ".".join(facts["python"].split(".")[:2])
        installed["calibprune (hash of its source)"] = facts["source"]
        for what, version in installed.items():
            if version is None and not hosts_workers and what == "vllm":
                continue
            if (
                hosts_workers and survey.has_gpus and what == "torch"
            ):  # builds for other CUDAs differ too
                found.setdefault("torch's build", {}).setdefault(str(version), []).append(name)
            public = "not installed" if version is None else version.split("+")[0]
            found.setdefault(what, {}).setdefault(public, []).append(name)

    for one in survey.nodes:
        add(one.name, one.facts, survey.hosts_workers(one))
    add(DRIVER, survey.driver, False)
    if len(found.get("torch", {})) > 1:
        found.pop("torch's build", None)
    return found


def unreachable(survey: Survey) -> list[str]:
    """Lists why nodes do not reach the run's folder or the model, one line for every reason with its nodes."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in survey.nodes:
        for what, key in (("output", "output_error"), ("the model", "model_error")):
            if one.facts[key]:
                reasons.setdefault((what, one.facts[key]), []).append(one.name)
    return [
        f"{what} cannot be {'written' if what == 'output' else 'read'} from {names_of(names)}: {reason}"
        for (what, reason), names in reasons.items()
    ]


def names_of(names: Sequence[str]) -> str:
    """Lists the names of machines, the first few."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
