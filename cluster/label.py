"""Names of a stage's actors, tasks and metrics in Ray's dashboard, such as `calibprune:<run>:<stage>:engine-0`."""

from collections import Counter
from dataclasses import dataclass

_uses: Counter[str] = Counter()
"""Number of actors that this driver has given each name: Ray takes a name once, and frees a dead actor's only later."""


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
        """Returns a name that no other actor of this driver has or had: the second engine 3 is `engine-3.2`."""
        name = self.task(f"{kind}-{number}")
        _uses[name] += 1
        return name if _uses[name] == 1 else f"{name}.{_uses[name]}"


def label_of(stage_url: str) -> Label:
    """Returns the label of the stage in a folder `.../<run>/<stage>`."""
    parts = stage_url.rstrip("/").split("/")
    return Label(parts[-2] if len(parts) > 1 else "", parts[-1])
