"""The stages of a run, in order: one module each, which knows everything about its stage and nothing about any other.

A stage module has
    NAME          folder of the stage inside the run's folder
    PUBLISHED     options of `calibprune.publish.publish` for this stage
    skip(run)     returns why this run does not need the stage, such as "prune.pool is given"; None where it does
    check(run)    raises UserError for bad input, before any work
    needs(run)    yields the actors that the stage asks the cluster for
    plan(run)     returns what determines the result, and the units of work; None for a stage that always runs
    work(run, stage, missing)   has the missing units committed; yields events
    facts(run)    returns what the report shows, from the records of the run alone
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
    "curate": "Filter samples and other texts, pack what is kept into a calibration pool, and compare the texts with "
    "reference corpora.",
    "curate/analysis": "",
    "prune": "Prune layer by layer with the pool; write a Hugging Face checkpoint.",
    "evaluate": "Measure the held-out perplexity of the dense and the pruned model.",
    "report": "Gather what the stages recorded into report/index.html and report/report.json.",
}
"""Help text of each stage's command, by the stage's folder. A stage inside another one runs with its command."""
COMMANDS = tuple(name for name in STAGES if "/" not in name)


@dataclass(frozen=True)
class Plan:
    """The work of a stage."""

    identity: Mapping[str, Any]
    """Settings, inputs and versions that determine the result; a resumed run must have the same."""
    units: Sequence[str]
    """Units of work, each committed on its own."""
    noun: str = "units"
    """Name of the units in progress lines."""
    layers: int | None = None
    """Number of layers to sweep through, where progress is counted in layers; None: it is counted in units."""


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
    """Imports the module of a stage, which takes seconds for most."""
    return cast(StageModule, importlib.import_module(f"jobs.{name.rsplit('/', 1)[-1]}"))


def modules(commands: Collection[str]) -> list[StageModule]:
    """Imports the stage modules of these commands, in the order of work."""
    return [module(name) for name in STAGES if name.split("/")[0] in commands]
