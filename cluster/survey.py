"""What the live nodes of a cluster are, and whether they agree: one small task on each, and what their answers mean."""

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
"""For all answers: starting a process on a busy machine takes its time, a store is waited for 10 s a step."""
NAMED = 4
DRIVER = "this machine"


@dataclass(frozen=True)
class Surveyed:
    """A node that answered."""

    node: Node
    facts: dict[str, Any]
    """As `cluster.probe.look` tells them."""

    @property
    def name(self) -> str:
        return f"{self.facts['host']} {self.node.name}"


@dataclass(frozen=True)
class Survey:
    nodes: tuple[Surveyed, ...]
    silent: tuple[tuple[Node, str], ...]
    """Nodes that gave no answer, and why."""
    driver: dict[str, Any]

    @property
    def has_gpus(self) -> bool:
        return any(one.node.total.get("GPU") for one in self.nodes)

    def works(self, one: Surveyed) -> bool:
        """Whether engines and workers may come to a node: not where it has no GPU beside others that have."""
        return bool(one.node.total.get("GPU" if self.has_gpus else "CPU"))


def take_survey(
    output: str | None = None,
    model: Sequence[str] = (),
    timeout_seconds: float = SURVEY_SECONDS,
) -> Survey:
    """Asks every live node what it is, and whether it reaches the run's folder and the model's files.

    `output` is the URL of the run's folder, `model` those of the config and of the first weights. The tasks hold no
    CPU and no GPU and need nothing of ours on the nodes. Nodes that do not answer in time are told apart.
    """
    cloudpickle.register_pickle_by_value(probe)
    look = ray.remote(num_cpus=0, max_retries=0)(probe.look)
    ours = not client.ray.is_connected()  # a client outside the cluster does not know its folders
    temp = ray.get_runtime_context().get_temp_dir() if ours else "/tmp"
    cluster = nodes()
    with _seen_by_all(output) as seen:
        wanted = {"output": output, "seen": seen, "model": tuple(model)}
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
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
    return Survey(tuple(answered), tuple(silent), probe.look(temp, {}))


@contextmanager
def _seen_by_all(output: str | None) -> Iterator[tuple[str, str] | None]:
    """A file in the run's folder that every node should see, as (URL, content)."""
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
    where only that is wrong which passes."""
    if found := problems(survey):
        raise (StoreUnavailable if only_passing(survey) else UserError)("; ".join(found))


def problems(survey: Survey) -> list[str]:
    """Versions that differ, then what nodes do not reach, one line each."""
    return [skew for skew in (version_skew(survey),) if skew] + unreachable(survey)


def only_passing(survey: Survey) -> bool:
    """Whether nothing is wrong, or only what a store fails at in passing."""
    return version_skew(survey) is None and all(
        one.facts[f"{what}_passes"]
        for one in survey.nodes
        for what in ("output", "model")
        if one.facts[f"{what}_error"]
    )


def version_skew(survey: Survey) -> str | None:
    """Which versions differ between the nodes, and where, in one line; None where all agree."""
    told = []
    for what, groups in _versions(survey).items():
        if len(groups) > 1:  # that of most machines first
            ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
            places = " and ".join(f"{version} on {_names(names)}" for version, names in ordered)
            told.append(f"{what} is {places}")
    if not told:
        return None
    return f"versions differ: {', '.join(told)}: give every machine the same, such as one image"


def _versions(survey: Survey) -> dict[str, dict[str, list[str]]]:
    """Names of machines by version, by package.

    A machine that has no GPU beside others that have is no worker's: it needs no vLLM, and its torch may be the
    build for CPUs.
    """
    found: dict[str, dict[str, list[str]]] = {}

    def add(name: str, facts: dict[str, Any], works: bool) -> None:
        told = dict(facts["versions"])
        told["Python"] = ".".join(facts["python"].split(".")[:2])
        told["calibprune (hash of its source)"] = facts["source"]
        for what, version in told.items():
            if version is None and not works and what == "vllm":
                continue
            if works and survey.has_gpus and what == "torch":  # builds for other CUDAs differ too
                found.setdefault("torch's build", {}).setdefault(str(version), []).append(name)
            public = "not installed" if version is None else version.split("+")[0]
            found.setdefault(what, {}).setdefault(public, []).append(name)

    for one in survey.nodes:
        add(one.name, one.facts, survey.works(one))
    add(DRIVER, survey.driver, False)
    if len(found.get("torch", {})) > 1:
        found.pop("torch's build", None)
    return found


def unreachable(survey: Survey) -> list[str]:
    """The run's folder or the model out of reach of nodes: one line for every reason, naming the nodes."""
    told: dict[tuple[str, str], list[str]] = {}
    for one in survey.nodes:
        for what, key in (("output", "output_error"), ("the model", "model_error")):
            if one.facts[key]:
                told.setdefault((what, one.facts[key]), []).append(one.name)
    return [
        f"{what} cannot be {'written' if what == 'output' else 'read'} from {_names(names)}: {reason}"
        for (what, reason), names in told.items()
    ]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
