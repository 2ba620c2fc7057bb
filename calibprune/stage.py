"""One stage of a run as a folder: its plan, its units of work, their done records, the manifest.

_plan.json           written once: the settings and inputs that determine the result, and the units
data/<unit>-<sha8>…  one file per unit, named by content, so that a race of two attempts is harmless
_done/<unit>.json    the commit point of a unit: file name, bytes, sha256, facts
_drivers/<time>.json the time at which a driver began to work here
_failures/           losses (failures.py)
manifest.json        written after the last unit: every record in order. Readers trust only this
_SUCCESS             written last
"""

import json
import math
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from calibprune import storage
from calibprune.errors import CorruptionError, DriftError, UserError
from calibprune.failpoint import failpoint
from calibprune.process import node

DRIVERS = "_drivers"
MAX_SHOWN = 60
"""Maximum characters of a value in a message."""

Unit = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
"""Name of a unit of work, which is part of file names."""


@dataclass(frozen=True)
class Record:
    """The done record of one unit."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    unit: Unit
    file: Annotated[str, Field(pattern=r"^\w+/\w[\w.-]*$", max_length=400)] | None
    """Path of the unit's data file relative to the stage folder; None for a unit without data."""
    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    facts: dict[str, Any] = field(default_factory=dict)
    finished_at: Annotated[float, Field(ge=0)] = 0.0
    """Seconds since the epoch."""
    node: Annotated[str, Field(max_length=300)] = field(default="", compare=False)
    """The machine that made the unit, to help find faults; it is left out of the manifest."""


class Plan(TypedDict):
    """The plan of a stage. `identity` holds settings and inputs by dotted key."""

    identity: dict[str, Any]
    units: list[Unit]
    created_at: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Manifest(TypedDict):
    records: list[Record]
    facts: dict[str, Any]


_REMADE_BY = "`calibprune run` with the configuration of its run makes it again"
_RECORD, _PLAN, _MANIFEST = TypeAdapter(Record), TypeAdapter(Plan), TypeAdapter(Manifest)


class Published(NamedTuple):
    """A file that is written but not yet committed."""

    file: str
    bytes: int
    sha256: str


class Stage:
    """Reads a stage folder and commits to it. Cheap to create; holds no state but the URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def plan(self, identity: Mapping[str, Any], units: Sequence[str]) -> list[str]:
        """Writes the plan of this stage, or checks that a resumed run has the same; returns the units not done yet.

        Versions of libraries (keys under `versions`) matter only while units are missing.
        Raises DriftError naming every setting or input that differs from the plan in the folder.
        """
        plan = {"identity": flat(identity), "units": list(units), "created_at": time.time()}
        data = storage.json_bytes(plan, compact=True)
        # checks first, since a store may ignore the condition and let `create` overwrite the older plan
        if not self.planned and storage.create(storage.join(self.url, "_plan.json"), data):
            return list(units)
        planned = self.read_plan()["identity"]
        wanted = json.loads(storage.json_bytes(flat(identity)))
        done = self.done_units()
        missing = [unit for unit in units if unit not in done]
        keys = sorted(planned.keys() | wanted.keys())
        if not missing:
            keys = [key for key in keys if key.partition(".")[0] != "versions"]
        changed = [key for key in keys if planned.get(key) != wanted.get(key)]
        if changed:
            raise DriftError(
                f"{self.url} was made with other settings: {describe_differences(planned, wanted, changed)}. "
                f"Set them back to resume, choose another output, or remove that folder"
            )
        return missing

    def begin(self) -> None:
        """Records that a driver begins to work on this stage, so that its time counts even if it is killed."""
        now = time.time()
        name = f"{int(1000 * now):013d}-{uuid.uuid4().hex[:4]}.json"
        storage.write_json(storage.join(self.url, DRIVERS, name), {"begun_at": now, "node": node()})

    def _drivers(self, records: Iterable[Record]) -> list[list[float]]:
        """Returns [begun, ended] of each driver in seconds since the epoch: an earlier driver ended with its last
        commit; the last one, which finishes the stage, ends now."""
        names = storage.names(storage.join(self.url, DRIVERS))
        begun = [int(name[:13]) / 1000 for name in names if re.fullmatch(r"\d{13}-\w+\.json", name)]
        commits = sorted(record.finished_at for record in records)
        spans = []
        for start, following in pairwise([*begun, math.inf]):
            last = max((at for at in commits if start <= at < following), default=start)
            spans.append([start, last if following < math.inf else max(last, time.time())])
        return spans

    def read_plan(self) -> dict[str, Any]:
        """Reads the plan. Raises UserError where there is none, CorruptionError for a damaged one."""
        url = storage.join(self.url, "_plan.json")
        try:
            return parse_plan(storage.read_bytes(url))
        except FileNotFoundError:
            raise UserError(
                f"{url} is not there, and the manifest does not name the model that it was made with: give the folder "
                f"of the stage itself, not a copy, or publish it again from a run that this version finished"
            ) from None
        except ValueError:
            raise CorruptionError(
                f"{url} is damaged: remove the folder {self.url} to make it again"
            ) from None

    @property
    def planned(self) -> bool:
        return storage.exists(storage.join(self.url, "_plan.json"))

    def put(self, unit: str, data: bytes, extension: str, folder: str, stem: str) -> Published:
        """Writes a unit's bytes under a name made from their hash; the unit is not committed yet."""
        digest = storage.sha256(data)
        file = f"{folder}/{stem}-{unit}-{digest[:8]}.{extension}"
        storage.write(storage.join(self.url, file), data)
        return Published(file, len(data), digest)

    def commit(self, unit: str, published: Published | None, facts: Mapping[str, Any]) -> Record:
        """Writes the unit's done record, the commit point; returns the record that won.

        A unit that another attempt committed first keeps that attempt's record, and this one's file, if it
        differs, is never referred to. On a store that ignores conditional writes the later of two racing attempts
        may win instead: each record names a file of its own, so either is whole.
        """
        failpoint(f"between-data-and-done-{unit}")
        file, size, digest = published or (None, 0, None)
        record = Record(unit, file, size, digest, dict(facts), time.time(), node())
        if storage.create(self._done_url(unit), storage.json_bytes(record.__dict__)):
            return record
        return self.record(unit)

    def record(self, unit: str) -> Record:
        """Reads a unit's record. Raises FileNotFoundError if it is not done, CorruptionError if it is damaged."""
        return self._parse(unit, storage.read_bytes(self._done_url(unit)))

    def done(self, units: Iterable[str] | None = None) -> dict[str, Record]:
        """Reads the records of the committed units, sorted; with `units`, of those among them, in the order given.

        The records are read many at a time. Raises CorruptionError naming a damaged one.
        """
        committed = self.done_units()
        wanted = sorted(committed) if units is None else [u for u in units if u in committed]
        contents = storage.read_many([self._done_url(unit) for unit in wanted])
        return {unit: self._parse(unit, data) for unit, data in zip(wanted, contents, strict=True)}

    def done_units(self) -> set[str]:
        found = storage.names(storage.join(self.url, "_done"))
        return {name.removesuffix(".json") for name in found if name.endswith(".json")}

    def finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Writes the manifest and `_SUCCESS`: one record for every planned unit, and none beyond the plan.

        The manifest also has `facts`, the `drivers` that worked on the stage, as [begun, ended], and the `seconds` of
        all of them together.
        Raises RuntimeError when a planned unit is missing, CorruptionError when a record is damaged or another unit's.
        """
        units = self.read_plan()["units"]
        done = self.done(units)
        missing = [unit for unit in units if unit not in done]
        if missing:
            raise RuntimeError(f"{self.url}: {len(missing)} units are missing: {missing[:5]}")
        drivers = self._drivers(done.values())
        seconds = sum(ended - begun for begun, ended in drivers)
        manifest = {
            "records": [
                {key: value for key, value in done[unit].__dict__.items() if key != "node"}
                for unit in units
            ],
            "facts": {"seconds": seconds, "drivers": drivers} | dict(facts or {}),
        }
        data = storage.json_bytes(manifest, compact=True)
        storage.write(storage.join(self.url, "manifest.json"), data)
        storage.write(storage.join(self.url, "_SUCCESS"), b"")

    @property
    def finished(self) -> bool:
        return storage.exists(storage.join(self.url, "_SUCCESS"))

    def manifest(self) -> dict[str, Any]:
        """Reads records and facts. Raises UserError for an unfinished stage, CorruptionError for a damaged manifest."""
        if not self.finished:
            raise UserError(f"{self.url} is not finished: run the stage {self.name} first")
        url = storage.join(self.url, "manifest.json")
        try:
            records, facts = parse_manifest(storage.read_bytes(url))
        except (ValueError, FileNotFoundError):
            raise CorruptionError(
                f"{url} is damaged or missing: remove it and {self.url}/_SUCCESS; {_REMADE_BY}"
            ) from None
        return {"records": records, "facts": facts}

    def records(self) -> list[Record]:
        return self.manifest()["records"]

    def content_id(self) -> str:
        """Returns a hash over the hashes of a finished stage's data, which identifies the input of the next stage."""
        hashes: Iterable[str | None] = (record.sha256 for record in self.records())
        return storage.sha256(json.dumps(list(hashes)).encode())

    def read(self, record: Record) -> bytes:
        """Reads a unit's bytes and verifies them. Raises CorruptionError when they are not the committed ones."""
        if record.file is None:
            return b""
        url = storage.join(self.url, record.file)
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError:
            raise CorruptionError(
                f"{url} is missing, though it was committed: remove {self.how_to_remake(record.unit)}"
            ) from None
        if storage.sha256(data) != record.sha256:
            raise CorruptionError(
                f"{url} is damaged: its sha256 is not the recorded {record.sha256}: remove it and "
                f"{self.how_to_remake(record.unit)}"
            )
        return data

    def how_to_remake(self, unit: str) -> str:
        """Returns advice for a unit whose file is damaged, to follow "remove it and"."""
        return f"{self._done_url(unit)}; {_REMADE_BY}"

    def _parse(self, unit: str, data: bytes) -> Record:
        try:
            record = parse_record(data)
        except ValueError:
            record = None
        if record is None or record.unit != unit:
            raise CorruptionError(
                f"{self._done_url(unit)} is damaged: it is not the done record of unit {unit}: remove it; {_REMADE_BY}"
            )
        return record

    def _done_url(self, unit: str) -> str:
        return storage.join(self.url, "_done", f"{unit}.json")


def describe_differences(
    planned: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]
) -> str:
    """Describes briefly what the values of these dotted keys were and are now."""
    return "; ".join(
        "{} was {}, now {}".format(key, *_excerpts(planned.get(key), now.get(key))) for key in keys
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a tree of mappings into one mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _excerpts(one: Any, other: Any) -> tuple[str, str]:
    """Returns short excerpts of two values, from shortly before the place where they begin to differ."""
    texts = ["absent" if value is None else str(value) for value in (one, other)]
    pairs = enumerate(zip(*texts, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(map(len, texts)))
    start = max(0, same - 20) if max(map(len, texts)) > MAX_SHOWN else 0
    cut = [("..." if start else "") + text[start:] for text in texts]
    first, second = (
        text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..." for text in cut
    )
    return first, second


def parse_record(data: bytes) -> Record:
    """Parses a done record. Raises ValueError for anything else, and for a file that is not the unit's own."""
    return _checked(_RECORD.validate_python(_json(data)))


def parse_plan(data: bytes) -> dict[str, Any]:
    """Parses a plan. Raises ValueError for anything else."""
    return dict(_PLAN.validate_python(_json(data)))


def parse_manifest(data: bytes) -> tuple[list[Record], dict[str, Any]]:
    """Parses a manifest into (records, facts). Raises ValueError as `parse_record` does."""
    manifest = _MANIFEST.validate_python(_json(data))
    return [_checked(record) for record in manifest["records"]], manifest["facts"]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _checked(record: Record) -> Record:
    """Raises ValueError unless the file's name contains the unit's, as `Stage.put` makes it; returns the record."""
    if (record.file is None) != (record.sha256 is None) or (
        record.file and f"-{record.unit}-" not in record.file
    ):
        raise ValueError(f"unit {record.unit} names a file that is not its own")
    return record
