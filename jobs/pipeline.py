"""The main flow: validate, join the cluster, then generate -> curate -> prune -> evaluate -> report.

Every stage reads files and writes files in its own folder of the run; the same command resumes after any crash.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from calibprune import storage
from calibprune.config import Config
from calibprune.failures import Failure, Journal
from calibprune.lease import Lease
from cluster.label import label_of
from cluster.session import connect
from jobs import curate, evaluate, generate, log, progress, prune, report
from jobs.check import check_before_work
from jobs.preflight import check_room, look_before_work
from jobs.progress import say
from jobs.run import Run
from jobs.tracking import tracking

LEASE_SECONDS, REMOTE_LEASE_SECONDS = 30.0, 120.0
"""After which a driver that shows no life is replaced by another; as long as storage is tried again."""

STAGES: dict[str, Callable[[Run], None]] = {
    "generate": generate.run,
    "curate": curate.run,
    "prune": prune.run,
    "evaluate": evaluate.run,
    "report": report.run,
}


def run_stages(config: Config, stages: Sequence[str]) -> Run:
    """Runs the given stages in order; stages that are finished already are passed over.

    Raises UserError for bad input and for a run that another driver is working on before any work starts, DriftError
    when the folder holds a run with other settings.
    """
    run = Run(config)
    check_before_work(run, stages)
    working = set(stages) != {"report"}  # a report may be made beside a driver that works
    driving = only_driver(run) if working else nullcontext()
    with driving, connect(config.cluster) if working else nullcontext(False) as started_here:
        if working and not started_here:
            look_before_work(run, stages)
        if working:
            if not run.begun:  # who resumes waits: a node that was lost may be on its way back
                check_room(run, stages)
            run.open()
        with tracking(run) if working else nullcontext(lambda: None) as track:
            for stage in stages:
                progress.still_ours()
                with journaled(run, stage):
                    STAGES[stage](run)
                track()
    if "report" in stages:
        say(f"report: {run.url('report', 'index.html')}")
    return run


@contextmanager
def journaled(run: Run, stage: str) -> Iterator[None]:
    """Writes down what ends a stage, for `calibprune status`; the error goes on."""
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised
        failure = Failure("driver", f"{type(cause).__name__}: {cause}")
        Journal(run.url(stage), say).note(failure)
        log.failure(label_of(run.url(stage)).tags, failure)
        raise


@contextmanager
def only_driver(run: Run) -> Iterator[None]:
    """Keeps other drivers away from the run."""
    expire = LEASE_SECONDS if storage.is_local(run.config.output) else REMOTE_LEASE_SECONDS
    with Lease(run.config.output, expire_seconds=expire, tell=say) as lease:
        progress.still_ours = lease.check
        try:
            yield
        finally:
            progress.still_ours = progress.nobody_else
