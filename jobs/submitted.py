"""jobs, stop: calibprune's jobs on a Ray cluster, and which of them work on a run."""

import hashlib
import posixpath
import re
import time
from collections.abc import Iterator

from ray.job_submission import JobDetails, JobStatus

from calibprune.errors import UserError
from calibprune.text import duration
from cluster.jobs_api import Client, exit_code, patiently, reach

STOP_SECONDS = 60.0
ALIASES = {"s3a": "s3", "gcs": "gs", "local": "file"}


def list_jobs(address: str | None) -> Iterator[str]:
    """Yields a line for each of calibprune's jobs that the cluster remembers, the latest last."""
    client = patiently(lambda: reach(address))
    found = patiently(lambda: _calibprune_jobs(client))
    width = max((len(job.submission_id or "") for job in found), default=0)
    if not found:
        yield "no jobs of calibprune"
    for job in found:
        code = str(exit_code(job)) if job.status.is_terminal() else "-"
        output = (job.metadata or {}).get("output", job.entrypoint)
        yield f"{job.submission_id:<{width}}  {job.status.value:<9}  exit {code:<3}  {age(job):>6} ago  {output}"


def stop(target: str, address: str | None) -> str:
    """Stops the job with the id `target`, or the job that works on the run `target`, and waits until it has ended.

    Returns a line with the command that resumes the run. Raises UserError where there is no such job.
    """
    client = patiently(lambda: reach(address))
    found = patiently(lambda: _working_on(client, target))
    if not found:
        raise UserError(
            f"the cluster knows no job of calibprune named {target}, nor one that works on a run there: "
            f"`calibprune jobs{address_option(address)}` lists their ids"
        )
    job = found[-1]
    job_id = str(job.submission_id)
    if job.status.is_terminal():
        return f"job {job_id} has already ended: it {outcome(job)}"
    patiently(lambda: client.stop_job(job_id))
    deadline = time.monotonic() + STOP_SECONDS
    while not (job := patiently(lambda: client.job(job_id))).status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"job {job_id} did not stop within {STOP_SECONDS:.0f} s: try again")
        time.sleep(0.2)
    command = (job.metadata or {}).get("command")
    resume = f"{command}{address_option(address)}" if command else "the command that started it"
    return f"job {job_id} {outcome(job)}; what is committed is kept, resume with: {resume}"


def job_name(output: str) -> str:
    """Returns the submission id of a run's first job, which is the same for every way to write the run's URL."""
    scheme, path = split_scheme(output)
    path = posixpath.normpath(re.sub(r"^/+", "/", path))  # POSIX keeps two slashes apart
    readable = re.sub(r"[^a-z0-9]+", "-", posixpath.basename(path).lower()).strip("-")[:40]
    digest = hashlib.sha256(f"{ALIASES.get(scheme, scheme)}://{path}".encode()).hexdigest()[:8]
    return "-".join(part for part in ("calibprune", readable, digest) if part)


def attempts(client: Client, output: str) -> list[JobDetails]:
    """Returns the jobs that worked on a run, in the order of their numbers."""
    name = job_name(output)
    numbered = []
    for job in client.list_jobs():
        match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id or "")
        if match:
            numbered.append((int(match[1] or 1), job))
    return [job for _, job in sorted(numbered, key=lambda pair: pair[0])]


def _working_on(client: Client, target: str) -> list[JobDetails]:
    """Returns the job with the id `target`, or the jobs of the run `target`, the active ones last.

    Jobs that `ray job submit` started are found if their command contains the run's URL.
    """
    ours = _calibprune_jobs(client)
    if named := [job for job in ours if job.submission_id == target]:
        return named
    ids = {job.submission_id for job in attempts(client, target)}
    found = [job for job in ours if job.submission_id in ids or _names(job.entrypoint, target)]
    return sorted(found, key=lambda job: not job.status.is_terminal())


def _names(entrypoint: str, output: str) -> bool:
    """Returns whether a command sets a run's output to that URL."""
    given = re.findall(r"\boutput=(?:'([^']*)'|\"([^\"]*)\"|(\S+))", entrypoint)
    return any(job_name("".join(one)) == job_name(output) for one in given)


def _calibprune_jobs(client: Client) -> list[JobDetails]:
    """Returns calibprune's jobs, including those that `ray job submit` started, in the order of their start."""

    def is_ours(job: JobDetails) -> bool:
        started = re.search(
            r"(-m jobs|\bcalibprune) (run|generate|curate|prune|evaluate)\b", job.entrypoint
        )
        return bool(job.submission_id) and (
            "calibprune" in (job.metadata or {}) or started is not None
        )

    return sorted(filter(is_ours, client.list_jobs()), key=lambda job: job.start_time or 0)


def outcome(job: JobDetails) -> str:
    """Describes how a job ended, such as "is done"."""
    if job.status == JobStatus.FAILED:
        return f"failed with exit code {exit_code(job)}"
    return {JobStatus.SUCCEEDED: "is done", JobStatus.STOPPED: "is stopped"}[job.status]


def age(job: JobDetails) -> str:
    """Describes the time since a job's start."""
    now = time.time()
    return duration(now - (job.start_time / 1000 if job.start_time else now))


def address_option(address: str | None) -> str:
    """Returns the option with which a displayed command reaches the same cluster."""
    return "" if address is None else f" --address {address}"


def split_scheme(url: str) -> tuple[str, str]:
    """Returns scheme and path of a URL; a path without a scheme has the scheme `file`."""
    scheme, separator, path = url.partition("://")
    return (scheme, path) if separator else ("file", url)
