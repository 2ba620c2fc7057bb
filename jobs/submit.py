"""submit: starts a run as a job of a Ray cluster, from any machine that reaches the cluster's dashboard.

The job is `python -m jobs run CONFIG` and nothing more, so that every other way of starting it gives the same run.
"""

import json
import os
import posixpath
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from calibprune import __version__, storage
from calibprune.config import Config
from calibprune.config.load import dump_config, load_config
from calibprune.errors import UserError
from calibprune.events import note
from calibprune.redact import HIDDEN, holds_credential, one_line
from calibprune.retry import redacted_url
from calibprune.stage import flat
from cluster.jobs_api import Client, exit_code, follow, patiently, reach
from jobs.output import is_json
from jobs.packing import CONFIG, Tree, source_tree, write_package
from jobs.submitted import address_option, age, attempts, job_name, outcome, split_scheme

ENTRYPOINT = f"python -m jobs run {CONFIG}"
DETACHED = 130
"""Exit code after Ctrl-C, which leaves the job running."""
NAMED_FILES, NAMED_SETTINGS = 20, 3
"""Maximum number of files that are named as not sent, and of settings that are named as different."""


def submit(path: str, overrides: Sequence[str], address: str | None, wait: bool) -> int:
    """Starts the run as a job, or finds the job that works on it, and follows its log; returns the driver's exit code.

    Raises UserError, before anything is sent, for a bad configuration, for paths that do not exist on the cluster, for
    a tree that is too large, and where the job that works on the run has other settings.
    """
    config = load_config(path, overrides)
    tree = source_tree(Path.cwd())
    check_paths(config, tree)
    client = patiently(lambda: reach(address))
    job_id = _start(
        client, config, tree, metadata(config, path, overrides), address_option(address)
    )
    stop_it = f"calibprune stop {job_id}{address_option(address)}"
    if not wait:
        print(job_id)
        note(f"submit: the same command without --no-wait follows it, `{stop_it}` stops it")
        return 0
    try:
        job = follow(client, job_id, partial(print, end="", flush=True))
    except KeyboardInterrupt:
        note(
            f"submit: no longer following; job {job_id} goes on: the same command follows it again, `{stop_it}` "
            f"stops it"
        )
        return DETACHED
    code = exit_code(job)
    if job.status == JobStatus.FAILED and job.driver_exit_code is None:
        note(f"submit: {one_line(job.message or 'Ray gives no reason', 500)}")
    resume = "; the same command resumes the run" if code else ""
    note(f"submit: job {job_id} {outcome(job)}{resume}")
    return code


def check_paths(config: Config, tree: Tree | None) -> None:
    """Raises UserError for local paths that would be missing on the cluster, or would be other files there."""
    storage.resolve(config.output)
    scheme, path = split_scheme(config.output)
    if scheme == "hf":
        storage.check_writable(config.output)
    if scheme == "memory" or (scheme == "file" and not path.startswith("/")):
        raise UserError(
            f"output {config.output} would be lost with the job, which runs in a folder of its own: give a bucket's "
            f"URL, or, where all nodes share a file system, an absolute path on it, such as output={_absolute(path)}"
        )
    for key, url in _inputs(config.model_dump(mode="json")):
        scheme, path = split_scheme(url)
        if scheme != "file" or path.startswith("/") or not Path(path).expanduser().exists():
            continue
        if tree is None or path.startswith("~") or not tree.holds(path):
            raise UserError(
                f"{key} {url} is on this machine and does not travel with the job: give a URL, or, where all nodes "
                f"share this file system, {key}={_absolute(path)}"
            )


def metadata(config: Config, path: str, overrides: Sequence[str]) -> dict[str, str]:
    """Returns what later commands need to know of a job. Everybody on the cluster can read it."""
    return {
        "calibprune": __version__,
        "config": posixpath.basename(redacted_url(path)),
        "output": config.output,
        "settings": json.dumps(_settings(config), separators=(",", ":")),
        "command": shlex.join(
            ["calibprune", "submit", redacted_url(path), *map(_without_credentials, overrides)]
        ),
    }


def _start(
    client: Client, config: Config, tree: Tree | None, about: dict[str, str], option: str
) -> str:
    """Submits a job unless one works on the run already; returns the id of the job that now does."""
    name = job_name(config.output)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.zip"

        def adopt_or_send() -> str:
            """Lists the jobs in every try: another submit may have been quicker, or the last answer was lost."""
            earlier = attempts(client, config.output)
            if earlier and not earlier[-1].status.is_terminal():
                return _adopt(earlier[-1], config, option)
            if not package.exists():
                _note_what_travels(tree, config)
                write_package(package, tree, dump_config(_without_address(config)))
            last = str(earlier[-1].submission_id).removeprefix(name) if earlier else None
            job_id = name if last is None else f"{name}-{int(last.removeprefix('-') or 1) + 1}"
            client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=job_id,
                runtime_env={"working_dir": str(package), "env_vars": _log_variables()},
                metadata=dict(about),
            )
            note(f"submit: job {job_id} on {client.get_address()}")
            return job_id

        try:
            return patiently(adopt_or_send)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"Ray refuses the job: {one_line(error, 500)}") from None


def _adopt(job: JobDetails, config: Config, option: str) -> str:
    """Returns the id of a job that works on the same run. Raises UserError where it has other settings."""
    different = _differences(job, config)
    if different is None:
        note(f"submit: job {job.submission_id} does not record its settings, which may differ")
    elif different:
        raise UserError(
            f"job {job.submission_id} works on {config.output} with other settings: "
            f"{_listed(different, NAMED_SETTINGS)}; stop it first "
            f"(`calibprune stop {job.submission_id}{option}`), or choose another output"
        )
    note(
        f"submit: job {job.submission_id} has been working on this run for {age(job)}; following it"
    )
    return str(job.submission_id)


def _differences(job: JobDetails, config: Config) -> list[str] | None:
    """Describes the settings in which a job and a configuration differ; None where the job does not record them."""
    try:
        theirs = dict(json.loads((job.metadata or {})["settings"]))
    except (KeyError, ValueError, TypeError):
        return None
    ours, default = _settings(config), _default_settings()

    def value(settings: dict[str, Any], key: str) -> str:
        return one_line(json.dumps(settings.get(key, default.get(key))), 100)

    return [
        f"{key} is {value(theirs, key)} there, {value(ours, key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if key != "output" and theirs.get(key, HIDDEN) != ours.get(key, HIDDEN)
    ]


def _settings(config: Config) -> dict[str, Any]:
    """Returns the settings that differ from the defaults, by dotted key; without the address, which no job uses."""
    default = _default_settings()
    found = flat(_without_address(config).model_dump(mode="json"))
    return {
        key: value for key, value in found.items() if key not in default or default[key] != value
    }


def _default_settings() -> dict[str, Any]:
    config = Config.model_validate({"model": {"path": ""}, "output": ""})
    return flat(config.model_dump(mode="json"))


def _without_address(config: Config) -> Config:
    alone = config.cluster.model_copy(update={"address": None})
    return config.model_copy(update={"cluster": alone})


def _log_variables() -> dict[str, str]:
    """Returns environment variables that make the driver log as this command does."""
    names = ("CALIBPRUNE_LOG_FORMAT", "CALIBPRUNE_TRACEBACK")
    asked = {name: os.environ[name] for name in names if os.environ.get(name)}
    return asked | ({"CALIBPRUNE_LOG_FORMAT": "json"} if is_json() else {})


def _note_what_travels(tree: Tree | None, config: Config) -> None:
    if config.cluster.address is not None:
        note(
            "submit: cluster.address is left out: the job works on the cluster that it is submitted to"
        )
    if tree is None:
        note(
            "submit: sending the configuration alone; calibprune itself must be in the cluster's image"
        )
        return
    size = sum((tree.root / name).stat().st_size for name in tree.files)
    note(
        f"submit: sending {len(tree.files)} files, {size / 1e6:.1f} MB, of {tree.root}, and the configuration"
    )
    if tree.withheld:
        note(
            f"submit: {len(tree.withheld)} files are not sent because their names are typical of credentials: "
            f"{_listed(tree.withheld, NAMED_FILES)}"
        )


def _listed(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _without_credentials(override: str) -> str:
    """Returns the override with its value hidden where it holds a credential, which a later override may replace."""
    return f"{override.partition('=')[0]}={HIDDEN}" if holds_credential(override) else override


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _inputs(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, URL) of everything that a run reads: every `path`, and the `pool`."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in entries:
        here = f"{key}.{name}".lstrip(".")
        if isinstance(value, dict | list):
            yield from _inputs(value, here)
        elif isinstance(value, str) and name in ("path", "pool"):
            yield here, value
