"""The command line. The commands import the stages only when they run, so that --help answers at once."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from calibprune import __version__
from calibprune.errors import UserError
from calibprune.process import keep_compiled_code_private
from calibprune.redact import plain, plain_lines
from jobs.output import is_json, set_up, stop_asked
from jobs.stages import COMMANDS, STAGES

if TYPE_CHECKING:
    from jobs.run import Run


class Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
        """Runs a command. An EOFError is renamed, since Typer would print "Aborted." for it and nothing else."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise OSError(f"a file ends too early: {error}") from error


app = typer.Typer(
    name="calibprune",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Prune a large language model with calibration text that it wrote itself.

    A run is described by one YAML file. Its five stages are generate, curate, prune, evaluate and report; each stage
    keeps its results in a folder of the run's output, and the same command resumes after any crash.

    Start with:
    calibprune demo-model .cache/demo-model
    calibprune check configs/demo.yaml
    calibprune run configs/demo.yaml""",
)


class Layout(StrEnum):
    openlm = "openlm"
    transformers = "transformers"


class LogFormat(StrEnum):
    text = "text"
    json = "json"


ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, local or by URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key.path=value]...",
        help="Settings that replace the file's, such as prune.sparsity=0.6 or prune.method=wanda; "
        "preset=NAME takes one of `calibprune presets` as their base.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Ray's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS. For a "
        "cluster with tokens set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.",
    ),
]


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run all stages; those that are already done are skipped."""
    finished = _run(config, overrides, COMMANDS)
    from jobs.report import show_result

    show_result(finished)
    print(finished.url("report", "index.html"))


def _add_stage_command(name: str) -> None:
    @app.command(name, help=STAGES[name])
    def stage(config: ConfigPath, overrides: Overrides = None) -> None:
        finished = _run(config, overrides, [name])
        if name == "report":
            print(finished.url("report", "index.html"))


for _name in COMMANDS:
    _add_stage_command(_name)


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    cluster: Annotated[
        bool | None,
        typer.Option(
            "--cluster/--local",
            help="Check the Ray cluster too, even one that merely runs on this machine; or check no cluster. "
            "Default: check the cluster that cluster.address or RAY_ADDRESS names, if any.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Validate a configuration and its inputs; print what the run will need, and what the cluster lacks for it.

    Starts no work. The exit code is 2 where something is missing."""
    from calibprune.config.load import load_config

    settings = load_config(config, overrides or ())  # before the imports, which take seconds
    from jobs.check import (
        advice,
        check_before_work,
        memory_in_lines,
        requirements,
        unmeasured,
    )
    from jobs.preflight import check_cluster, cluster_to_check
    from jobs.run import Run

    checked = Run(settings, COMMANDS)
    check_before_work(checked)
    for name, value in requirements(checked).items():
        print(f"{name:<26} {value}")
    for line in memory_in_lines(checked):
        print(line)
    cluster_settings = cluster_to_check(checked.config.cluster, cluster)
    if cluster_settings is not None:
        answered, notes = check_cluster(checked, cluster_settings)
        print(f"the configuration is fine, and the cluster has what it needs: {answered}")
    else:
        notes = advice(checked)
        print("the configuration is fine")
        print("no cluster was checked: give --cluster, or set cluster.address or RAY_ADDRESS")
    for line in [*notes, *unmeasured(checked)]:
        typer.echo(f"note: {plain(line)}", err=True)


@app.command()
def status(
    run_url: Annotated[str, typer.Argument(metavar="RUN_URL")],
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Repeat until all stages are done.")
    ] = False,
    every: Annotated[
        float,
        typer.Option("--every", metavar="SECONDS", min=0.2, help="Pause between two reports."),
    ] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every report as one JSON object.")
    ] = False,
) -> None:
    """Show what a run has done, its pace, the time left, its driver and what failed. Reads only the run's folder."""
    from jobs.status import show

    try:
        show(run_url, every if watch else None, as_json)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="Print the job's id and exit instead of following its log."),
    ] = False,
) -> None:
    """Run all stages as a job of a Ray cluster, with the source of the checkout in the current folder.

    The exit code is the driver's. Ctrl-C leaves the job running: the same command follows it again, or resumes the run.
    """
    from jobs.submit import submit as submit_job

    raise typer.Exit(submit_job(config, overrides or (), address, not no_wait))


@app.command("jobs")
def list_jobs(address: Address = None) -> None:
    """List calibprune's jobs on a Ray cluster: id, state, exit code, age, output."""
    from jobs.submitted import list_jobs as lines_of_jobs

    for line in lines_of_jobs(address):
        print(plain(line))


@app.command("stop")
def stop_job(
    job: Annotated[str, typer.Argument(metavar="ID_OR_RUN_URL")], address: Address = None
) -> None:
    """Stop a job of calibprune, by its id or by the URL of its run, and print how to resume it."""
    from jobs.submitted import stop

    print(plain(stop(job, address)))


@app.command()
def presets() -> None:
    """List ready-made settings of generate and curate, to be used with preset=NAME or `preset: NAME` in the file."""
    from calibprune.config.load import presets

    for name, line in presets().items():
        print(f"{name:<14} {line}")


@app.command()
def publish(
    run_url: Annotated[str, typer.Argument(metavar="RUN_URL")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(COMMANDS)}.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A folder, a bucket's URL, hf://org/model or hf://datasets/org/name.",
        ),
    ],
) -> None:
    """Copy a finished stage, verified, to a folder, a bucket or the Hugging Face hub; for prune, its checkpoint."""
    from calibprune import storage
    from calibprune.publish import publish as publish_stage
    from calibprune.retry import redacted_url
    from jobs.stages import module

    if stage not in COMMANDS:
        raise UserError(f"there is no stage {stage}: it is one of {', '.join(COMMANDS)}")
    done = publish_stage(storage.join(run_url, stage), target, **module(stage).PUBLISHED)
    print(
        f"{redacted_url(target)}: {done.copied} files of {done.bytes:,} bytes written, {done.skipped} were there"
    )


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A DCLM checkpoint, such as RUN_URL/prune/checkpoint."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A folder or a bucket's URL.")],
    layout: Annotated[
        Layout,
        typer.Option(
            "--layout",
            help="openlm: as DCLM was published, with fused matrices; transformers: as prune writes it.",
        ),
    ],
) -> None:
    """Copy a DCLM checkpoint to the other layout, without changing a bit of its tensors."""
    from calibprune.models.layouts import export as export_checkpoint
    from calibprune.retry import redacted_url

    written = export_checkpoint(source, target, layout.value)
    print(f"{redacted_url(target)}: {written:,} bytes of tensors written")


@app.command("demo-model")
def demo_model(folder: Annotated[str, typer.Argument(metavar="DIR")]) -> None:
    """Make the small model of the demo: SmolLM2-135M-Instruct as a safetensors checkpoint in DIR."""
    from jobs.demo_model import make_demo_model

    print(make_demo_model(folder))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"calibprune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show Python's traceback of an error.")
    ] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            "--log-format",
            envvar="CALIBPRUNE_LOG_FORMAT",
            help="json: one JSON object per line, with one for every unit and every failure.",
        ),
    ] = LogFormat.text,
) -> None:
    if traceback:
        os.environ["CALIBPRUNE_TRACEBACK"] = "1"
    set_up(log_format.value)


def _run(config: str, overrides: list[str] | None, commands: Sequence[str]) -> "Run":
    from calibprune.config.load import load_config

    settings = load_config(config, overrides or ())
    try:
        from jobs.pipeline import run_stages  # takes seconds, in which a signal may come

        return run_stages(settings, commands)
    except KeyboardInterrupt:
        _leave("stopped; what is committed is kept, the same command resumes", 130)


def _stop(number: int, frame: object) -> None:
    stop_asked.set()
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line. An error is one line; exit codes: 2 if the user can fix it, 1 if not, 130 for Ctrl-C."""
    keep_compiled_code_private()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what a worker raised
        if isinstance(cause, UserError):
            _fail(f"error: {cause}", 2, error)
        _fail(
            f"failed: {type(cause).__name__}: {' '.join(str(cause).split())} (--traceback shows where)",
            1,
            error,
        )


def _leave(message: str, code: int) -> NoReturn:
    """Exits at once: Ray kills a job 3 s after stopping it, and the interpreter may take 2 s to shut libraries down."""
    if is_json():
        logging.getLogger("calibprune").info("%s", message)
    else:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _fail(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    if error is not None and os.environ.get("CALIBPRUNE_TRACEBACK"):
        print(plain_lines("".join(traceback.format_exception(error))), file=sys.stderr)
    elif is_json():
        logging.getLogger("calibprune").error("%s", message)
    else:
        print(plain(message), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
