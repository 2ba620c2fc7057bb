"""generate: vLLM engines continue prefixes in shards, each of which commits on its own."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from calibprune.calibration.engine import SCHEDULE, EngineDied, vllm_version
from calibprune.calibration.pool import sample_records
from calibprune.calibration.prefixes import (
    check_prefixes,
    cut_prefixes,
    longest_prefix,
    prefix_units,
    prefix_units_of,
)
from calibprune.config.curate import GeneratedSource
from calibprune.config.generate import GenerateSettings
from calibprune.config.model import ModelSettings
from calibprune.errors import UserError
from calibprune.events import SET_ASIDE, Event, Lost, UnitDone, emit, note
from calibprune.redact import one_line
from calibprune.reporting.facts import GenerateFacts
from calibprune.stage import Record, Stage
from cluster.crew import Crew
from cluster.generator import shard_rows, shard_unit
from cluster.places import Bundle, Need
from cluster.queue import (
    FIRST_SECONDS,
    Patience,
    TooManyFailures,
    patience_with_source,
    work_through,
)
from cluster.session import worker_bundle
from cluster.unit_worker import UnitWorker
from jobs.engines import check_engines, engine_need, engines
from jobs.run import Run
from jobs.stages import Plan

NAME = "generate"
PUBLISHED: dict[str, Any] = {"card": True}
NOT_IN_THE_RESULT = {
    "engines", "max_concurrent", "shards_in_flight", "attempts", "max_bad_shards",
    "shard_timeout_seconds", "gpu_memory_utilization", "cpu_kvcache_gib", "enforce_eager",
    "pipeline_parallel",
}  # fmt: skip
"""Settings that do not determine the result: a resumed run may have others."""
MAX_SHARDS = 1_000_000
"""Maximum number of shards of a run, since the driver holds the names of all."""
MAX_SAMPLES = 1 << 40
MIN_TOKENS_PER_SECOND = 100
"""Until a shard of its size is done, an engine slower than this is treated as hung, but never before one hour."""
PACE_SHARDS = 64
"""Number of shards done by earlier drivers from which a resumed run estimates how long one takes."""


class ShardsFailed(RuntimeError):
    """Some shards failed too often; all others are committed."""


def skip(run: Run) -> str | None:
    if run.config.prune.pool is not None:
        return "prune.pool is given"
    sources = run.config.curate.sources
    if not any(isinstance(one, GeneratedSource) and one.path is None for one in sources):
        return "curate.sources does not name this run's samples"
    return None


def check(run: Run) -> None:
    settings = run.config.generate
    if settings.min_tokens > settings.max_tokens:
        raise UserError(
            f"generate.min_tokens {settings.min_tokens} is more than generate.max_tokens {settings.max_tokens}"
        )
    shards = -(-settings.samples // settings.shard_rows)
    if shards > MAX_SHARDS or settings.samples > MAX_SAMPLES:
        raise UserError(
            f"generate.samples {settings.samples:,} in shards of {settings.shard_rows:,} rows make {shards:,} shards, "
            f"at most {MAX_SHARDS:,} can be planned: lower generate.samples or raise generate.shard_rows"
        )
    run.check_context("generate.max_tokens with its prefix", most_tokens(settings))
    if not run.stage(NAME).finished:
        check_engines(run, NAME)
        check_prefixes(settings, run.tokenizer)


def needs(run: Run) -> Iterator[Need]:
    settings = run.config.generate
    if skip(run) is not None or run.stage(NAME).finished:
        return
    shards = -(-settings.samples // settings.shard_rows)
    work = f"{settings.samples * settings.max_tokens:,} tokens at most"
    yield engine_need(run, NAME, shards, most_tokens(settings), work)


def most_tokens(settings: GenerateSettings) -> int:
    """Returns the maximum number of tokens of a sample, prefix included."""
    return settings.max_tokens + longest_prefix(settings.prefixes)


def plan(run: Run) -> Plan:
    settings = run.config.generate
    shards = [shard_unit(n) for n in range(-(-settings.samples // settings.shard_rows))]
    prefixes = prefix_units(settings)
    identity = {
        "model": run.model_identity,
        "model.dtype": run.dtype,
        "generate": settings.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "versions": {"vllm": vllm_version()},
    }
    if not settings.batch_invariant:  # as in plans from before there was this setting
        del identity["generate"]["batch_invariant"]
    elif worker_bundle(run.config.cluster).gpus:
        identity["device"] = run.gpu_kind
    if settings.temperature_schedule is not None:
        identity["versions"]["temperature_schedule"] = SCHEDULE
    noun = "shards and files of prefixes" if prefixes else "shards"
    return Plan(identity, [*prefixes, *shards], noun)


def work(run: Run, stage: Stage, missing: Sequence[str]) -> Iterator[Event]:
    """Has the missing files of prefixes and shards committed.

    Raises ShardsFailed when too many shards fail, and the error that ended the cutting of prefixes early.
    """
    settings = run.config.generate
    shards = [unit for unit in missing if unit.isdigit()]
    with ExitStack() as stack:
        prefixes = _Prefixes(run, stage, {unit for unit in missing if not unit.isdigit()}, stack)
        if not shards:
            yield from prefixes.cut()
            return
        crew = engines(run, NAME, stage, len(shards), most_tokens(settings))
        stack.enter_context(crew)
        bad: dict[str, str] = {}
        events = _complete(run, stage, crew, shards, prefixes.ready(shards))
        for event in events:
            if isinstance(event, Lost) and event.kind == SET_ASIDE:
                bad |= dict.fromkeys(event.units, event.message)
                note(f"{_named(run, event.units[0])} is set aside, the others go on")
            yield event
        if prefixes.trouble is not None:
            raise prefixes.trouble
    if len(bad) > settings.max_bad_shards:
        first = next(iter(bad))
        raise ShardsFailed(
            f"{len(bad)} of {len(stage.read_plan()['units'])} shards failed {settings.attempts} times each, the first "
            f"is {_named(run, first)}: {bad[first]}. All others are committed; the same command retries these, "
            f"generate.max_bad_shards={len(bad)} leaves them out"
        )
    for unit, reason in bad.items():
        rows = shard_rows(unit, settings)
        left_out = {"rows_missing": [rows.start, rows.stop], "set_aside": reason}
        facts = {"rows": 0, "tokens": 0, "finish_reasons": {}} | left_out
        yield emit(UnitDone(stage.commit(unit, None, facts)))


def _complete(
    run: Run,
    stage: Stage,
    crew: Crew,
    shards: Sequence[str],
    ready: Iterator[Sequence[str] | None],
) -> Iterator[Event]:
    """Has engines complete the shards as they become ready."""
    settings = run.config.generate
    sizes = {unit: len(shard_rows(unit, settings)) * settings.max_tokens for unit in shards}
    longest = longest_done(stage, shards)
    try:
        yield from work_through(
            crew, "complete", ready,
            in_flight=settings.shards_in_flight,
            attempts=settings.attempts,
            may_fail=settings.max_bad_shards,
            proven=longest > 0,
            patience=patience(settings, sizes, longest),
            fatal=(EngineDied,),
        )  # fmt: skip
    except TooManyFailures as error:
        raise ShardsFailed(str(error)) from None


def patience(
    settings: GenerateSettings, sizes: Mapping[str, int], longest: float = 0.0
) -> Patience:
    """Returns how long engines may take for units of these sizes, in tokens."""
    most = max(sizes.values(), default=0)
    first = settings.shards_in_flight * most / MIN_TOKENS_PER_SECOND
    return Patience(
        settings.shard_timeout_seconds, longest, max(FIRST_SECONDS, first), sizes.__getitem__
    )


class _Prefixes:
    """The missing files of prefixes, cut by one process that reads their source from its start."""

    def __init__(self, run: Run, stage: Stage, uncut: set[str], stack: ExitStack) -> None:
        self._run, self._stage, self._uncut, self._stack = run, stage, uncut, stack
        self.trouble: Exception | None = None
        """Error that ended the cutting early."""

    def cut(self) -> Iterator[Event]:
        """Has the missing files committed."""
        yield from self._cutting(poll_seconds=1.0)

    def ready(self, shards: Sequence[str]) -> Iterator[Sequence[str] | None]:
        """Yields the shards in order, each once its prefixes are there; None while the next ones are being cut.

        Raises the errors that the user has to fix. After any other error no more shards become ready; it is raised
        only where none was ready before.
        """
        settings, any_ready = self._run.config.generate, False
        cutting = self._cutting(poll_seconds=0.0)
        for shard in shards:
            needed = prefix_units_of(shard_rows(shard, settings), settings)
            while not self._uncut.isdisjoint(needed):
                try:
                    event = next(cutting, None)
                except (RuntimeError, TimeoutError) as error:
                    if not any_ready:
                        raise
                    note(f"no more prefixes, the shards that have theirs go on: {one_line(error)}")
                    self.trouble = error
                    return
                if isinstance(event, UnitDone):
                    self._uncut.discard(event.record.unit)
                else:
                    yield None
            any_ready = True
            yield [shard]
        for event in cutting:  # files that none of these shards needs are cut all the same
            if isinstance(event, UnitDone):
                self._uncut.discard(event.record.unit)
            yield None

    def _cutting(self, poll_seconds: float) -> Iterator[Event]:
        if not self._uncut:
            return
        run, units = self._run, sorted(self._uncut)
        note(f"cutting {len(units)} file{'s' * (len(units) > 1)} of prefixes")
        function = partial(
            _cut, run.config.model, run.skeleton.checkpoint.url, run.config.generate, self._stage.url
        )  # fmt: skip
        # it asks for no CPU, since engines might hold the one that it would need
        crew = Crew(
            UnitWorker, 1, Bundle(0, 0), [function, run.label(NAME)],
            start_seconds=run.config.cluster.start_timeout_seconds,
            label=run.label(NAME), kind="cutter",
        )  # fmt: skip
        self._stack.enter_context(crew)
        for event in work_through(
            crew, "make", [units], patience=patience_with_source(), poll_seconds=poll_seconds
        ):
            if isinstance(event, Lost) and event.kind == SET_ASIDE:
                raise RuntimeError(f"{', '.join(event.units)} could not be cut: {event.message}")
            yield event


def _cut(
    model: ModelSettings,
    model_url: str,
    settings: GenerateSettings,
    stage_url: str,
    units: Sequence[str],
) -> Iterator[Event]:
    from calibprune.model import load_tokenizer

    tokenizer = load_tokenizer(model_url, model.trust_remote_code)
    yield from cut_prefixes(Stage(stage_url), settings, tokenizer, set(units))


def longest_done(stage: Stage, missing: Collection[str]) -> float:
    """Returns the seconds of the longest of the last shards that earlier drivers finished; 0 where there are none."""
    left = set(missing)
    done = [unit for unit in stage.read_plan()["units"] if unit.isdigit() and unit not in left]
    records = stage.done(done[-PACE_SHARDS:]).values() if done else ()
    return max((record.facts.get("seconds", 0.0) for record in records), default=0.0)


def _named(run: Run, unit: str) -> str:
    rows = shard_rows(unit, run.config.generate)
    return f"shard {unit} (rows {rows.start} to {rows.stop - 1})"


def facts(run: Run) -> GenerateFacts:
    stage = run.stage(NAME)
    records = sample_records(stage)
    reasons: dict[str, int] = {}
    for record in records:
        for reason, count in record.facts["finish_reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "samples": sum(record.facts["rows"] for record in records),
        "tokens": sum(record.facts["tokens"] for record in records),
        "tokens_per_second": _tokens_per_second(records, stage.manifest()["facts"]),
        "finish_reasons": reasons,
        "set_aside": [
            {"reason": record.facts["set_aside"], "rows": record.facts["rows_missing"]}
            for record in stage.records()
            if "set_aside" in record.facts
        ],
    }


def _tokens_per_second(records: Sequence[Record], finished: Mapping[str, Any]) -> float | None:
    """Returns tokens per second of the time in which engines worked, over all drivers; None where it is unknown."""
    seconds = 0.0
    for begun, ended in finished.get("drivers", ()):
        mine = [record for record in records if begun <= record.finished_at <= ended]
        starts = [record.finished_at - record.facts.get("seconds", 0.0) for record in mine]
        if mine:
            seconds += max(record.finished_at for record in mine) - min(starts)
    tokens = sum(record.facts["tokens"] for record in records)
    return tokens / seconds if tokens and seconds > 0 else None
