"""The done record of a unit, and the plan: read as data that anybody may have written."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

Unit = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
"""It is part of file names."""


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
    """The machine that made it. For who looks for a fault: it stands in no manifest."""


class Plan(TypedDict):
    """What a stage is to do. `identity`: settings and inputs by dotted key."""

    identity: dict[str, Any]
    units: list[Unit]
    created_at: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Manifest(TypedDict):
    records: list[Record]
    facts: dict[str, Any]


_RECORD, _PLAN, _MANIFEST = TypeAdapter(Record), TypeAdapter(Plan), TypeAdapter(Manifest)


def parse_record(data: bytes) -> Record:
    """Raises ValueError for what is no done record, or one that names a file of another unit or out of its folder."""
    return _checked(_RECORD.validate_python(_json(data)))


def parse_plan(data: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no plan."""
    return dict(_PLAN.validate_python(_json(data)))


def parse_manifest(data: bytes) -> tuple[list[Record], dict[str, Any]]:
    """(records, facts). Raises ValueError as `parse_record` does."""
    manifest = _MANIFEST.validate_python(_json(data))
    return [_checked(record) for record in manifest["records"]], manifest["facts"]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _checked(record: Record) -> Record:
    """A file's name holds its unit, as Stage.put makes it."""
    if (record.file is None) != (record.sha256 is None) or (
        record.file and f"-{record.unit}-" not in record.file
    ):
        raise ValueError(f"unit {record.unit} names a file that is not its own")
    return record
