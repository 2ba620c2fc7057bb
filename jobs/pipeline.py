"""The main flow: validate, join the cluster, then generate -> curate -> prune -> evaluate -> report.

Every stage reads files and writes files in its own folder of the run; the same command resumes after any crash.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from calibprune import storage
from calibprune.config import Config
from calibprune.lease import Lease
from cluster.session import connect
from jobs.check import check_before_work
from jobs.preflight import check_cluster_before_work, check_room
from jobs.run import Run
from jobs.stage_runner import run_stage
from jobs.stages import modules
from jobs.tracking import tracking

LEASE_SECONDS, REMOTE_LEASE_SECONDS = 30.0, 120.0
"""Time without a sign of life after which another driver may take over; longer on a store, where writes are retried."""


def run_stages(config: Config, commands: Sequence[str]) -> Run:
    """Runs the stages of these commands in order; finished stages are skipped.

    Raises UserError, before any work starts, for bad input and for a run that another driver is working on; DriftError
    when the folder holds a run with other settings.
    """
    run = Run(config, commands)
    check_before_work(run)
    working = set(commands) != {"report"}  # a report may be made while another driver works
    with (
        only_driver(run) if working else nullcontext(),
        connect(config.cluster) if working else nullcontext(False) as started_here,
    ):
        if working:
            check_cluster_before_work(run, started_here)
        if working:
            if not run.begun:  # a resumed run waits: a lost node may come back
                check_room(run)
            run.open()
        with tracking(run) if working else nullcontext(lambda: None) as track:
            for module in modules(commands):
                run.check_may_continue()
                run_stage(module, run)
                track()
    return run


@contextmanager
def only_driver(run: Run) -> Iterator[None]:
    """Holds the run's lease, so that no other driver works on it."""
    expire = LEASE_SECONDS if storage.is_local(run.config.output) else REMOTE_LEASE_SECONDS
    with Lease(run.config.output, expire_seconds=expire) as lease:
        run.lease = lease
        yield
    run.lease = None
