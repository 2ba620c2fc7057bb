"""What all stages share: a stage is skipped, resumed or begun, worked on, and finished."""

import time
from contextlib import closing
from typing import Any

from calibprune.events import Lost, StageBegun, StageEnded, StageSkipped, emit, listening
from calibprune.failures import FailureFiles, read_failures
from calibprune.stage import Stage
from cluster.metrics import StageMetrics
from jobs.run import Run
from jobs.stages import Plan, StageModule

LOSSES_SHOWN = 50
"""Most losses of a stage that its manifest keeps for the report."""


def run_stage(module: StageModule, run: Run) -> None:
    """Brings one stage to its end, unless it is not needed or done already."""
    name, stage = module.NAME, run.stage(module.NAME)
    reason = module.skip(run)
    if reason is not None:
        _say_skipped(name, f"not needed, {reason}")
        return
    with listening(FailureFiles(stage.url)):
        try:
            plan = module.plan(run)
            if plan is None:
                _drain(module, run, stage, [])
            else:
                _run_planned(module, run, stage, plan)
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # Ray wraps what an actor raised
            emit(Lost("driver", f"{type(cause).__name__}: {cause}"))
            raise


def _run_planned(module: StageModule, run: Run, stage: Stage, plan: Plan) -> None:
    name, label = module.NAME, run.label(module.NAME)
    missing = stage.plan(plan.identity, plan.units)
    if not missing and stage.finished:
        _say_skipped(name, "done already")
        return
    stage.begin()
    begun, finished = time.monotonic(), False
    done = len(plan.units) - len(missing)
    with listening(StageMetrics(label)):
        emit(StageBegun(label.run, name, len(plan.units), done, plan.noun, plan.layers))
        try:
            _drain(module, run, stage, missing)
            stage.finish(_facts(stage, plan))
            finished = True
        finally:
            emit(StageEnded(name, time.monotonic() - begun, finished))


def _say_skipped(name: str, reason: str) -> None:
    if "/" not in name:  # a stage inside another is nobody's concern until it works
        emit(StageSkipped(name, reason))


def _drain(module: StageModule, run: Run, stage: Stage, missing: list[str]) -> None:
    """Does the work, and looks about once a second whether this driver may go on."""
    with closing(module.work(run, stage, missing)) as events:  # type: ignore[type-var]
        for _ in events:
            run.go_on()


def _facts(stage: Stage, plan: Plan) -> dict[str, Any]:
    """What the manifest says beside the records: what was lost on the way, and whose model it was made with, for
    readers of a published stage, which has no plan."""
    count, losses = read_failures(stage.url, LOSSES_SHOWN)
    facts = {"losses": [lost.in_words for lost in reversed(losses)], "lost": count}
    return facts | ({"model": plan.identity["model"]} if "model" in plan.identity else {})
