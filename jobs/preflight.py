"""Before work starts: what the cluster has, what the run needs of it stage by stage, and what is missing."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibprune import storage
from calibprune.calibration.prefixes import longest_prefix
from calibprune.config.model import ClusterSettings
from calibprune.errors import StoreUnavailable, UserError
from calibprune.events import note
from calibprune.text import size
from cluster.places import Need, never_fits, nodes, shown, wanted
from cluster.session import connect
from cluster.survey import Survey, Surveyed, check_survey, only_passing, problems, take_survey
from jobs.run import Run
from jobs.stages import module, modules

PIPELINE_SECONDS = 30.0
"""Time for the nodes to answer when a run starts: one that is slower is passed over with a note."""
MIN_SHARED_MEMORY, MIN_TEMP = 1 << 30, 5 << 30
TOKEN_BYTES = 4
LOG_WIDTH = 180
SHOWN = ("torch", "vllm", "transformers", "ray")


def needs(run: Run) -> list[Need]:
    """What the stages of the run's commands that still have work to do ask for, in order.

    Needs a connection to Ray: some settings follow the cluster.
    """
    return [need for stage in modules(run.commands) for need in stage.needs(run)]


def look_before_work(run: Run) -> None:
    """Refuses a cluster whose nodes differ in versions, or do not reach the run's folder or the model.

    Raises UserError naming nodes and versions. Notes say which nodes do not answer, and where there is too little
    memory for a stage.
    """
    survey = _surveyed(run, PIPELINE_SECONDS)
    for node, reason in survey.silent:
        note(f"note: no answer from {node.name}: {reason}")
    check_survey(survey)
    cluster = nodes()
    for need in needs(run):
        if never_fits(need.least, need.bundle, cluster) is None:  # else `check_room` refuses
            for line in judged(need, survey)[0]:
                note(f"note: {line}")


def check_room(run: Run) -> None:
    """Raises UserError where the places that a stage asks for would not be there were the whole cluster idle."""
    cluster = nodes()
    for need in needs(run):
        never = never_fits(need.least, need.bundle, cluster)
        if never is not None:
            raise UserError(f"{need.stage}: {never}")


def cluster_to_look_at(settings: ClusterSettings, wanted: bool | None) -> ClusterSettings | None:
    """The settings to join with; None where no cluster is to be looked at.

    `wanted` None: where one is named, by cluster.address or RAY_ADDRESS. True: else one that runs on this machine.
    """
    if wanted is False:
        return None
    if settings.address or os.environ.get("RAY_ADDRESS"):
        return settings
    return settings.model_copy(update={"address": "auto"}) if wanted else None


def check_cluster(run: Run, settings: ClusterSettings) -> tuple[str, list[str]]:
    """Joins the cluster, prints what it is and what the run needs of it; returns how many nodes answered, in words, and
    what may turn out badly.

    Raises UserError naming all that is missing, such as answers of nodes, or StoreUnavailable where that is all and
    may pass.
    """
    with _joined(settings):
        survey, needed = _surveyed(run), needs(run)
        _show(run, survey, needed)
    missing, notes = problems(survey), []
    for need in needed:
        lacking, remarks = judged(need, survey)
        missing += lacking
        notes += remarks
    missing += _disks(run, survey)
    if survey.silent:
        node, reason = survey.silent[0]
        count = len(survey.nodes) + len(survey.silent)
        missing.append(
            f"{len(survey.silent)} of {count} nodes did not answer, the first: {node.name}, {reason}"
        )
    notes += _small_disks(needed, survey)
    if missing:
        passing = missing == problems(survey) and only_passing(survey)
        raise (StoreUnavailable if passing else UserError)("; ".join(missing))
    return f"all {len(survey.nodes)} nodes answered", notes


@contextmanager
def _joined(settings: ClusterSettings) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(connect(settings))
        except UserError as error:
            raise UserError(f"{error} (check --local looks at no cluster)") from None
        yield


def judged(need: Need, survey: Survey) -> tuple[list[str], list[str]]:
    """(what is missing for a stage, what may turn out badly), one line each."""
    missing, notes = [], []
    cluster = [*(one.node for one in survey.nodes), *(node for node, _ in survey.silent)]
    never = never_fits(need.least, need.bundle, cluster)
    if never is not None:
        return [f"{need.stage}: {never}"], []
    room = sum(need.bundle.fits_in(node.total) for node in cluster)
    free = sum(need.bundle.fits_in(node.free) for node in cluster)
    if room < need.count:
        notes.append(
            f"{need.stage}: room for {room} of {need.count} {need.actor}s; the others start when nodes join"
        )
    if free < min(need.count, room):
        notes.append(
            f"{need.stage}: {wanted(need.count, need.bundle)} find {free} places free and {room - free} busy now; "
            f"it waits for up to cluster.start_timeout_seconds"
        )
    host_bytes = need.host_bytes
    smallest = _smallest_gpu(survey)
    if need.gpu_bytes and smallest is None:
        notes.append(f"{need.stage}: GPU memory is not known, nvidia-smi does not run on the nodes")
    elif need.gpu_bytes and smallest is not None and need.gpu_bytes > need.gpu_share * smallest:
        per_gpu = f"{size(need.gpu_bytes)} on every GPU, the smallest has {size(smallest)}"
        if need.gpu_bytes - need.movable_bytes > need.gpu_share * smallest:
            missing.append(f"{need.stage}: a{_n(need.actor)} needs {per_gpu}: {_more_room(need)}")
        else:
            host_bytes = (host_bytes or 0) + need.movable_bytes
            notes.append(f"{need.stage}: {per_gpu}: {size(need.movable_bytes)} move to host memory")
    if host_bytes is not None:
        placed = sum(
            min(need.bundle.fits_in(one.node.total), int(one.facts["memory_bytes"] // host_bytes))
            for one in survey.nodes
        )
        # those that gave no answer may have the memory
        placed += sum(need.bundle.fits_in(node.total) for node, _ in survey.silent)
        if placed < need.least:
            each = ", ".join(
                f"{size(one.facts['memory_bytes'])} on {one.name}" for one in survey.nodes[:4]
            )
            missing.append(
                f"{need.stage}: {need.least} {need.actor}s of {size(host_bytes)} of host memory do not fit the nodes' "
                f"memory ({each}): {_more_room(need)}"
            )
    return missing, notes


def _more_room(need: Need) -> str:
    if need.actor == "engine":
        return "raise generate.tensor_parallel or take larger GPUs"
    return "use more workers, or lower curate.sequences or prune.batch_sequences"


def _n(noun: str) -> str:
    return f"n {noun}" if noun[0] in "aeiou" else f" {noun}"


def _smallest_gpu(survey: Survey) -> int | None:
    """Of those that Ray gives out: where a machine has more, its largest."""
    sizes = []
    for one in survey.nodes:
        here = sorted((gpu["bytes"] for gpu in one.facts["gpus"] or ()), reverse=True)
        sizes += here[: int(one.node.total.get("GPU", 0))]
    return min(sizes, default=None)


def _disks(run: Run, survey: Survey) -> list[str]:
    """Nodes whose disk has no room for what the run will write, where its folder is on a disk."""
    stored = bytes_stored(run)
    told = []
    for one in survey.nodes:
        free = one.facts["output_free_bytes"]
        if free is not None and free < stored:
            told.append(
                f"output {run.config.output} takes up to {size(stored)}, {one.name} has {size(free)} of disk free"
            )
    return told[:1]


def _small_disks(needed: Sequence[Need], survey: Survey) -> Iterator[str]:
    several = any(need.actor == "engine" and need.bundle.gpus > 1 for need in needed)
    for one in survey.nodes:
        shared, temp = one.facts["shared_memory_free_bytes"], one.facts["temp_free_bytes"]
        if several and shared is not None and shared < MIN_SHARED_MEMORY:
            yield (
                f"{one.name} has {size(shared)} of /dev/shm, where the GPUs of one engine meet: "
                f"give its container more shared memory"
            )
        if temp is not None and temp < MIN_TEMP:
            yield f"{one.name} has {size(temp)} free for Ray's temporary files"


def bytes_read(run: Run, engines: int) -> int:
    """Most bytes of the model that the whole cluster reads: by every engine, by prune once more where the allocation
    is measured, by the comparison, and by evaluate of the dense and the pruned model."""
    config = run.config
    measured = config.prune.allocation.type in ("owl", "alphapruning")
    compared = bool(config.curate.references) and config.curate.analysis.min_k is not None
    evaluated = 2 if config.evaluate.perplexity else 0
    return run.skeleton.checkpoint.bytes * (engines + 1 + measured + compared + evaluated)


def bytes_stored(run: Run) -> int:
    """Most bytes in the run's folder: samples, pool, snapshots and the pruned checkpoint, if they are not there yet."""
    sequences, tokens = run.pool_shape
    generate = run.config.generate
    samples = 0
    if module("generate").skip(run) is None and not run.stage("generate").finished:
        samples = generate.samples * (generate.max_tokens + longest_prefix(generate.prefixes))
    hidden = run.skeleton.model.config.get_text_config().hidden_size
    snapshots = 2 if run.config.prune.snapshot_layers else 0
    return (
        run.skeleton.checkpoint.bytes * (not run.stage("prune").finished)
        + TOKEN_BYTES
        * (2 * samples + sequences * tokens)  # what is dropped is kept with its reason
        + snapshots * sequences * tokens * hidden * run.skeleton.dtype.itemsize
    )


def _surveyed(run: Run, seconds: float | None = None) -> Survey:
    checkpoint = run.skeleton.checkpoint
    first = min(location.file for location in checkpoint.locations.values())
    model = [storage.join(checkpoint.url, name) for name in ("config.json", first)]
    if seconds is None:
        return take_survey(run.config.output, model)
    return take_survey(run.config.output, model, seconds)


def _show(run: Run, survey: Survey, needed: Sequence[Need]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(_nodes_table(survey))
    console.print(_needs_table(needed))
    engines = sum(need.count for need in needed if need.actor == "engine")
    print(
        f"storage: up to {size(bytes_read(run, engines))} of the model read in all, up to {size(bytes_stored(run))} "
        f"written to {run.config.output}"
    )


def _nodes_table(survey: Survey) -> Table:
    columns = ("node", "CPU", "GPU", "free memory", "free disk", "Python", *SHOWN, "calibprune")
    table = Table(*columns, title="the cluster", title_justify="left")
    for one in survey.nodes:
        versions = one.facts["versions"]
        table.add_row(
            Text(one.name), _free_of(one, "CPU"), _gpus(one),
            f"{size(one.facts['free_memory_bytes'])} of {size(one.facts['memory_bytes'])}",
            size(one.facts["temp_free_bytes"]), one.facts["python"],
            *(versions[name] or "none" for name in SHOWN), one.facts["source"] or "none",
        )  # fmt: skip
    for node, reason in survey.silent:
        table.add_row(Text(node.name), shown(node.total), Text(f"no answer: {reason}"))
    return table


def _free_of(one: Surveyed, name: str) -> str:
    total, free = one.node.total.get(name, 0), one.node.free.get(name, 0)
    return f"{total:g}" if free == total else f"{free:g} of {total:g}"


def _gpus(one: Surveyed) -> str:
    if not one.node.total.get("GPU"):
        return "none"
    kinds = sorted({f"{gpu['name']} {size(gpu['bytes'])}" for gpu in one.facts["gpus"] or ()})
    return f"{_free_of(one, 'GPU')} x {', '.join(kinds) or 'of unknown memory'}"


def _needs_table(needed: Sequence[Need]) -> Table:
    columns = ("stage", "at the same time", "host memory of each", "of each GPU", "work")
    table = Table(*columns, title="what the run needs", title_justify="left")
    for need in needed:
        many = "tasks" if need.actor == "task" else f"{need.count} x {need.actor}"
        table.add_row(
            need.stage,
            f"{many} ({shown(need.bundle.as_resources())})",
            "" if need.host_bytes is None else size(need.host_bytes),
            size(need.gpu_bytes) if need.gpu_bytes else "",
            need.work,
        )
    if not needed:
        table.add_row("all stages are done")
    return table
