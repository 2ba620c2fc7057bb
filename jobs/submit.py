"""submit, jobs, stop: a run as a job of a Ray cluster, from any machine that reaches the cluster's dashboard.

The job is `python -m jobs run CONFIG` and nothing more, so that every other way to start one gives the same run.
"""

import hashlib
import os
import posixpath
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ray.job_submission import JobDetails, JobStatus

from calibprune import __version__, storage
from calibprune.config import Config
from calibprune.config.load import dump_config, load_config
from calibprune.errors import UserError
from calibprune.redact import HIDDEN, holds_credential, one_line
from calibprune.retry import shown
from cluster.jobs_api import Client, already_used, describe, exit_code, follow, patiently, reach
from jobs import log
from jobs.packing import CONFIG, Tree, source_tree, write_package
from jobs.progress import Steps, console, duration, say, tick

ENTRYPOINT = f"python -m jobs run {CONFIG}"
STOP_SECONDS = 60.0
ALIASES = {"s3a": "s3", "gcs": "gs", "local": "file"}
DETACHED = 130
T = TypeVar("T")


def submit(path: str, overrides: Sequence[str], address: str | None, wait: bool) -> int:
    """Starts the run as a job, or finds the one that is at it; follows its log. Returns the driver's exit code.

    Raises UserError before anything is sent for a bad configuration, for paths that mean nothing on a cluster, and
    for a tree that is too large.
    """
    config = load_config(path, overrides)
    tree = source_tree(Path.cwd())
    check_paths(config, tree)
    client = _reach(address)
    job_id = _start(client, config, tree, _metadata(config, path, overrides))
    again = f"calibprune stop {job_id}{_at(address)}"
    if not wait:
        print(job_id)
        say(f"submit: the same command without --no-wait follows it, `{again}` stops it")
        return 0
    try:
        with _Screen() as screen:
            job = follow(client, job_id, screen.show, lambda line: say(f"submit: {line}"))
    except KeyboardInterrupt:
        say(
            f"submit: no longer following; job {job_id} goes on: the same command follows it again, `{again}` stops it"
        )
        return DETACHED
    code = exit_code(job)
    if job.status == JobStatus.FAILED and job.driver_exit_code is None:
        say(f"submit: {one_line(job.message or 'Ray gives no reason', 500)}")
    say(
        f"submit: job {job_id} {_outcome(job)}{'; the same command resumes the run' if code else ''}"
    )
    return code


def list_jobs(address: str | None) -> Iterator[str]:
    """A line for each of calibprune's jobs that the cluster remembers, the latest last."""
    client = _reach(address)
    found = _patiently(lambda: _ours(client))
    width = max((len(job.submission_id or "") for job in found), default=0)
    if not found:
        yield "no jobs of calibprune"
    for job in found:
        code = str(exit_code(job)) if job.status.is_terminal() else "-"
        since = duration(time.time() - (job.start_time or 0) / 1000)
        output = (job.metadata or {}).get("output", job.entrypoint)
        yield f"{job.submission_id:<{width}}  {job.status.value:<9}  exit {code:<3}  {since:>6} ago  {output}"


def stop(target: str, address: str | None) -> str:
    """Stops the job of that id, or the one that works on that run, and waits until it has ended; says how to resume.

    Raises UserError when there is none.
    """
    client = _reach(address)
    found = _patiently(lambda: _working_on(client, target))
    if not found:
        raise UserError(
            f"the cluster knows no job of calibprune named {target}, nor one that works on a run there: "
            f"`calibprune jobs{_at(address)}` lists their ids"
        )
    job = found[-1]
    job_id = str(job.submission_id)
    if job.status.is_terminal():
        return f"job {job_id} has ended before: it {_outcome(job)}"
    _patiently(lambda: client.stop_job(job_id))
    deadline = time.monotonic() + STOP_SECONDS
    while not (job := _patiently(lambda: describe(client, job_id))).status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"job {job_id} did not stop within {STOP_SECONDS:.0f} s: try again")
        time.sleep(0.2)
    metadata = job.metadata or {}
    resume = (
        f"{metadata['command']}{_at(address)}"
        if "command" in metadata
        else "the command that started it"
    )
    return f"job {job_id} {_outcome(job)}; what is committed is kept, resume with: {resume}"


def check_paths(config: Config, tree: Tree | None) -> None:
    """Raises UserError for local paths that mean something here and something else, or nothing, on a cluster."""
    storage.resolve(config.output)
    scheme, path = _parted(config.output)
    if scheme == "hf":
        storage.check_writable(config.output)
    if scheme == "memory" or (scheme == "file" and not path.startswith("/")):
        raise UserError(
            f"output {config.output} would be lost with the job, which runs in a folder of its own: give a bucket's "
            f"URL, or, where all nodes share a file system, an absolute path on it, such as output={_absolute(path)}"
        )
    for key, url in _inputs(config.model_dump(mode="json")):
        scheme, path = _parted(url)
        if scheme != "file" or path.startswith("/") or not Path(path).expanduser().exists():
            continue
        if tree is None or path.startswith("~") or not tree.holds(path):
            raise UserError(
                f"{key} {url} is on this machine and does not travel with the job: give a URL, or, where all nodes "
                f"share this file system, {key}={_absolute(path)}"
            )


def job_name(output: str) -> str:
    """The submission id of the first job that works on a run: the same for every way to write the run's URL."""
    scheme, path = _parted(output)
    path = posixpath.normpath(
        re.sub(r"^/+", "/", path)
    )  # POSIX lets two slashes mean something else
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
    """The jobs of that id, or those that work on that run, the latest last; also those that `ray job submit` started,
    whose command names the run's URL."""
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


def _start(client: Client, config: Config, tree: Tree | None, metadata: dict[str, str]) -> str:
    """Submits the next attempt, unless one is under way; returns the id of the one that now is."""
    said = False
    while True:
        earlier = _patiently(lambda: attempts(client, config.output))
        if earlier and not earlier[-1].status.is_terminal():
            return _attach(earlier[-1], metadata)
        job_id = job_name(config.output)
        if earlier:
            last = str(earlier[-1].submission_id).removeprefix(job_id).removeprefix("-")
            job_id += f"-{int(last or 1) + 1}"
        if not said:
            _tell(tree, config)
            said = True
        try:
            with tempfile.TemporaryDirectory() as folder:
                package = Path(folder) / "package.zip"
                alone = config.cluster.model_copy(update={"address": None})
                write_package(
                    package, tree, dump_config(config.model_copy(update={"cluster": alone}))
                )
                sending = partial(
                    client.submit_job,
                    entrypoint=ENTRYPOINT,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(package), "env_vars": _ways_to_tell()},
                    metadata=metadata,
                )
                _patiently(sending)
        except RuntimeError as error:
            if already_used(error):  # another submit was quicker
                continue
            raise UserError(f"the cluster refuses the job: {one_line(error, 500)}") from None
        say(f"submit: job {job_id} on {client.get_address()}")
        return job_id


def _reach(address: str | None) -> Client:
    return _patiently(lambda: reach(address))


def _patiently(work: Callable[[], T]) -> T:
    return patiently(work, lambda line: say(f"note: {line}"))


def _ways_to_tell() -> dict[str, str]:
    """How this command was asked to log, for the driver to do the same."""
    names = ("CALIBPRUNE_LOG_FORMAT", "CALIBPRUNE_TRACEBACK")
    asked = {name: os.environ[name] for name in names if os.environ.get(name)}
    return asked | ({"CALIBPRUNE_LOG_FORMAT": "json"} if log.is_json() else {})


def _attach(job: JobDetails, metadata: dict[str, str]) -> str:
    since = duration(time.time() - (job.start_time or 0) / 1000)
    say(f"submit: job {job.submission_id} is at it since {since}; following it")
    if (job.metadata or {}).get("settings") != metadata["settings"]:
        say("submit: it was submitted with other settings than these, which have no effect now")
    return str(job.submission_id)


def _tell(tree: Tree | None, config: Config) -> None:
    if config.cluster.address is not None:
        say(
            "submit: cluster.address is left out: the job works on the cluster that it is submitted to"
        )
    if tree is None:
        say(
            "submit: sending the configuration alone; calibprune itself must be in the cluster's image"
        )
        return
    size = sum((tree.root / name).stat().st_size for name in tree.files)
    say(
        f"submit: sending {len(tree.files)} files, {size / 1e6:.1f} MB, of {tree.root}, and the configuration"
    )
    if tree.withheld:
        named = ", ".join(tree.withheld[:5]) + (", ..." if len(tree.withheld) > 5 else "")
        say(
            f"submit: {len(tree.withheld)} files stay here since they look like credentials: {named}"
        )


def _metadata(config: Config, path: str, overrides: Sequence[str]) -> dict[str, str]:
    """Everybody on the cluster can read it."""
    return {
        "calibprune": __version__,
        "config": posixpath.basename(shown(path)),
        "output": config.output,
        "settings": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16],
        "command": shlex.join(
            ["calibprune", "submit", shown(path), *map(_without_credentials, overrides)]
        ),
    }


def _without_credentials(override: str) -> str:
    """The key alone of one that holds a credential, which a later override may have replaced."""
    return f"{override.partition('=')[0]}={HIDDEN}" if holds_credential(override) else override


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


def _outcome(job: JobDetails) -> str:
    if job.status == JobStatus.FAILED:
        return f"failed with exit code {exit_code(job)}"
    return {JobStatus.SUCCEEDED: "is done", JobStatus.STOPPED: "is stopped"}[job.status]


def _at(address: str | None) -> str:
    return "" if address is None else f" --address {address}"


def _parted(url: str) -> tuple[str, str]:
    scheme, separator, path = url.partition("://")
    return (scheme, path) if separator else ("file", url)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _inputs(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """What a run reads: every `path` and the `pool` of the settings, by dotted key."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in entries:
        here = f"{key}.{name}".lstrip(".")
        if isinstance(value, dict | list):
            yield from _inputs(value, here)
        elif isinstance(value, str) and name in ("path", "pool"):
            yield here, value


class _Screen:
    """A job's log on this terminal: as it is, but that the counts of its steps move a bar where there can be one."""

    def __init__(self) -> None:
        self._bars = console.is_terminal and sys.stdout.isatty()
        self._rest, self._of = "", ("", "")
        self._steps: Steps | None = None

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()
        print(self._rest, end="", flush=True)

    def show(self, text: str) -> None:
        tick()
        if not self._bars:
            print(text, end="", flush=True)
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)

    def _show(self, line: str) -> None:
        count = re.match(r"(\w+): (\d+) of (\d+) ([a-z ]+?)(?: done already)?(?:,|$)", line)
        if count is None:
            print(line, flush=True)
            return
        stage, done, total, unit = count[1], int(count[2]), int(count[3]), count[4]
        if self._steps is None or self._of != (stage, unit):
            self._end_bar()
            self._of, self._steps = (stage, unit), Steps(stage, unit, total, done).__enter__()
        self._steps.to(done)
        if done == total:
            self._end_bar()

    def _end_bar(self) -> None:
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
            self._steps = None
