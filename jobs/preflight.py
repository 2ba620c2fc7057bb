"""Compares the cluster with what the run needs of it, stage by stage, before work starts."""

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
from cluster.gpus import broken_gpus, check_gpus, kind, taken, uncompiled
from cluster.places import Need, in_words, never_fits, nodes, request_in_words
from cluster.session import connect
from cluster.survey import Survey, Surveyed, check_survey, only_transient, problems, take_survey
from jobs.run import Run
from jobs.stages import module, modules

PIPELINE_SECONDS = 30.0
"""Time in which the nodes must answer when a run starts, in seconds; slower ones are noted and ignored."""
MIN_SHARED_MEMORY_BYTES, MIN_TEMP_BYTES = 1 << 30, 5 << 30
"""Free bytes of /dev/shm and of Ray's temporary folder below which a node gets a note."""
TOKEN_BYTES = 4
LOG_WIDTH = 180
"""Width of the tables where stdout is not a terminal, in characters."""
PACKAGES_SHOWN = ("torch", "vllm", "transformers", "ray")


def needs(run: Run) -> list[Need]:
    """Lists what the run's unfinished stages ask of the cluster, in order.

    Needs a connection to Ray, since the defaults of some settings depend on the cluster.
    """
    return [need for stage in modules(run.commands) for need in stage.needs(run)]


def check_cluster_before_work(run: Run, started_here: bool = False) -> None:
    """Raises UserError where the versions on the nodes differ, nodes do not reach the run's folder or the model, or
    their GPUs cannot be used.

    Logs which nodes do not answer, and what may be missing for a stage, such as memory. A Ray that was started for this
    run is this machine: only its GPUs are checked.
    """
    on_gpus = any(need.bundle.gpus for need in needs(run))
    if started_here and not on_gpus:
        return
    survey = _surveyed(run, PIPELINE_SECONDS)
    for node, reason in survey.silent:
        note(f"note: no answer from {node.name}: {reason}")
    check_survey(survey)
    if on_gpus:
        check_gpus(survey)
    cluster = nodes()
    for need in needs(run):
        if never_fits(need.least, need.bundle, cluster) is None:  # otherwise `check_room` raises
            for line in assess(need, survey)[0]:
                note(f"note: {line}")


def check_room(run: Run) -> None:
    """Raises UserError where a stage asks for more than even the idle cluster has room for."""
    cluster = nodes()
    for need in needs(run):
        never = never_fits(need.least, need.bundle, cluster)
        if never is not None:
            raise UserError(f"{need.stage}: {never}")


def cluster_to_check(settings: ClusterSettings, wanted: bool | None) -> ClusterSettings | None:
    """Returns the settings to join the cluster with that is to be checked; None where there is none.

    With `wanted` None that is the cluster that cluster.address or RAY_ADDRESS names, if any; with True also one that
    runs on this machine; with False none.
    """
    if wanted is False:
        return None
    if settings.address or os.environ.get("RAY_ADDRESS"):
        return settings
    return settings.model_copy(update={"address": "auto"}) if wanted else None


def check_cluster(run: Run, settings: ClusterSettings) -> tuple[str, list[str]]:
    """Joins the cluster, and prints what it has and what the run needs of it; returns how many nodes answered, in
    words, and notes on what may go wrong.

    Raises UserError naming everything that is missing, such as answers of nodes, or StoreUnavailable where that is
    only a store's transient trouble.
    """
    with _joined(settings):
        survey, needed = _surveyed(run), needs(run)
        _show(run, survey, needed)
    missing, notes = problems(survey), []
    if any(need.bundle.gpus for need in needed):
        missing += [*broken_gpus(survey), *uncompiled(survey)]
    for need in needed:
        lacking, remarks = assess(need, survey)
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
        passing = missing == problems(survey) and only_transient(survey)
        raise (StoreUnavailable if passing else UserError)("; ".join(missing))
    return f"all {len(survey.nodes)} nodes answered", notes


@contextmanager
def _joined(settings: ClusterSettings) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(connect(settings))
        except UserError as error:
            raise UserError(f"{error} (check --local connects to no cluster)") from None
        yield


def assess(need: Need, survey: Survey) -> tuple[list[str], list[str]]:
    """Returns (what is missing for a stage, what may go wrong), one line each."""
    missing, notes = [], []
    cluster = [*(one.node for one in survey.nodes), *(node for node, _ in survey.silent)]
    never = never_fits(need.least, need.bundle, cluster)
    if never is not None:
        return [f"{need.stage}: {never}"], []
    room = need.bundle.fits_into(node.total for node in cluster)
    free = need.bundle.fits_into(node.free for node in cluster)
    if room < need.count:
        notes.append(
            f"{need.stage}: room for {room} of {need.count} {need.actor}s; the others start when nodes join"
        )
    if free < min(need.count, room):
        notes.append(
            f"{need.stage}: {request_in_words(need.count, need.bundle)} find {free} places free and {room - free} busy "
            f"now; it waits for up to cluster.start_timeout_seconds"
        )
    host_bytes = need.host_bytes
    smallest = _smallest_gpu(survey)
    if need.gpu_bytes and smallest is None:
        notes.append(f"{need.stage}: GPU memory is not known, nvidia-smi does not run on the nodes")
    elif need.gpu_bytes and smallest is not None and need.gpu_bytes > need.gpu_share * smallest:
        per_gpu = f"{size(need.gpu_bytes)} on every GPU, the smallest has {size(smallest)}"
        if need.gpu_bytes - need.movable_bytes > need.gpu_share * smallest:
            missing.append(f"{need.stage}: a{_n(need.actor)} needs {per_gpu}: {need.more_room}")
        else:
            host_bytes = (host_bytes or 0) + need.movable_bytes
            notes.append(f"{need.stage}: {per_gpu}: {size(need.movable_bytes)} move to host memory")
    if need.gpu_bytes:
        found = (taken(one, _gpu_bytes_wanted(need, one)) for one in survey.nodes)
        notes += [f"{need.stage}: {line}" for line in found if line]
    if need.bundle.gpus and need.actor == "worker":
        try:
            kind(survey)
        except UserError as error:
            missing.append(f"{need.stage}: {error}")
    if host_bytes is not None:
        placed = sum(
            min(need.bundle.fits_in(one.node.total), int(one.facts["memory_bytes"] // host_bytes))
            for one in survey.nodes
        )
        # nodes that gave no answer may have the memory
        placed += sum(need.bundle.fits_in(node.total) for node, _ in survey.silent)
        if placed < need.least:
            each = ", ".join(
                f"{size(one.facts['memory_bytes'])} on {one.name}" for one in survey.nodes[:4]
            )
            missing.append(
                f"{need.stage}: {need.least} {need.actor}s of {size(host_bytes)} of host memory do not fit the nodes' "
                f"memory ({each}): {need.more_room}"
            )
    return missing, notes


def _gpu_bytes_wanted(need: Need, one: Surveyed) -> int:
    """Returns the bytes that an actor takes of a GPU of this node: an engine fills its share of it with its cache."""
    if need.actor != "engine":
        return need.gpu_bytes - need.movable_bytes
    return int(need.gpu_share * min((gpu["bytes"] for gpu in one.facts["gpus"] or ()), default=0))


def _n(noun: str) -> str:
    return f"n {noun}" if noun[0] in "aeiou" else f" {noun}"


def _smallest_gpu(survey: Survey) -> int | None:
    """Returns the bytes of the smallest GPU in use; a machine with more GPUs than Ray uses counts with its largest."""
    sizes = []
    for one in survey.nodes:
        here = sorted((gpu["bytes"] for gpu in one.facts["gpus"] or ()), reverse=True)
        sizes += here[: int(one.node.total.get("GPU", 0))]
    return min(sizes, default=None)


def _disks(run: Run, survey: Survey) -> list[str]:
    """Describes the first node whose disk has too little room for the run, where its folder is on a disk."""
    stored = bytes_stored(run)
    found = []
    for one in survey.nodes:
        free = one.facts["output_free_bytes"]
        if free is not None and free < stored:
            found.append(
                f"output {run.config.output} takes up to {size(stored)}, {one.name} has {size(free)} of disk free"
            )
    return found[:1]


def _small_disks(needed: Sequence[Need], survey: Survey) -> Iterator[str]:
    several = any(need.actor == "engine" and need.bundle.gpus > 1 for need in needed)
    for one in survey.nodes:
        shared, temp = one.facts["shared_memory_free_bytes"], one.facts["temp_free_bytes"]
        if several and shared is not None and shared < MIN_SHARED_MEMORY_BYTES:
            yield (
                f"{one.name} has {size(shared)} of /dev/shm, through which the GPUs of one engine communicate: "
                f"give its container more shared memory"
            )
        if temp is not None and temp < MIN_TEMP_BYTES:
            yield f"{one.name} has {size(temp)} free for Ray's temporary files"


def bytes_read(run: Run, engines: int) -> int:
    """Returns the maximum bytes of the model that the whole cluster reads: once by every engine and by prune, and once
    more where the allocation is measured, for the comparison, and for evaluating the dense and the pruned model."""
    config = run.config
    measured = config.prune.allocation.type in ("owl", "alphapruning")
    compared = bool(config.curate.references) and config.curate.analysis.min_k is not None
    evaluated = 2 if config.evaluate.perplexity else 0
    return run.skeleton.checkpoint.bytes * (engines + 1 + measured + compared + evaluated)


def bytes_stored(run: Run) -> int:
    """Returns the maximum bytes still to be stored for the run: samples, pool, snapshots and pruned checkpoint."""
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
        * (2 * samples + sequences * tokens)  # dropped samples are stored too, with the reason
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
    columns = (
        "node",
        "CPU",
        "GPU",
        "free memory",
        "free disk",
        "Python",
        *PACKAGES_SHOWN,
        "calibprune",
    )
    table = Table(*columns, title="the cluster", title_justify="left")
    for one in survey.nodes:
        versions = one.facts["versions"]
        table.add_row(
            Text(one.name), _free_of(one, "CPU"), _gpus(one),
            f"{size(one.facts['free_memory_bytes'])} of {size(one.facts['memory_bytes'])}",
            size(one.facts["temp_free_bytes"]), one.facts["python"],
            *(versions[name] or "none" for name in PACKAGES_SHOWN), one.facts["source"] or "none",
        )  # fmt: skip
    for node, reason in survey.silent:
        table.add_row(Text(node.name), in_words(node.total), Text(f"no answer: {reason}"))
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
            f"{many} ({need.bundle.in_words})",
            "" if need.host_bytes is None else size(need.host_bytes),
            size(need.gpu_bytes) if need.gpu_bytes else "",
            need.work,
        )
    if not needed:
        table.add_row("all stages are done")
    return table
