"""Runs one stage: skips it, or begins or resumes it, has its units made, and finishes it."""

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
"""Maximum number of losses that a stage's manifest keeps for the report."""


def run_stage(module: StageModule, run: Run) -> None:
    """Runs one stage to its end, unless it is not needed or already done."""
    name, stage = module.NAME, run.stage(module.NAME)
    reason = module.skip(run)
    if reason is not None:
        _emit_skipped(name, f"not needed, {reason}")
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
        _emit_skipped(name, "done already")
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


def _emit_skipped(name: str, reason: str) -> None:
    if "/" not in name:  # a stage inside another one is only mentioned when it works
        emit(StageSkipped(name, reason))


def _drain(module: StageModule, run: Run, stage: Stage, missing: list[str]) -> None:
    """Does the work, and checks about once a second whether this driver may continue."""
    with closing(module.work(run, stage, missing)) as events:  # type: ignore[type-var]
        for _ in events:
            run.check_may_continue()


def _facts(stage: Stage, plan: Plan) -> dict[str, Any]:
    """Returns what the manifest holds beside the records: the losses, and the model, since readers of a published stage
    have no plan to find it in."""
    count, losses = read_failures(stage.url, LOSSES_SHOWN)
    facts = {"losses": [lost.in_words for lost in reversed(losses)], "lost": count}
    return facts | ({"model": plan.identity["model"]} if "model" in plan.identity else {})
