"""The command line. Imports of the stages happen inside the commands, so that --help answers at once."""

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from calibprune import __version__
from calibprune.errors import UserError
from jobs import progress

if TYPE_CHECKING:
    from jobs.run_folder import Run

app = typer.Typer(
    name="calibprune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Prune a large language model with calibration text that it wrote itself.

    A run is one YAML file. Its five stages are generate, curate, prune, evaluate and report; every stage keeps its
    results in a folder of the run's output, and the same command resumes after any crash.

    Start with:  calibprune check configs/demo.yaml  and then  calibprune run configs/demo.yaml""",
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, local or by URL.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key.path=value]...",
        help="Settings that replace the file's, such as prune.sparsity=0.6 or prune.method.type=wanda; "
        "preset=NAME puts one of `calibprune presets` under them.",
    ),
]
ALL = ("generate", "curate", "prune", "evaluate", "report")


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """All five stages. Stages that are done already are passed over."""
    from jobs.report import say_result

    finished = _run(config, overrides, ALL)
    say_result(_read_report(finished))
    print(finished.url("report", "index.html"))


@app.command()
def generate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Let the model write samples with vLLM, with their exact token ids and log-probabilities."""
    _run(config, overrides, ["generate"])


@app.command()
def curate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Score the samples by perplexity, drop the worst and pack the rest into a calibration pool."""
    _run(config, overrides, ["curate"])


@app.command()
def prune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Prune layer by layer with the pool; writes a Hugging Face checkpoint."""
    _run(config, overrides, ["prune"])


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Held-out perplexity of the dense and the pruned model."""
    _run(config, overrides, ["evaluate"])


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Gather what the stages recorded into report/index.html and report/report.json."""
    finished = _run(config, overrides, ["report"])
    print(finished.url("report", "index.html"))


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Validate a configuration and its inputs, and say what the run will need. Starts no work."""
    from calibprune.config_file import load_config
    from jobs.check import advice, check_before_work, requirements
    from jobs.run_folder import Run

    checked = Run(load_config(config, overrides or ()))
    check_before_work(checked, ALL)
    needed = requirements(checked)
    for name, value in needed.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        if name.endswith("bytes"):
            shown = f"{value / 2**30:.3g} GiB"
        print(f"{name.removesuffix('_bytes').replace('_', ' '):<26} {shown}")
    print("the configuration is fine")
    for line in advice(needed, checked.config.cluster.workers):
        typer.echo(f"note: {line}", err=True)


@app.command()
def status(run_url: Annotated[str, typer.Argument(metavar="RUN_URL")]) -> None:
    """What a run has done, its pace, and the time left."""
    from calibprune.plain import plain
    from jobs.status import describe

    for line in describe(run_url):
        print(plain(line))


@app.command()
def presets() -> None:
    """Ready settings of generate and curate, taken with preset=NAME or `preset: NAME` in the file."""
    from calibprune.config_file import presets

    for name, line in presets().items():
        print(f"{name:<14} {line}")


@app.command()
def publish(
    run_url: Annotated[str, typer.Argument(metavar="RUN_URL")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(ALL)}.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A folder, a bucket's URL, hf://org/model or hf://datasets/org/name.",
        ),
    ],
) -> None:
    """Copy a finished stage, verified, to a folder, a bucket or the Hugging Face hub; of prune, the checkpoint."""
    from calibprune.publish import publish as publish_stage
    from calibprune.retry import shown

    done = publish_stage(run_url, stage, target, lambda line: progress.say(f"publish: {line}"))
    print(
        f"{shown(target)}: {done.copied} files of {done.bytes:,} bytes written, {done.skipped} were there"
    )


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
) -> None:
    if traceback:
        os.environ["CALIBPRUNE_TRACEBACK"] = "1"


def _run(config: str, overrides: list[str] | None, stages: "list[str] | tuple[str, ...]") -> "Run":
    from calibprune.config_file import load_config

    settings = load_config(config, overrides or ())
    from jobs.pipeline import run_stages

    try:
        return run_stages(settings, stages)
    except KeyboardInterrupt:
        _fail("stopped; what is committed is kept, the same command resumes", 130)


def _read_report(finished: "Run") -> dict:
    from calibprune import storage

    return storage.read_json(finished.url("report", "report.json"))


def _stop(number: int, frame: object) -> None:
    progress.stop_asked = True
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors in one line; exit code 2 for what the user can mend, 1 for what failed, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what a worker raised
        if isinstance(cause, UserError):
            _fail(f"error: {cause}", 2, error)
        text = " ".join(str(cause).split())
        _fail(f"failed: {type(cause).__name__}: {text} (--traceback shows where)", 1, error)


def _fail(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    from calibprune.plain import plain, plain_lines

    if error is not None and os.environ.get("CALIBPRUNE_TRACEBACK"):
        print(plain_lines("".join(traceback.format_exception(error))), file=sys.stderr)
    else:
        print(plain(message), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
