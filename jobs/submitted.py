"""jobs, stop: the jobs of calibprune that a Ray cluster knows, and which of them work on a run."""

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
    """A line for each of calibprune's jobs that the cluster remembers, the latest last."""
    client = patiently(lambda: reach(address))
    found = patiently(lambda: _ours(client))
    width = max((len(job.submission_id or "") for job in found), default=0)
    if not found:
        yield "no jobs of calibprune"
    for job in found:
        code = str(exit_code(job)) if job.status.is_terminal() else "-"
        output = (job.metadata or {}).get("output", job.entrypoint)
        yield f"{job.submission_id:<{width}}  {job.status.value:<9}  exit {code:<3}  {age(job):>6} ago  {output}"


def stop(target: str, address: str | None) -> str:
    """Stops the job of that id, or the one that works on that run, and waits until it has ended.

    Returns a line that says how to resume. Raises UserError where there is no such job.
    """
    client = patiently(lambda: reach(address))
    found = patiently(lambda: _working_on(client, target))
    if not found:
        raise UserError(
            f"the cluster knows no job of calibprune named {target}, nor one that works on a run there: "
            f"`calibprune jobs{at(address)}` lists their ids"
        )
    job = found[-1]
    job_id = str(job.submission_id)
    if job.status.is_terminal():
        return f"job {job_id} has ended before: it {outcome(job)}"
    patiently(lambda: client.stop_job(job_id))
    deadline = time.monotonic() + STOP_SECONDS
    while not (job := patiently(lambda: client.job(job_id))).status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"job {job_id} did not stop within {STOP_SECONDS:.0f} s: try again")
        time.sleep(0.2)
    command = (job.metadata or {}).get("command")
    resume = f"{command}{at(address)}" if command else "the command that started it"
    return f"job {job_id} {outcome(job)}; what is committed is kept, resume with: {resume}"


def job_name(output: str) -> str:
    """The submission id of the first job that works on a run: the same for every way to write the run's URL."""
    scheme, path = parted(output)
    path = posixpath.normpath(re.sub(r"^/+", "/", path))  # POSIX keeps two slashes apart
    readable = re.sub(r"[^a-z0-9]+", "-", posixpath.basename(path).lower()).strip("-")[:40]
    digest = hashlib.sha256(f"{ALIASES.get(scheme, scheme)}://{path}".encode()).hexdigest()[:8]
    return "-".join(part for part in ("calibprune", readable, digest) if part)


def attempts(client: Client, output: str) -> list[JobDetails]:
    """The jobs that worked on a run, in the order of their numbers."""
    name = job_name(output)
    numbered = []
    for job in client.list_jobs():
        match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id or "")
        if match:
            numbered.append((int(match[1] or 1), job))
    return [job for _, job in sorted(numbered, key=lambda pair: pair[0])]


def _working_on(client: Client, target: str) -> list[JobDetails]:
    """The jobs of that id, or those that work on that run, the latest last.

    Among them are those that `ray job submit` started, if their command names the run's URL.
    """
    ours = _ours(client)
    if named := [job for job in ours if job.submission_id == target]:
        return named
    ids = {job.submission_id for job in attempts(client, target)}
    found = [job for job in ours if job.submission_id in ids or _names(job.entrypoint, target)]
    return sorted(found, key=lambda job: not job.status.is_terminal())


def _names(entrypoint: str, output: str) -> bool:
    """Whether a command gives a run that output."""
    given = re.findall(r"\boutput=(?:'([^']*)'|\"([^\"]*)\"|(\S+))", entrypoint)
    return any(job_name("".join(one)) == job_name(output) for one in given)


def _ours(client: Client) -> list[JobDetails]:
    """Jobs of calibprune, also those that `ray job submit` started, by the time of their start."""

    def is_ours(job: JobDetails) -> bool:
        started = re.search(
            r"(-m jobs|\bcalibprune) (run|generate|curate|prune|evaluate)\b", job.entrypoint
        )
        return bool(job.submission_id) and (
            "calibprune" in (job.metadata or {}) or started is not None
        )

    return sorted(filter(is_ours, client.list_jobs()), key=lambda job: job.start_time or 0)


def outcome(job: JobDetails) -> str:
    """How an ended job ended."""
    if job.status == JobStatus.FAILED:
        return f"failed with exit code {exit_code(job)}"
    return {JobStatus.SUCCEEDED: "is done", JobStatus.STOPPED: "is stopped"}[job.status]


def age(job: JobDetails) -> str:
    """The time since a job's start in words."""
    now = time.time()
    return duration(now - (job.start_time / 1000 if job.start_time else now))


def at(address: str | None) -> str:
    """The option by which a command that is shown reaches the same cluster."""
    return "" if address is None else f" --address {address}"


def parted(url: str) -> tuple[str, str]:
    """Scheme and path of a URL; a path alone is a file."""
    scheme, separator, path = url.partition("://")
    return (scheme, path) if separator else ("file", url)
