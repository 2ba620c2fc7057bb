"""The stages of a run, in order: a module each, which knows everything about its stage and nothing about any other.

A stage module has
    NAME          folder of the stage inside the run's
    PUBLISHED     what is special about publishing it, as options of `calibprune.publish.publish`
    skip(run)     why this run does not need the stage, such as "prune.pool is given"; None where it does
    check(run)    raises UserError for bad input, before any work
    needs(run)    the actors that the stage asks the cluster for
    plan(run)     what determines the result, and the units of work; None for a stage that is done each time
    work(run, stage, missing)   has the missing units committed; yields events
    facts(run)    what the report shows, from the records of the run alone
"""

import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from calibprune.events import Event
    from calibprune.stage import Stage
    from cluster.places import Need
    from jobs.run import Run

STAGES = {
    "generate": "Let the model write samples with vLLM, with their exact token ids and log-probabilities.",
    "curate": "Bring samples and other texts through the filters, pack what is kept into a calibration pool, and "
    "compare it with reference corpora.",
    "curate/analysis": "",
    "prune": "Prune layer by layer with the pool; writes a Hugging Face checkpoint.",
    "evaluate": "Held-out perplexity of the dense and the pruned model.",
    "report": "Gather what the stages recorded into report/index.html and report/report.json.",
}
"""Folder of each stage inside the run's, and what its command does. A stage inside another belongs to its command."""
COMMANDS = tuple(name for name in STAGES if "/" not in name)


@dataclass(frozen=True)
class Plan:
    """What a stage is to do."""

    identity: Mapping[str, Any]
    """Settings, inputs and versions that determine the result: a resume must have the same."""
    units: Sequence[str]
    """Units of work, which commit one by one."""
    noun: str = "units"
    """What the units are called in progress lines."""
    layers: int | None = None
    """Layers to sweep through, where progress is counted in these; None counts units."""


class StageModule(Protocol):
    NAME: str
    PUBLISHED: dict[str, Any]

    @staticmethod
    def skip(run: "Run") -> str | None: ...
    @staticmethod
    def check(run: "Run") -> None: ...
    @staticmethod
    def needs(run: "Run") -> "Iterator[Need]": ...
    @staticmethod
    def plan(run: "Run") -> Plan | None: ...
    @staticmethod
    def work(run: "Run", stage: "Stage", missing: Sequence[str]) -> "Iterator[Event]": ...
    @staticmethod
    def facts(run: "Run") -> Mapping[str, Any] | None: ...


def module(name: str) -> StageModule:
    """The module of a stage; imported here, since most take seconds."""
    return cast(StageModule, importlib.import_module(f"jobs.{name.rsplit('/', 1)[-1]}"))


def modules(commands: Collection[str]) -> list[StageModule]:
    """The modules of these commands, in the order of work."""
    return [module(name) for name in STAGES if name.split("/")[0] in commands]
