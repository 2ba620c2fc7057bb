"""generate: vLLM engines continue prefixes in shards; every shard commits on its own."""

import time
from collections import abc, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from ray.exceptions import RayTaskError

from calibprune.calibration.engine import EngineDied, vllm_version
from calibprune.calibration.prefixes import (
    cut_prefixes,
    longest_prefix,
    prefix_units,
    prefix_units_of,
)
from calibprune.config.generate import GenerateSettings
from calibprune.config.model import ModelSettings
from calibprune.errors import UserError
from calibprune.failures import SET_ASIDE, Failure
from calibprune.model import load_tokenizer
from calibprune.redact import one_line
from calibprune.stage import Record, Stage
from cluster.crew import Crew
from cluster.generator import Generator, shard_rows, shard_unit
from cluster.places import Bundle, NoRoom, capacity
from cluster.queue import FIRST_SECONDS, dispatch
from cluster.session import worker_bundle
from cluster.tasks import POLL_SECONDS, Done, TaskLost, run_tasks
from jobs.progress import Steps, say, tick
from jobs.run import Run
from jobs.watching import Watch

NOT_IN_THE_RESULT = {
    "engines", "max_concurrent", "shards_in_flight", "attempts", "max_bad_shards",
    "shard_timeout_seconds", "gpu_memory_utilization", "cpu_kvcache_gib", "enforce_eager",
}  # fmt: skip
MOST_IN_A_ROW, MOST_AT_FIRST = 20, 2
"""Shards whose attempts may fail one after another, and while nothing ever went right: more have a cause that is not
their own."""
LEAST_TOKENS_A_SECOND = 100
"""Of an engine: while nobody knows how long a shard takes, a slower one is held to hang, after an hour at least."""
STALL_SECONDS = 1800.0
"""Without a sign of the cutting of prefixes, until its source is held to give nothing any more."""
PACE_SHARDS = 64
"""Done earlier, from which a resume learns how long one takes."""


class ShardsFailed(RuntimeError):
    """Shards that failed too often; all others are committed."""


def run(run: Run) -> None:
    settings, stage = run.config.generate, run.stage("generate")
    if run.no_samples_because is not None:
        say(f"generate: not needed, {run.no_samples_because}")
        return
    shards = [shard_unit(n) for n in range(-(-settings.samples // settings.shard_rows))]
    units = [*prefix_units(settings), *shards]
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "generate": settings.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "versions": {"vllm": vllm_version()},
    }
    missing = stage.plan(identity, units)
    if not missing and stage.finished:
        say("generate: done already")
        return
    started = time.monotonic()
    watch = Watch(stage, len(units), len(units) - len(missing))
    left = [unit for unit in missing if unit.isdigit()]
    uncut = {unit for unit in missing if not unit.isdigit()}
    facts = _generate(run, stage, len(shards), left, uncut, watch)
    seconds = time.monotonic() - started
    facts |= {"seconds": seconds, "resumed": len(missing) < len(units)}
    stage.finish(facts | {"model": run.model_identity})  # for those that read the published samples


class _Prefixes:
    """The files of prefixes that are still uncut, and the shards that wait for them."""

    def __init__(self, run: Run, stage: Stage, uncut: set[str], watch: Watch) -> None:
        self._run, self._stage, self._uncut, self._watch = run, stage, uncut, watch
        self._count = len(uncut)
        self.trouble: Exception | None = None
        """With which the cutting ended too early."""

    def ready_of(self, shards: Sequence[str]) -> abc.Generator[list[str]]:
        """The shards in order, each once its prefixes are there; nothing while the next ones are being cut.

        One task reads the source from its start. It asks for no place, or engines might hold the one that it needs.
        Raises what the user has to mend; after other trouble no more shards become ready, and where none wait that is
        raised too.
        """
        settings, waiting = self._run.config.generate, deque(shards)

        def ready() -> list[str]:
            found = []
            while waiting and self._uncut.isdisjoint(
                prefix_units_of(shard_rows(waiting[0], settings), settings)
            ):
                found.append(waiting.popleft())
            return found

        yield ready()
        try:
            for done in self._cutting():
                if done is not None:
                    self._watch.committed(*done)
                    self._uncut.discard(done.record.unit)
                yield ready()
        except (RayTaskError, TaskLost, NoRoom) as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, UserError) or not shards:
                raise
            reason, units = one_line(cause), tuple(sorted(self._uncut))
            say(f"generate: no more prefixes, the shards that have theirs go on: {reason}")
            self._watch.failed(Failure("task", reason, units))
            self.trouble = error

    def _cutting(self) -> Iterator[Done | None]:
        if not self._uncut:
            return
        run = self._run
        say(
            f"generate: cutting {self._count} file{'s' * (self._count > 1)} of prefixes, engines start with the first"
        )
        settings = (run.config.model, run.skeleton.checkpoint.url, run.config.generate)
        yield from run_tasks(
            _cut, (*settings, self._stage.url), [sorted(self._uncut)], Bundle(0, 0),
            start_seconds=run.config.cluster.start_timeout_seconds,
            label=self._watch.label, failed=self._watch.lost, poll_seconds=0.0,
            silent_seconds=STALL_SECONDS,
        )  # fmt: skip

    def __str__(self) -> str:
        """What is cut, in words; nothing when all is."""
        cut = self._count - len(self._uncut)
        return f"{cut} of {self._count} files of prefixes" if self._uncut else ""


def _cut(
    model: ModelSettings,
    model_url: str,
    settings: GenerateSettings,
    stage_url: str,
    missing: Sequence[str],
) -> Iterator[Record | None]:
    tokenizer = load_tokenizer(model_url, model.trust_remote_code)
    yield from cut_prefixes(Stage(stage_url), settings, tokenizer, set(missing))


def _generate(
    run: Run, stage: Stage, shards: int, missing: list[str], uncut: set[str], watch: Watch
) -> dict[str, Any]:
    """Has the missing shards and files of prefixes committed; returns what it took.

    Raises ShardsFailed when too many fail, and what ended the cutting of prefixes too early.
    """
    settings, prefixes = run.config.generate, _Prefixes(run, stage, uncut, watch)
    arriving = prefixes.ready_of(missing)
    if not missing:
        with closing(arriving):
            for _ in arriving:
                tick()
                time.sleep(POLL_SECONDS)
        return {"tokens": 0, "working_seconds": 0.0}
    bad: dict[str, str] = {}
    longest, tokens = longest_done(stage, shards, missing), 0
    sizes = {unit: len(shard_rows(unit, settings)) * settings.max_tokens for unit in missing}

    def set_aside(unit: str, reason: str) -> None:
        bad[unit] = reason
        say(f"generate: set aside {_named(run, unit)}: {reason}")
        watch.failed(Failure(SET_ASIDE, reason, (unit,), settings.attempts))

    def in_a_row(failures: int, reason: str) -> None:
        most = settings.max_bad_shards + (MOST_IN_A_ROW if tokens or longest else MOST_AT_FIRST)
        if failures >= most_failures(run, crew, most + 1):
            raise ShardsFailed(
                f"{failures} attempts at shards failed in a row, the last time: {reason}"
            )

    def detail() -> str:
        pace = ""
        if crew.ready_at is not None and tokens:
            pace = f"{tokens / (time.monotonic() - crew.ready_at):.0f} tokens/s"
        return ", ".join(filter(None, (str(prefixes), pace)))

    with (
        closing(arriving),
        engines(run, stage, len(missing), watch) as crew,
        Steps("generate", "shards", shards, shards - len(missing)) as steps,
    ):
        told = ""
        for record in dispatched(
            run, crew, "complete", sizes, set_aside, in_a_row, longest, more=arriving
        ):
            cut = str(prefixes)
            if isinstance(record, Record) and crew.ready_at is not None:
                tokens += record.facts["tokens"]
                watch.committed(record)
                steps.add(detail())
            elif cut or told:
                steps.still(detail())
            else:
                tick()
            told = cut
        working = time.monotonic() - (crew.ready_at or time.monotonic())
    if prefixes.trouble is not None:
        raise prefixes.trouble
    if len(bad) > settings.max_bad_shards:
        first = next(iter(bad))
        raise ShardsFailed(
            f"{len(bad)} of {shards} shards failed {settings.attempts} times each, the first is "
            f"{_named(run, first)}: {bad[first]}. All others are committed; the same command tries these again, "
            f"generate.max_bad_shards={len(bad)} leaves them out"
        )
    for unit, reason in bad.items():
        rows = shard_rows(unit, settings)
        left_out = {"rows_missing": [rows.start, rows.stop], "set_aside": reason}
        facts = {"rows": 0, "tokens": 0, "finish_reasons": {}} | left_out
        watch.committed(stage.commit(unit, None, facts))
    return {"tokens": tokens, "working_seconds": working, "set_aside": len(bad)}


def engines(
    run: Run, stage: Stage, units: int, watch: Watch, most_tokens: int | None = None
) -> Crew:
    """vLLM engines that commit to the stage, no more of them than there are units of work."""
    settings, cluster = run.config.generate, run.config.cluster
    bundle = worker_bundle(cluster, engine_gpus=settings.tensor_parallel)
    count = min(settings.engines or wanted_engines(run, bundle), units)
    room = capacity(bundle)
    say(f"{stage.name}: starting {min(count, room) or count} vLLM engine{'s' * (count > 1)}")
    if 0 < room < count:
        say(f"{stage.name}: {count} were asked for; the others start when nodes join")
    model = run.skeleton.checkpoint.url
    most = most_tokens or settings.max_tokens + longest_prefix(settings.prefixes)
    return Crew(
        Generator, count, bundle,
        [run.config.model, model, run.dtype, most, settings, stage.url, bundle.cpus],
        start_seconds=cluster.start_timeout_seconds,
        concurrency=settings.shards_in_flight + 1,
        label=watch.label,
        failed=watch.lost,
    )  # fmt: skip


def most_failures(run: Run, crew: Crew, units: int) -> int:
    """Attempts that may fail in a row: those of so many units, or of all that are under way when a store is out."""
    settings = run.config.generate
    return settings.attempts * max(units, crew.count * settings.shards_in_flight)


def dispatched(
    run: Run, crew: Crew, method: str, tokens: Mapping[str, int], set_aside: Any, in_a_row: Any,
    longest: float = 0.0, more: Iterator[Sequence[str]] | None = None,
) -> Any:  # fmt: skip
    """The units' records as the engines commit them. `tokens`: of every unit, at most. `more`, if given, has the units
    as they become ready."""
    settings = run.config.generate
    return dispatch(
        crew, method, list(tokens) if more is None else [],
        in_flight=settings.shards_in_flight,
        attempts=settings.attempts,
        set_aside=set_aside,
        in_a_row=in_a_row,
        timeout_seconds=settings.shard_timeout_seconds,
        longest=longest,
        first_seconds=first_seconds(settings, max(tokens.values(), default=0)),
        work=tokens.__getitem__,
        fatal=(EngineDied,),
        more=more,
    )  # fmt: skip


def first_seconds(settings: GenerateSettings, tokens: int) -> float:
    """What an engine may take for the first shards that it has in flight, of so many tokens each."""
    return max(FIRST_SECONDS, settings.shards_in_flight * tokens / LEAST_TOKENS_A_SECOND)


def longest_done(stage: Stage, shards: int, missing: Collection[str]) -> float:
    """Seconds that the longest of the last shards done before took; 0 where there is none."""
    left = set(missing)
    done = [unit for unit in map(shard_unit, range(shards)) if unit not in left]
    records = stage.done(done[-PACE_SHARDS:]).values() if done else ()
    return max((record.facts.get("seconds", 0.0) for record in records), default=0.0)


def _named(run: Run, unit: str) -> str:
    rows = shard_rows(unit, run.config.generate)
    return f"shard {unit} (rows {rows.start} to {rows.stop - 1})"


def wanted_engines(run: Run, bundle: Bundle) -> int:
    """As many engines as the pruning workers' GPUs hold; without GPUs, one a worker."""
    cluster = run.config.cluster
    if not bundle.gpus:
        return cluster.worker_count
    return max(1, cluster.worker_count * (cluster.gpus_per_worker or 1) // bundle.gpus)
