"""The main flow: validate, join the cluster, then generate -> curate -> prune -> evaluate -> report.

Every stage reads files and writes files in its own folder of the run; the same command resumes after any crash.
"""

from collections.abc import Callable, Sequence

from calibprune.config import Config
from cluster.session import connect
from jobs import curate, evaluate, generate, prune, report
from jobs.check import check_before_work
from jobs.progress import say
from jobs.run_folder import Run

STAGES: dict[str, Callable[[Run], None]] = {
    "generate": generate.run,
    "curate": curate.run,
    "prune": prune.run,
    "evaluate": evaluate.run,
    "report": report.run,
}


def run_stages(config: Config, stages: Sequence[str]) -> Run:
    """Runs the given stages in order; stages that are finished already are passed over.

    Raises UserError for bad input before any work starts, DriftError when the folder holds a run with other settings.
    """
    run = Run(config)
    check_before_work(run, stages)
    with connect(config.cluster):
        run.open()
        for stage in stages:
            STAGES[stage](run)
    if "report" in stages:
        say(f"report: {run.url('report', 'index.html')}")
    return run
