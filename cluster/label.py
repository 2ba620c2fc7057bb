"""What the actors, tasks and metrics of a stage are called in Ray's dashboard: `calibprune:<run>:<stage>:engine-0`."""

from collections import Counter
from dataclasses import dataclass

_given: Counter[str] = Counter()
"""Names that this driver has given: Ray takes each once, and frees that of a dead actor some time later."""


@dataclass(frozen=True)
class Label:
    run: str
    """The last part of the run folder's URL."""
    stage: str

    @property
    def tags(self) -> dict[str, str]:
        return {"run": self.run, "stage": self.stage}

    def task(self, work: str) -> str:
        return f"calibprune:{self.run}:{self.stage}:{work}"

    def actor(self, kind: str, number: int) -> str:
        """A name that no other actor of this driver has or had: the second engine 3 is `engine-3.2`."""
        name = self.task(f"{kind}-{number}")
        _given[name] += 1
        return name if _given[name] == 1 else f"{name}.{_given[name]}"


def label_of(stage_url: str) -> Label:
    """The label of the stage in a folder `.../<run>/<stage>`."""
    parts = stage_url.rstrip("/").split("/")
    return Label(parts[-2] if len(parts) > 1 else "", parts[-1])
